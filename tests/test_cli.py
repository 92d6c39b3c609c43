"""The command line, with plugins that are installed as real packages and broken in every way."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mobizo_compiler import __version__, cli
from mobizo_compiler.backends import backend_names
from mobizo_compiler.cli import machine
from mobizo_compiler.errors import ConfigError

Install = Callable[..., None]
WORKING = "from mobizo_compiler.backends.eager import EagerBackend\nclass Backend(EagerBackend):\n    pass\n"
LONG_REASON = "the driver " + "of-a-device-with-a-very-long-name " * 3 + "libdriver" + "x" * 90 + ".so is missing"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a package with one module that registers a backend under some name."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(package: str, name: str, code: str, version: str = "1.0") -> None:
        (tmp_path / f"{package}.py").write_text(code)
        info = tmp_path / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[mobizo_compiler.backends]\n{name} = {package}:Backend\n")

    return make


def run(*arguments: str, columns: int = 80) -> str:
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": str(columns)}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def listed() -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in json.loads(run("backends", "--json"))}


def test_built_in_backends() -> None:
    rows = listed()
    assert sorted(rows) == sorted(backend_names())
    for name, origin in backend_names().items():
        assert {"distribution": f"mobizo-compiler {__version__}", "loaded_from": origin} in rows[name]["origins"]  # type: ignore[operator]
        assert (rows[name]["reason"] is None) == rows[name]["available"]
    assert rows["eager"]["available"] is True
    assert rows["xnnpack"]["available"] is True
    table = run("backends")
    assert all(re.search(rf"^\s*{name}\s+(yes|no)\b", table, re.MULTILINE) for name in rows)


def test_a_broken_neighbour_is_a_row_with_its_error(install: Install) -> None:
    install("prints_plugin", "prints", "print('noise of a plugin')\n" + WORKING, version="2.5")
    install("missing_plugin", "missing", "import no_such_module\n")
    install("quits_plugin", "quits", "raise SystemExit(3)\n")
    install("other_plugin", "other", "class Backend: pass\n")
    install("raises_plugin", "raises", WORKING + "    def unavailable(self):\n        raise ValueError('oops')\n")
    install("absent_plugin", "absent", WORKING + "    def unavailable(self):\n        return 'no driver [1]'\n")
    rows = listed()
    assert rows["prints"]["available"] is True
    assert rows["prints"]["origins"] == [{"distribution": "prints_plugin 2.5", "loaded_from": "prints_plugin:Backend"}]
    expected = {
        "missing": "no_such_module",
        "quits": "3",
        "other": "not a backend",
        "raises": "ValueError: oops",
        "absent": "no driver [1]",
    }
    for name, reason in expected.items():
        assert rows[name]["available"] is False
        assert reason in str(rows[name]["reason"])
    assert rows["eager"]["available"] is True
    table = run("backends", columns=200)
    assert "noise" not in table
    assert all(reason in table for reason in expected.values()), "brackets are text, not markup"


def test_a_name_that_two_packages_claim(install: Install) -> None:
    install("greedy", "xnnpack", WORKING)
    rows = listed()
    assert [origin["loaded_from"] for origin in rows["xnnpack"]["origins"]] == [  # type: ignore[attr-defined]
        "mobizo_compiler.backends.xnnpack:XnnpackBackend",
        "greedy:Backend",
    ]
    assert rows["xnnpack"]["available"] is False
    assert "claimed" in str(rows["xnnpack"]["reason"])
    assert rows["eager"]["available"] is True, "only the name that is claimed twice is broken"


@pytest.mark.parametrize("columns", [30, 80, 200])
def test_nothing_is_cut_off(install: Install, columns: int) -> None:
    """Names and reasons are wrapped; put together again they are whole."""
    name = "a-backend-whose-name-is-rather-long"
    install("long_plugin", name, WORKING + f"    def unavailable(self):\n        return {LONG_REASON!r}\n")
    table = run("backends", columns=columns)
    assert max(map(len, table.splitlines())) <= columns
    assert "…" not in table
    rule = next(line for line in table.splitlines() if "───" in line)
    rows = table.split(rule)[1].splitlines()
    third = min(len(line) - len(line.lstrip()) for line in rows if line.strip() and line.strip() in LONG_REASON)
    text = "".join(line[third:] for line in rows).replace(" ", "")
    assert LONG_REASON.replace(" ", "") in text
    first = "".join(line[:third].replace(" yes ", "").replace(" no ", "") for line in rows).replace(" ", "")
    assert name in first


def test_version_and_help() -> None:
    assert run("--version") == f"mobizo {__version__}\n"
    assert "backends" in run("--help")
    result = CliRunner().invoke(cli.app, ["no-such-command"])
    assert result.exit_code == 2
    assert "no-such-command" in result.stderr


def test_errors_of_commands_are_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise ConfigError("it is wrong", hint="another")

    monkeypatch.setattr(machine, "list_backends", fails)
    result = CliRunner().invoke(cli.app, ["backends"])
    assert result.exit_code == 1
    assert result.stderr == "[MBZ101] it is wrong\n  try: another\n"


def test_as_a_module_in_a_pipe(install: Install, tmp_path: Path) -> None:
    """In a process of its own, where a plugin can do most harm, the output is JSON and nothing else."""
    install("quits_plugin", "quits", "import sys\nprint('noise')\nsys.exit(3)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "mobizo_compiler", "backends", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    assert {"eager", "quits"} <= {row["name"] for row in json.loads(done.stdout)}
