"""A federation in real processes: a SuperLink and eight SuperNodes on the loopback interface, with kills.

    python integrations/flower/run_processes.py [--protocol directions] [--kill] [--output runs/flower]

With `--kill`, three nodes (1, 4 and 6) are killed while their clients compute, and started again two rounds later;
then the SuperLink is killed with the server, and both are started again. At the end the state is compared, bit for bit,
with a plain replay of the journals, with that of the clients, and with the same rounds in one process.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "demo"), str(HERE), str(HERE.parent.parent)]

from evidence import evidence, report  # noqa: E402  (the package is beside this file)
from mobizo_demo import tiny  # noqa: E402
from processes import Flower  # noqa: E402

KILLED = (1, 4, 6)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 if all states are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", choices=["journals", "directions"], default="journals")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="of a client in a round; or seeds")
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--timeout", type=float, default=60, help="seconds of a round, for those who do not answer")
    parser.add_argument("--at-once", type=int, default=2, help="clients that compute at a time; each is a process")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--keep", action="store_true", help="take up the federation that is in the folder")
    parser.add_argument("--output", type=Path, default=Path("runs/flower"), help="emptied first")
    options = parser.parse_args(arguments)
    folder = options.output.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that Flower's processes end with this one
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for left in ("again", "flower"):
        shutil.rmtree(folder / left, ignore_errors=True)
    program = tiny.compile_tiny(folder / "tiny.pte", options.queries)
    run = {
        "program": str(folder / "tiny.pte"),
        "folder": str(folder / "server"),
        "protocol": options.protocol,
        "rounds": options.rounds,
        "clients": options.clients,
        "steps": options.steps,
        "learning-rate": options.learning_rate,
        "timeout-s": options.timeout,
        "at-once": options.at_once,
    }
    node = {"program": str(folder / "tiny.pte"), "folder": str(folder / "clients")}
    with Flower(folder, HERE / "demo") as flower:
        flower.start_link()
        for number in range(options.clients):
            flower.start_node(number, node)
        flower.submit(run)
        if options.kill:
            _kill(flower, folder, options.rounds, options.clients, run, node)
        _until(lambda: _done(folder) >= options.rounds)
        last = options.rounds - 1
        _until(
            lambda: len(list(folder.glob(f"clients/*/*/rounds/{last:05d}.journal"))) == options.clients, options.timeout
        )
        time.sleep(2)  # the snapshot follows the journal
    return report(evidence(folder, program, folder / "again"), program, options.clients)


def _kill(
    flower: Flower, folder: Path, rounds: int, clients: int, run: Mapping[str, object], node: Mapping[str, object]
) -> None:
    first, second = rounds // 4, rounds // 2
    killed = [number for number in KILLED if number < clients]
    _until(lambda: _done(folder) >= first)
    for number in killed:
        _until(functools.partial(flower.trains, number), 120)
        flower.kill(f"node{number}")
        print(f"client {number} killed in round {_done(folder) + 1}", flush=True)
    _until(lambda: _done(folder) >= first + 2)
    for number in killed:
        flower.start_node(number, node)
    print(f"started again in round {_done(folder) + 1}", flush=True)
    _until(lambda: _done(folder) >= second)
    _until(lambda: flower.trains(0), 120)
    flower.kill("link")
    print(f"server killed in round {_done(folder) + 1}", flush=True)
    flower.start_link()
    flower.submit(run)


def _done(folder: Path) -> int:
    path = folder / "server" / "rounds.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def _until(true: Callable[[], bool], seconds: float = 3600) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
