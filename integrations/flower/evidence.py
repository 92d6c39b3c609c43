"""What a federation of the demo has left on disk, checked: the state from the journals alone, and the bytes."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from mobizo_demo import tiny
from mobizo_flower import Client, Outcome, Plan, Server

import mobizo_compiler as mobizo
from mobizo_compiler.device.run import SNAPSHOT, read_state


@dataclass(frozen=True)
class Evidence:
    """What was found.

    Args:
        rounds: In the server's folder.
        replay: Whether a plain replay of the journals gives the server's state, bit for bit.
        clients: How many clients have on their disks, bit for bit, what a replay of as many rounds gives.
        up_to_date: How many of them have all rounds; who was away when the last one was handed on has not.
        calm: Whether the same rounds without network, processes and kills, by the same clients, give that state.
        accuracy: Of that state.
        lines: A line for every round, as the server wrote it.
    """

    rounds: int
    replay: bool
    clients: int
    up_to_date: int
    calm: bool
    accuracy: float
    lines: list[dict[str, Any]]


def evidence(folder: Path, program: mobizo.Program, scratch: Path) -> Evidence:
    """Check a folder that `run_processes.py` or `run_simulation.py` wrote.

    Args:
        folder: With `server/` and `clients/`.
        program: Of the federation.
        scratch: For the federation that is made again.
    """
    lines = [json.loads(line) for line in (folder / "server" / "rounds.jsonl").read_text().splitlines()]
    session = mobizo.Session(program)
    server_state, _ = read_state(folder / "server" / "rounds" / SNAPSHOT, session)
    journals = sorted((folder / "server" / "rounds").glob("*.journal"))
    states = [session.state()]
    for journal in journals:
        session.merge([journal], weight=1.0)
        states.append(session.state())
    kept = [read_state(path, session) for path in folder.glob(f"clients/client*/*/rounds/{SNAPSHOT}")]
    return Evidence(
        rounds=len(journals),
        replay=torch.equal(session.state(), server_state),
        clients=sum(torch.equal(state, states[rounds]) for state, rounds in kept),
        up_to_date=sum(rounds == len(journals) for _, rounds in kept),
        calm=torch.equal(_made_again(folder, program, lines, scratch), server_state),
        accuracy=tiny.accuracy(session),
        lines=lines,
    )


def _made_again(folder: Path, program: mobizo.Program, lines: list[dict[str, Any]], scratch: Path) -> torch.Tensor:
    """The state after the same rounds, answered by the same clients, in this process."""
    plan = json.loads((folder / "server" / "federation.json").read_text())["plan"]
    one = mobizo.Session(program)  # the clients take turns in it
    with Server(scratch / "server", mobizo.Session(program), Plan(**plan)) as server:
        for line in lines:
            for number in line["clients"]:
                x, y = tiny.client_rows(number)
                batches = functools.partial(tiny.client_batch, x, y)
                client = Client(scratch / f"client{number}", one, number, batches, len(x))
                verdict = server.accept(client.answer(server.task(server.round)))
                if verdict.outcome == Outcome.BEHIND:
                    verdict = server.accept(client.answer(server.task(verdict.rounds)))
                assert verdict.outcome == Outcome.ACCEPTED, verdict
            server.close_round()
        return server.session.state()


def flower_bytes(content: RecordDict) -> int:
    """What Flower makes of a content before it is sent: all its objects, without the metadata of the message."""
    return sum(len(each.deflate()) for each in get_all_nested_objects(content).values())


def report(found: Evidence, program: mobizo.Program, clients: int) -> int:
    """Print what was found; 0 if all states are what they must be, of so many clients, else 1."""
    for line in found.lines:
        print(
            f"round {line['number'] + 1}: {len(line['clients'])} clients {line['outcomes']}, loss {line['loss']:.3f}, "
            f"accuracy {line['accuracy']:.3f}, {line['seconds']:.1f} s"
        )
    print(f"{found.rounds} rounds, accuracy {found.accuracy:.3f}; {program.parameters} parameters")
    print(f"the state is that of a replay of the journals: {found.replay}")
    print(f"the state is that of the same rounds in one process: {found.calm}")
    print(f"clients with the state of a replay of their rounds: {found.clients} of {clients}")
    print(f"clients with all rounds: {found.up_to_date} of {clients}")
    print(table(found, program))
    return 0 if found.replay and found.calm and found.clients == clients else 1


def table(found: Evidence, program: mobizo.Program) -> str:
    """Bytes of a client and a round, beside those of FedAvg with the same adapters, as a table in Markdown.

    What was sent again, or did not count, is in it.
    """
    counted = sum(len(line["clients"]) for line in found.lines)
    down = sum(line["task_bytes"] for line in found.lines) / counted
    up = sum(line["answer_bytes"] for line in found.lines) / counted
    floats = numpy.zeros(program.parameters, numpy.float32)
    fedavg = RecordDict({"arrays": ArrayRecord([floats])})
    rows = [("this", round(down), round(up)), ("FedAvg of the adapters, float32", floats.nbytes, floats.nbytes)]
    text = ["| | to a client | from it | the same as Flower's objects |", "| --- | ---: | ---: | ---: |"]
    for name, to, back in rows:
        if name == "this":
            both = [flower_bytes(RecordDict({"mobizo": ConfigRecord({"message": bytes(n)})})) for n in (to, back)]
        else:
            both = [flower_bytes(fedavg)] * 2
        text.append(f"| {name} | {to:,} | {back:,} | {both[0]:,} and {both[1]:,} |")
    return "\n".join(text)
