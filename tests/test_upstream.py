"""Private names of other packages: each is still there, and they are used through `mobizo_compiler.upstream` alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from mobizo_compiler import upstream

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


def test_none_is_there_for_nothing() -> None:
    text = "\n".join(path.read_text() for path in OURS if path.name != "upstream.py")
    assert not [name for name in upstream.PRIVATE if name not in text]
