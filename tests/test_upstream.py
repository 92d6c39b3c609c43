"""Private names of other packages: each is still there, and they are used through `mobizo_compiler.upstream` alone."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mobizo_compiler as mobizo
from mobizo_compiler import upstream

# Also what a private name warns of inside of its own package: it is about to go. Exceptions, each with its reason:
FILTERS = (
    "error::DeprecationWarning",
    "error::FutureWarning",
    "ignore:(read|open)_text is deprecated:DeprecationWarning",  # how executorch reads its own table of operators
    "ignore:invalid escape sequence:DeprecationWarning",  # in torchao, when its source is compiled
    "ignore:This API is experimental:DeprecationWarning",  # what executorch says of its whole runtime
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",  # what torch makes of its own modules
)
pytestmark = [pytest.mark.filterwarnings(line) for line in FILTERS]
ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "executorch", "transformers", "torchao", "peft", "safetensors", "datasets", "matplotlib")
OURS = [p for folder in ("mobizo_compiler", "passes", "backends") for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("name", upstream.PRIVATE)
def test_a_private_name_is_still_there(name: str) -> None:
    place = upstream.PRIVATE[name]
    try:
        found = getattr(upstream, name)
    except ImportError as error:
        pytest.fail(f"without {place.module}.{place.name} this breaks: {place.breaks}\n{error}")
    assert found is getattr(upstream, name) and found is not None


def test_one_that_is_gone_is_an_error_that_says_what_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(upstream.PRIVATE, "gone", upstream.Private("torch._ops", "Gone", "the moon"))
    monkeypatch.setitem(upstream.PRIVATE, "away", upstream.Private("torch._nowhere", "", "the sun"))
    for name, said in (("gone", r"torch\._ops\.Gone is not(.*)version of torch(.*)for the moon"), ("away", "the sun")):
        with pytest.raises(ImportError, match=said):
            getattr(upstream, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = upstream.nothing


@pytest.mark.parametrize("name", upstream.MEMBERS)
def test_a_private_attribute_is_still_there(name: str) -> None:
    place = upstream.MEMBERS[name]
    owner = getattr(importlib.import_module(place.module), place.name)
    assert f"self.{name}" in inspect.getsource(owner), f"without it this breaks: {place.breaks}"


def test_an_attribute_that_is_gone_is_an_error_that_says_what_for() -> None:
    owner = SimpleNamespace(_method=1)
    upstream.set_member(owner, "_method", 2)
    assert upstream.member(owner, "_method") == 2
    for use in (upstream.member, lambda *where: upstream.set_member(*where, None)):
        with pytest.raises(ImportError, match=r"ProgramManager\._pte_data is not(.*)version of executorch(.*)checksum"):
            use(owner, "_pte_data")
    assert not hasattr(owner, "_pte_data")


def private(path: str) -> bool:
    parts = path.split(".")
    return parts[0] in PACKAGES and any(part.startswith("_") and not part.endswith("__") for part in parts[1:])


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def uses(tree: ast.AST) -> Iterator[str]:
    """Names of other packages as a module writes them, imported or as attributes of imported modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield dotted(node)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def test_nobody_else_uses_one() -> None:
    assert len(OURS) > 100
    found = [f"{path.relative_to(ROOT)}: {use}" for path in OURS for use in uses(ast.parse(path.read_text()))]
    assert len(found) > 1000
    assert not [use for use in found if private(use.partition(": ")[2])], "see mobizo_compiler/upstream.py"
    attributes = [
        f"{path.relative_to(ROOT)}: {ast.unparse(node)}"
        for path in OURS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in upstream.MEMBERS and ast.unparse(node.value) != "self"
    ]
    assert not attributes, "see mobizo_compiler/upstream.py"


def test_none_is_there_for_nothing() -> None:
    text = "\n".join(path.read_text() for path in OURS if path.name != "upstream.py")
    assert not [name for name in upstream.PRIVATE if name not in text]
    assert not [name for name in upstream.MEMBERS if f'"{name}"' not in text]


ONLY_RUNS = """
import sys
import torch
import mobizo_compiler as mobizo

program = mobizo.load("program.pte")
session = mobizo.Session(program)
ids = torch.arange(6).reshape(2, 3)
before = session.train_step((ids,), ids, seed=1, learning_rate=0.1, eps=0.1).lane_losses
heavy = {"executorch.exir", "torch._dynamo", "torch._inductor", "torchao", "sympy", "transformers"} & set(sys.modules)
assert not heavy, heavy

# The exporter is there for who wants it afterwards.
model = torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11)).eval()
lora = mobizo.LoraConfig(r=2, lora_alpha=4, target_modules=("1",))
mobizo.compile(model, (ids,), lora, mobizo.ZOConfig(queries=2), backend="portable").save("again.pte")
import executorch.exir._warnings
import executorch.runtime
from executorch.exir import to_edge
from executorch.exir._serialize import _serialize_pte_binary
again = mobizo.Session(mobizo.load("again.pte"))
assert again.train_step((ids,), ids, seed=1, learning_rate=0.1, eps=0.1).lane_losses.shape == before.shape
"""


def test_who_only_runs_a_program_does_not_import_the_exporter(tmp_path: Path) -> None:
    ids = torch.arange(6).reshape(2, 3)
    model = torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11)).eval()
    lora = mobizo.LoraConfig(r=2, lora_alpha=4, target_modules=("1",))
    mobizo.compile(model, (ids,), lora, mobizo.ZOConfig(queries=2), backend="portable").save(tmp_path / "program.pte")
    subprocess.run([sys.executable, "-c", ONLY_RUNS], cwd=tmp_path, check=True)


def test_packages_are_as_they_were_after_an_import_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    exir = importlib.import_module("executorch.exir")
    with upstream.without_the_exporter():  # which is there, and so it stays
        assert sys.modules["executorch.exir"] is exir
    for name in [name for name in sys.modules if name.partition(".")[2].startswith("exir")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys.modules["executorch"], "exir", exir)  # put back at the end
    with pytest.raises(RuntimeError, match="in between"), upstream.without_the_exporter():
        assert not hasattr(importlib.import_module("executorch.exir"), "to_edge")
        assert importlib.import_module("executorch.exir._warnings").ExperimentalWarning
        raise RuntimeError("in between")
    assert "executorch.exir" not in sys.modules and "executorch.exir._serialize" not in sys.modules
    assert not hasattr(sys.modules["executorch"], "exir")


def test_nobody_silences_the_whole_process() -> None:
    """Logs and warnings are held back by `mobizo_compiler.quiet`, of the calls of one thread."""
    others = [path for folder in ("docs", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    switch = re.compile(r"logging\.disable\(|warnings\.(filterwarnings|simplefilter)\(")
    assert not [path for path in (*OURS, *others) if switch.search(path.read_text())]
