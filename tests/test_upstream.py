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

program = mobizo.load(sys.argv[1])
session = mobizo.Session(program)
ids = torch.ones(2, 12, dtype=torch.int64)
given = {spec.name: ids for spec in program.manifest.inputs}
assert not [name for name in sys.modules if name.startswith("executorch.exir")]
heavy = {"torch._dynamo", "torch._inductor", "torchao", "sympy", "transformers"} & set(sys.modules)
assert not heavy, heavy

# The exporter is there for who wants it afterwards.
import executorch.exir.schema
import executorch.exir._warnings
from executorch.exir import to_edge
from executorch.exir._serialize import _serialize_pte_binary
assert executorch.exir.schema.Program and executorch.exir._warnings.ExperimentalWarning
exported = torch.export.export(torch.nn.Linear(2, 3), (torch.ones(1, 2),))
open(sys.argv[2], "wb").write(to_edge(exported).to_executorch().buffer)
from executorch.runtime import Runtime
assert Runtime.get().load_program(sys.argv[2]).load_method("forward").execute([torch.ones(1, 2)])[0].shape == (1, 3)
mobizo.Session(mobizo.load(sys.argv[1])).evaluate(given)
"""


def test_who_only_runs_a_program_does_not_import_the_exporter(tiny_program: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ONLY_RUNS, tiny_program, tmp_path / "other.pte"], check=True)


def test_a_runtime_that_needs_the_exporter_gets_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package like ExecuTorch, of which a later version needs a name of the package that was left out."""
    package = tmp_path / "enginetorch"
    for name, text in {
        "__init__": "",
        "runtime": "from enginetorch.exporter import needed",
        "exporter/__init__": "import enginetorch.heavy\nfrom enginetorch.exporter._warnings import warned\nneeded = 1",
        "exporter/_warnings": "warned = 2",
        "heavy": "",
    }.items():
        file = package / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(upstream, "_EXPORTER", ("enginetorch.exporter",))
    monkeypatch.setattr(upstream, "_WITHOUT_THE_EXPORTER", ("enginetorch.runtime",))
    found = upstream._import_apart()
    assert found["enginetorch.runtime"].needed == 1 and "enginetorch.heavy" in sys.modules
    for name in [name for name in sys.modules if name.startswith("enginetorch")]:
        del sys.modules[name]


def test_nobody_silences_the_whole_process() -> None:
    """Logs and warnings are held back by `mobizo_compiler.quiet`, of the calls of one thread."""
    others = [path for folder in ("docs", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    switch = re.compile(r"logging\.disable\(|warnings\.(filterwarnings|simplefilter)\(")
    assert not [path for path in (*OURS, *others) if switch.search(path.read_text())]
