"""The two apps. Where a client's program, rows and folder are is a matter of its node, and is never sent."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

from flwr.app import Context
from mobizo_flower import Client, Plan, Protocol, RoundReport, Server, Traffic, run_rounds
from mobizo_flower.flower import FlowerNetwork, client_app, server_app

import mobizo_compiler as mobizo
from mobizo_demo import tiny


@functools.cache
def session_of(file: str) -> mobizo.Session:
    """One session a process: what its state is, the client and the server see to before they use it."""
    return mobizo.Session(file)


def client_of(context: Context) -> Client:
    """The client of a node: `--node-config 'partition-id=3 program="tiny.pte" folder="runs/clients"'`."""
    node = context.node_config
    number = int(node["partition-id"])
    x, y = tiny.client_rows(number)
    return Client(
        Path(str(node["folder"])) / f"client{number}",
        session_of(str(node["program"])),
        number,
        functools.partial(tiny.client_batch, x, y),
        rows=len(x),
    )


def serve(network: FlowerNetwork, context: Context) -> None:
    """Run the rounds; every round adds a line to `rounds.jsonl` in the server's folder."""
    config, folder = context.run_config, Path(str(context.run_config["folder"]))
    plan = Plan(
        Protocol(str(config["protocol"])), int(config["steps"]), float(config["learning-rate"]), least_answers=2
    )
    with Server(folder, session_of(str(config["program"])), plan) as federation:

        def on_round(report: RoundReport, traffic: Traffic) -> None:
            line = dataclasses.asdict(report) | dataclasses.asdict(traffic)
            line["accuracy"] = tiny.accuracy(federation.session)
            with (folder / "rounds.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

        run_rounds(
            network,
            federation,
            int(config["rounds"]),
            clients=int(config["clients"]),
            at_once=int(config["at-once"]),
            timeout_s=float(config["timeout-s"]),
            on_round=on_round,
        )


client = client_app(client_of)
server = server_app(serve)
