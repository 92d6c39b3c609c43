"""examples/pipeline: the steps of the workflow, run as a runner would run them, on the tiny model that it builds."""

from __future__ import annotations

import doctest
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.pipeline import check
from examples.pipeline.check import violations

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "pipeline"
WORKFLOW = yaml.safe_load((EXAMPLE / "workflow.yml").read_text())
STEPS: list[dict[str, Any]] = WORKFLOW["jobs"]["program"]["steps"]


whole = pytest.mark.slow  # five processes, each of which imports torch and ExecuTorch


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `tools` after all steps but those that install or use actions of others."""
    tools = tmp_path_factory.mktemp("checkout") / WORKFLOW["jobs"]["program"]["defaults"]["run"]["working-directory"]
    shutil.copytree(EXAMPLE, tools, ignore=shutil.ignore_patterns("__pycache__"))
    commands = tools.parent / "bin"  # `mobizo` of this source tree, installed or not
    commands.mkdir()
    (commands / "mobizo").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mobizo_compiler "$@"\n')
    (commands / "mobizo").chmod(0o755)
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = []
    for step in STEPS:
        if "run" in step and step["name"] != "Install":
            done = subprocess.run(
                ["bash", "-eo", "pipefail", "-c", step["run"]],
                cwd=tools,
                env=environment,
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, f"{step['name']}: {done.stdout}{done.stderr}"
            said.append(done.stdout)
    (tools / "said").write_text("".join(said))
    return tools


@whole
def test_the_steps_leave_a_program_and_its_report(tools: Path) -> None:
    upload = next(step["with"] for step in STEPS if "upload-artifact" in step.get("uses", ""))
    assert upload["path"] == "tools/dist"
    assert sorted(path.name for path in (tools / "dist").iterdir()) == ["model.json", "model.pte"]
    said = (tools / "said").read_text()
    assert "within budget" in said and "taken up at 20" in said and "40 steps" in said


@whole
def test_a_budget_that_is_exceeded_stops_the_pipeline(tools: Path) -> None:
    report = json.loads((tools / "dist" / "model.json").read_text())
    budget = json.loads((EXAMPLE / "budget.json").read_text())
    assert violations(report, budget) == []
    tight = {**budget, "file_bytes": {"at_most": 1000}, "parameters": 3, "methods.train_step.delegates": {"at_most": 0}}
    assert [problem.split(" is ")[0] for problem in violations(report, tight)] == [
        "parameters",
        "file_bytes",
        "methods.train_step.delegates",
    ]
    (tools / "tight.json").write_text(json.dumps(tight))
    command = [sys.executable, "check.py", "dist/model.json", "tight.json"]
    done = subprocess.run(command, cwd=tools, capture_output=True, text=True)
    assert done.returncode == 1 and "parameters is 144, not 3" in done.stdout


def test_the_example_in_the_docstring() -> None:
    done = doctest.testmod(check)
    assert (done.attempted, done.failed) == (1, 0)


def test_what_the_workflow_uses_is_there() -> None:
    commands = "\n".join(step.get("run", "") for step in STEPS)
    for script in ("build.py", "check.py", "try_out.py", "budget.json"):
        assert script in commands and (EXAMPLE / script).exists()
    assert all("@v" in step["uses"] for step in STEPS if "uses" in step), "actions are pinned to a version"
