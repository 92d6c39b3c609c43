"""The house stays: who may import whom, read from the imports. The rules and their reasons are in docs/structure.py."""

from __future__ import annotations

import re
from pathlib import Path

import networkx as nx
import pytest

from docs import structure
from docs.structure import EXCEPTIONS, FLOORS, FORBIDDEN, ROOMS, Import, Structure, is_in, picture, report, room_of

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def house() -> Structure:
    return Structure()


@pytest.mark.parametrize("kind", ["modules in no room", "circles", "arrows that do not go down", "forbidden arrows"])
def test_no_rule_is_broken(kind: str, house: Structure) -> None:
    assert structure.broken(house)[kind] == []


def test_every_module_on_disk_is_read(house: Structure) -> None:
    files = {path for folder in ("mobizo_compiler", "passes", "backends") for path in (ROOT / folder).rglob("*.py")}
    assert len(house.sources) == len({path.resolve() for path in files})
    assert {"mobizo_compiler", "passes.capture", "backends.xnnpack.backend", "graph", "__main__"} <= set(house.sources)


def test_every_rule_speaks_of_what_there_is(house: Structure) -> None:
    for rule in FORBIDDEN:
        assert len(rule.reason.split()) > 4, rule
        for place in (rule.source, *rule.targets):
            assert any(is_in(module, place) for module in house.sources), f"{place}: no such room or module"
    for edge, reason in EXCEPTIONS.items():
        assert edge in {(found.source, found.target) for found in house.imports} and reason, edge
    assert {room_of(module) for module in house.sources} == set(ROOMS)


def test_rooms_have_a_place_in_the_picture() -> None:
    for floor in FLOORS:
        sides = [side for room in floor for side in (room.middle - room.width / 2, room.middle + room.width / 2)]
        assert sides == sorted(sides) and sides[0] > 0 and sides[-1] < 12, f"rooms overlap: {floor}"


def package(folder: Path, modules: dict[str, str]) -> Structure:
    """A package of the same name with some modules."""
    root = folder / "mobizo_compiler"
    for name, text in modules.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Structure(root)


def test_imports_are_found_wherever_they_are_written(tmp_path: Path) -> None:
    text = """
from typing import TYPE_CHECKING
import torch
import mobizo_compiler.errors
from mobizo_compiler import errors
from mobizo_compiler.errors import MobizoError
if TYPE_CHECKING:
    from mobizo_compiler.graph.program import GraphProgram
try:
    from mobizo_compiler.graph import program
except ImportError:
    pass
class A:
    def f(self):
        from mobizo_compiler import compile
"""
    made = package(
        tmp_path, {"step/a": text, **dict.fromkeys(("errors", "graph/program", "graph/__init__", "__init__"), "")}
    )
    assert made.imports == [
        Import("step.a", "errors", 4, "module"),
        Import("step.a", "errors", 5, "module"),
        Import("step.a", "errors", 6, "module"),
        Import("step.a", "graph.program", 8, "types"),
        Import("step.a", "graph.program", 10, "module"),
        Import("step.a", "mobizo_compiler", 15, "function"),
    ]


def test_relative_imports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SyntaxError, match="whole names"):
        package(tmp_path, {"step/a": "from . import b"})


UP = {
    "device/session": "def f():\n    from mobizo_compiler.compiling.verify import x",
    "compiling/verify": "import mobizo_compiler.text.data",
    "text/data": "",
}


def test_what_breaks_a_rule_is_found_with_the_way(tmp_path: Path) -> None:
    made = package(tmp_path, UP)
    beside, above = made.upward()
    assert beside.startswith("compiling.verify, line 1, imports text.data") and "floor" in beside
    assert above.startswith("device.session, line 2, imports compiling.verify")
    found = made.forbidden()
    assert any(
        text.startswith("device.session -> compiling.verify (") and "needs no compiler" in text for text in found
    )
    assert any(text.startswith("compiling.verify -> text.data (") for text in found)
    assert structure.broken(made)["circles"] == []


def test_a_third_module_does_not_hide_a_rule_that_is_broken(tmp_path: Path) -> None:
    made = package(
        tmp_path,
        {
            "device/session": "from mobizo_compiler.load import load",
            "load": "from mobizo_compiler.backends import get",
            "backends/__init__": "from mobizo_compiler.passes import Capture",
            "passes/__init__": "",
        },
    )
    assert made.upward() == [] and made.circles() == []
    assert [text.partition(" (")[0] for text in made.forbidden()] == ["device.session -> load -> backends -> passes"]


def test_engines_do_not_know_each_other(tmp_path: Path) -> None:
    made = package(tmp_path, {"errors": ""})
    made.modules.add_edge("backends.xnnpack.backend", "backends.vulkan.partition")
    made.sources |= dict.fromkeys(made.modules, "")
    assert [text.rpartition(": ")[2] for text in made.forbidden()] == ["one engine knows nothing of another)"]


def test_circles_and_modules_without_a_room_are_found(tmp_path: Path) -> None:
    made = package(
        tmp_path,
        {
            "graph/a": "from mobizo_compiler.graph.b import x",
            "graph/b": "def f():\n    from mobizo_compiler.graph.a import y",
            "cellar/wine": "",
        },
    )
    assert made.circles() == [["graph.a", "graph.b"]] and made.homeless() == ["cellar.wine"]


def test_rooms_that_import_each_other_are_a_circle(tmp_path: Path) -> None:
    made = package(
        tmp_path,
        {
            "graph/a": "import mobizo_compiler.format.a",
            "graph/b": "",
            "format/a": "",
            "format/b": "import mobizo_compiler.graph.b",
        },
    )
    assert made.circles() == [["format", "graph"]]


def test_the_report_and_the_picture(house: Structure) -> None:
    text = report(house)
    assert re.search(rf"^modules +{len(house.sources)}, [\d,]+ lines$", text, re.MULTILINE)
    for word in ("circles: none", "forbidden arrows: none", "exception: backends -> testing"):
        assert word in text
    drawn = picture(house)
    assert drawn == picture(house) and drawn.startswith(b"<?xml")
    assert nx.transitive_reduction(house.rooms).number_of_edges() == drawn.count(b'id="patch_') - others(house)


def others(house: Structure) -> int:
    """Patches of the picture that are no arrows: rooms, labels of arrows, roof, walls, legend, background."""
    arrows = nx.transitive_reduction(house.rooms).number_of_edges()
    return len(ROOMS) + arrows + 2 + len(structure.LEGEND) + 1


def test_every_room_has_its_paragraph() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    bold = set(re.findall(r"\*\*([\w ]+)/?\*\*", page)) | set(re.findall(r"`(\w+)/`", page))
    assert set(ROOMS) <= bold
