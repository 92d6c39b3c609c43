"""With Flower itself, in an environment of its own: processes that are killed, and the simulation engine."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("flower")]


@pytest.fixture(scope="session")
def python() -> Path:
    """The Python of an environment with Flower, made where it is missing."""
    from environment import ROOT, make_environment

    return make_environment(ROOT / "build" / "flower-env")


def run(python: Path, script: str, *arguments: object) -> str:
    """What a script prints; it must end well, which is where it checks that all states are the same."""
    command = [str(python), str(HERE / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("protocol", ["journals", "directions"])
def test_processes_that_are_killed(protocol: str, python: Path, tmp_path: Path) -> None:
    """Two clients in a round and the server in another: the state is that of a replay and of the calm federation."""
    options = ("--kill", "--clients", 5, "--rounds", 6, "--queries", 2, "--timeout", 90, "--protocol", protocol)
    text = run(python, "run_processes.py", *options, "--output", tmp_path / "run")
    assert text.count("killed in round") == 3 and "server killed" in text
    assert "clients with the state of a replay of their rounds: 5 of 5" in text


def test_many_clients_in_a_simulation(python: Path, tmp_path: Path) -> None:
    """All answer, and each has the server's state at the end."""
    text = run(python, "run_simulation.py", "--clients", 40, "--rounds", 2, "--output", tmp_path / "run")
    assert len(re.findall(r"round \d: 40 clients", text)) == 2
    assert "clients with all rounds: 40 of 40" in text
