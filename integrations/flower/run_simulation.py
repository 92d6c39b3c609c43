"""The demo in Flower's simulation engine: hundreds of clients, two at a time, on one machine.

python integrations/flower/run_simulation.py [--clients 200] [--rounds 3] [--protocol directions]

The checks are those of `run_processes.py`. Ray, on which the engine stands, moves Python objects between its processes;
what server and clients say to each other is bytes, as everywhere.
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
sys.path[:0] = [str(HERE / "demo"), str(HERE), str(HERE.parent.parent)]
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])  # for the processes of Ray

from evidence import evidence, report  # noqa: E402  (the package is beside this file)
from flwr.app import Context  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402
from mobizo_demo import apps, tiny  # noqa: E402
from mobizo_flower import Client  # noqa: E402
from mobizo_flower.flower import FlowerNetwork, client_app, server_app  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 if all states are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", choices=["journals", "directions"], default="directions")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="of a client in a round; or seeds")
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--output", type=Path, default=Path("runs/flower-simulation"), help="emptied first")
    options = parser.parse_args(arguments)
    folder = options.output.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file = folder / "tiny.pte"
    program = tiny.compile_tiny(file)
    run = {
        "program": str(file),
        "folder": str(folder / "server"),
        "protocol": options.protocol,
        "rounds": options.rounds,
        "clients": options.clients,
        "steps": options.steps,
        "learning-rate": options.learning_rate,
        "timeout-s": 3600.0,
        "at-once": options.clients,
    }
    run_simulation(
        server_app=server_app(functools.partial(_serve, run)),
        client_app=client_app(functools.partial(_client_of, str(file), str(folder / "clients"))),
        num_supernodes=options.clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}},
    )
    return report(evidence(folder, program, folder / "again"), program, options.clients)


def _serve(run: dict[str, str | int | float], network: FlowerNetwork, context: Context) -> None:
    context.run_config = dict(run)
    apps.serve(network, context)


def _client_of(file: str, folder: str, context: Context) -> Client:
    context.node_config |= {"program": file, "folder": folder}
    return apps.client_of(context)


if __name__ == "__main__":
    sys.exit(main())
