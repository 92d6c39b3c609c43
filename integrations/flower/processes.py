"""Flower's own processes on the loopback interface: a SuperLink and SuperNodes, started, killed and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parent
CLIENT_PROCESS = "flwr-clientapp"
CONFIG = """[superlink]
default = "here"

[superlink.here]
address = "127.0.0.1:{port}"
insecure = true
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Flower:
    """A SuperLink and its SuperNodes. What they print is in `logs`; nothing is sent to Flower's telemetry.

    Args:
        folder: For logs and for what Flower keeps.
        app: The folder of the Flower app.
    """

    def __init__(self, folder: Path, app: Path) -> None:
        self._folder, self._app = folder, app
        self._port = free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        home = folder / "flower"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(CONFIG.format(port=self._port))
        self._bin = Path(sys.executable).parent
        self._environment = os.environ | {
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def start_link(self) -> None:
        """Start the SuperLink and wait until it answers. What it knows is in a file, so that nodes outlive it."""
        database = ["--database", str(self._folder / "flower" / "link.db")]
        options = ["--insecure", "--disable-runtime-dependency-installation", "--port", str(self._port)]
        self._start("link", ["flower-superlink", *options, *database])
        for _ in range(600):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the SuperLink does not answer: {self._folder / 'logs' / 'link.log'}")

    def start_node(self, number: int, config: Mapping[str, object]) -> None:
        """Start a SuperNode.

        Args:
            number: Its partition-id.
            config: What else its apps find in `context.node_config`.
        """
        values = {"partition-id": number, **config}
        text = " ".join(
            f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in values.items()
        )
        link = ["--insecure", "--superlink", f"127.0.0.1:{self._port}", "--port", str(free_port())]
        self._start(f"node{number}", ["flower-supernode", *link, "--node-config", text])

    def submit(self, config: Mapping[str, object]) -> None:
        """Start a run of the app: the SuperLink starts its server."""
        text = " ".join(
            f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in config.items()
        )
        command = [str(self._bin / "flwr"), "run", str(self._app), "here", "--run-config", text]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"flwr run: {done.stdout}{done.stderr}")

    def kill(self, name: str) -> None:
        """SIGKILL for "link" or "node3" and for all that it started: no process gets to say goodbye."""
        process = self._processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def trains(self, number: int) -> bool:
        """Whether a client's process is alive, which it is only while there is a message in hand."""
        group = self._processes[f"node{number}"].pid
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (
                    CLIENT_PROCESS.encode() in (process / "cmdline").read_bytes()
                    and os.getpgid(int(process.name)) == group
                ):
                    return True
            except OSError:
                continue
        return False

    def stop(self) -> None:
        """Kill all that is left."""
        for name in list(self._processes):
            self.kill(name)

    def __enter__(self) -> Flower:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _start(self, name: str, command: list[str]) -> None:
        log: IO[bytes] = (self._folder / "logs" / f"{name}.log").open("ab")
        with log:  # a group of its own, so that it can be killed with all that it starts
            self._processes[name] = subprocess.Popen(
                [self._bin / command[0], *command[1:]],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
