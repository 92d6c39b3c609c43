"""The structure of the package, read from its imports: figures, rules that are broken, a picture.

    python -m docs.structure    print the figures; exit code 1 if a rule is broken
    python -m docs.generate     write docs/architecture.svg and the tables in docs/architecture.md again

`FLOORS` says where every module lives and `FORBIDDEN` which imports must never be, with reasons. The modules are read,
not run. An import counts wherever it is written: at the top of a file, inside a function, or for types alone. That
Python also runs the `__init__` of every folder on the way to a module is not counted.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import networkx as nx

from mobizo_compiler.drawing import BLUE, GREY, INK, MINT, PALE, SAND, pyplot

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "mobizo_compiler"

ENGINES = tuple(
    f"backends.{init.parent.name}"
    for init in sorted((PACKAGE / "backends").glob("*/__init__.py"))
    if init.parent.name not in ("executorch", "shared_passes")
)


@dataclasses.dataclass(frozen=True)
class Room:
    """A folder, or modules that belong together.

    Args:
        name: What it is called in rules and in the picture.
        modules: Modules and folders in it, without `mobizo_compiler.`.
        middle: Where it is in the picture, from 0 at the left wall to 12 at the right one.
        width: How wide it is there.
        says: What it is for, in a few words.
        colour: Of its walls' inside.
    """

    name: str
    modules: tuple[str, ...]
    middle: float
    width: float
    says: str
    colour: str


_COMPILER, _DEVICE, _BOTH, _OUTSIDE = "#dfe8f5", MINT, "#f3f4f6", SAND
LEGEND = {_BOTH: "what both towers stand on", _COMPILER: "what compiles", _DEVICE: "what runs where data is"}
LEGEND[_OUTSIDE] = "what is entered from outside"

# From the ground up. A room may import what is on lower floors, and nothing beside or above it.
FLOORS: tuple[tuple[Room, ...], ...] = (
    (
        Room(
            "ground",
            ("errors", "options", "optional", "extensions", "late", "quiet", "upstream"),
            6,
            11,
            "errors, checks of options, other packages, extensions by name",
            _BOTH,
        ),
    ),
    (
        Room("quantization", ("quantization",), 3.3, 2.5, "weights in few bits", _BOTH),
        Room("step", ("step",), 7.4, 3.2, "noise, estimators, rules, losses", _BOTH),
    ),
    (
        Room("graph", ("graph",), 5.3, 2.8, "programs, editor, pipeline", _BOTH),
        Room("config", ("config",), 9, 2.2, "what users choose", _BOTH),
    ),
    (Room("format", ("format",), 7.2, 3.2, "what lies in a file", _BOTH),),
    (
        Room("analysis", ("analysis",), 5.1, 2.8, "axes, targets, cuts, costs", _COMPILER),
        Room("drawing", ("drawing",), 8.2, 1.8, "colours of pictures", _BOTH),
        Room("reference", ("reference",), 10.6, 2.2, "the step in PyTorch", _OUTSIDE),
    ),
    (Room("passes", ("passes",), 5.1, 2.8, "the rewrites, one a file", _COMPILER),),
    (Room("backends", ("backends",), 6, 2.8, "contract and registry", _BOTH),),
    (
        Room("executorch", ("backends.executorch",), 1.9, 2.2, "lowering, runtime", _COMPILER),
        Room("shared_passes", ("backends.shared_passes",), 4.4, 2.2, "of several engines", _COMPILER),
        Room("load", ("load",), 7.6, 1.5, "from a file", _BOTH),
    ),
    (
        Room("engines", ENGINES, 2.5, 3.9, ", ".join(engine.rpartition(".")[2] for engine in ENGINES), _COMPILER),
        Room("compiling", ("compiling",), 6.1, 2.6, "methods, checks, cache", _COMPILER),
        Room("device", ("device",), 9.6, 2.6, "sessions, runs, journals", _DEVICE),
    ),
    (
        Room("api", ("api",), 4.6, 1.7, "compile", _COMPILER),
        Room("inspection", ("inspection",), 7.0, 2.2, "files, machines", _OUTSIDE),
        Room("text", ("text",), 9.6, 2.2, "rows into steps", _DEVICE),
    ),
    (
        Room("export_recipe", ("export_recipe",), 2.6, 2.2, "for ExecuTorch's export", _OUTSIDE),
        Room("front door", ("mobizo_compiler",), 6.4, 2.4, "the public names", _OUTSIDE),
    ),
    (
        Room("cli", ("cli", "distributed", "__main__"), 5.6, 2.4, "the command mobizo", _OUTSIDE),
        Room("testing", ("testing",), 9.8, 2.4, "oracle, zoo, contracts", _OUTSIDE),
    ),
)
ROOMS = {room.name: room for floor in FLOORS for room in floor}
LEVEL = {room.name: level for level, floor in enumerate(FLOORS) for room in floor}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Rooms or modules that must not reach others, not even by way of a third.

    Args:
        source: A room, a folder or a module; all that is in it counts.
        targets: What it must not reach, in the same form.
        reason: Why.
    """

    source: str
    targets: tuple[str, ...]
    reason: str


TOP = ("front door", "export_recipe", "cli", "testing")
FORBIDDEN = (
    Rule("step", ("graph", "format", "config"), "what a step is, is said without graphs, files and choices of a user"),
    Rule("quantization", ("graph", "format", "config"), "how a weight is stored is said of tensors alone"),
    Rule("graph", ("format", "analysis", "passes"), "a graph is there before anything is found out about it"),
    Rule(
        "format",
        ("graph.editor", "graph.pipeline", "graph.facts", "analysis", "passes", "backends"),
        "who reads a file wants its data and its graph, not what rewrites graphs",
    ),
    Rule("analysis", ("passes", "backends"), "what is so in a graph does not depend on who asks"),
    Rule("passes", ("backends",), "a rewrite is right on every engine; what one engine needs is a pass of its backend"),
    Rule("backends", ("load", "compiling", "device", "text"), "a backend lowers and runs what it is given"),
    *(
        Rule(engine, tuple(other for other in ENGINES if other != engine), "one engine knows nothing of another")
        for engine in ENGINES
    ),
    Rule("executorch", ENGINES, "what engines share knows none of them"),
    Rule("shared_passes", ENGINES, "what engines share knows none of them"),
    Rule("compiling", ("device", "text"), "two towers: a program is made without running it where the data is"),
    Rule("device", ("passes", "analysis", "compiling", "api"), "two towers: what runs a program needs no compiler"),
    Rule("text", ("passes", "analysis", "compiling", "api"), "rows become steps of a program that is there already"),
    Rule("inspection", ("api", "device", "text"), "a file says what is in it without being compiled or run"),
    *(
        Rule(room, TOP, "who enters by the front door, the terminal or the test tools comes from outside")
        for room in ROOMS
        if room not in TOP
    ),
    Rule("front door", ("export_recipe", "cli", "testing"), "who imports the package needs no terminal, no test tools"),
    Rule("testing", ("cli",), "test tools call the package, not a terminal"),
    Rule("cli", ("testing",), "the command line needs no test tools"),
)
# Imports that break a rule and stay, as (importer, imported): why.
EXCEPTIONS = {
    (
        "backends",
        "testing",
    ): "assert_backend_contract, which older plugins call, imports check_backend when it is called",
}


@dataclasses.dataclass(frozen=True, order=True)
class Import:
    """One module that a statement imports.

    Args:
        source: The importing module, without `mobizo_compiler.` as all names here.
        target: The imported module.
        line: Line of the statement.
        when: "module" at the top of a file, "function" where it runs with a call, "types" under TYPE_CHECKING.
    """

    source: str
    target: str
    line: int
    when: str


@dataclasses.dataclass
class Structure:
    """The modules of a package and what they import.

    Args:
        package: The folder of the package; links in it are followed.
    """

    package: Path = PACKAGE

    def __post_init__(self) -> None:
        """Read all modules."""
        root = self.package.name
        folders = [self.package, *(path for path in sorted(self.package.iterdir()) if path.is_dir())]
        files = {path for folder in folders for path in folder.glob("**/*.py" if folder != self.package else "*.py")}
        self.sources: dict[str, str] = {}
        for path in sorted(files):
            parts = path.relative_to(self.package).with_suffix("").parts
            self.sources[".".join(parts).removesuffix("__init__").rstrip(".") or root] = path.read_text()
        self.imports = sorted({found for module in self.sources for found in self._imports(module)})
        self.modules = nx.DiGraph()
        self.modules.add_nodes_from(self.sources)
        self.modules.add_edges_from((i.source, i.target) for i in self.imports if i.source != i.target)
        for edge in EXCEPTIONS:
            if self.modules.has_edge(*edge):
                self.modules.remove_edge(*edge)
        self.rooms = nx.DiGraph()
        self.rooms.add_nodes_from(room for room in ROOMS if any(room_of(module) == room for module in self.sources))
        for source, target in self.modules.edges:
            ends = room_of(source), room_of(target)
            if ends[0] and ends[1] and ends[0] != ends[1]:
                count = self.rooms.get_edge_data(*ends, default={"count": 0})["count"]
                self.rooms.add_edge(*ends, count=count + 1)

    def _imports(self, module: str) -> Iterator[Import]:
        for node, when in _statements(ast.parse(self.sources[module]), "module"):
            if isinstance(node, ast.Import):
                names = [(alias.name, None) for alias in node.names]
            elif node.level:
                raise SyntaxError(f"{module}, line {node.lineno}: write whole names, not relative imports")
            else:
                names = [(node.module or "", alias.name) for alias in node.names]
            for name, member in names:
                if name.partition(".")[0] == self.package.name:
                    inner = name.partition(".")[2]
                    whole = f"{inner}.{member}".strip(".") if member else inner
                    target = whole if whole in self.sources else inner
                    yield Import(module, target or self.package.name, node.lineno, when)

    def chain(self, source: str, target: str) -> list[str]:
        """The shortest way of imports from a room, a folder or a module to another; empty if there is none."""
        ways = nx.DiGraph(self.modules)
        inside = [module for module in ways if is_in(module, source)]
        ways.add_edges_from(("from", module) for module in inside)
        ways.add_edges_from((module, "to") for module in self.sources if is_in(module, target))
        found = nx.has_path(ways, "from", "to") if inside and "to" in ways else False
        return nx.shortest_path(ways, "from", "to")[1:-1] if found else []

    def homeless(self) -> list[str]:
        """Modules that are in no room."""
        return [module for module in self.sources if room_of(module) is None]

    def circles(self) -> list[list[str]]:
        """Modules that import each other, and rooms that do."""
        graphs = (self.modules, self.rooms)
        return [sorted(part) for graph in graphs for part in nx.strongly_connected_components(graph) if len(part) > 1]

    def upward(self) -> list[str]:
        """Imports from one room to another that is not on a lower floor."""
        found = []
        for item in self.imports:
            source, target = room_of(item.source), room_of(item.target)
            if not source or not target or source == target or (item.source, item.target) in EXCEPTIONS:
                continue
            if LEVEL[target] >= LEVEL[source]:
                floors = f"`{source}`, floor {LEVEL[source]}, is not above `{target}`, floor {LEVEL[target]}"
                found.append(f"{item.source}, line {item.line}, imports {item.target}: {floors}")
        return found

    def forbidden(self) -> list[str]:
        """Ways from a module to another that a rule forbids."""
        found = []
        for rule in FORBIDDEN:
            for target in rule.targets:
                if chain := self.chain(rule.source, target):
                    found.append(f"{' -> '.join(chain)} (`{rule.source}` must not reach `{target}`: {rule.reason})")
        return found

    def arrows(self) -> dict[tuple[str, str], int]:
        """How many modules of one room import how many of another: pairs of modules, by pairs of rooms."""
        return {(source, target): count for source, target, count in self.rooms.edges(data="count")}

    def levels(self) -> dict[str, int]:
        """Of each module, how many imports the longest way down from it has."""
        levels: dict[str, int] = {}
        for module in reversed(list(nx.topological_sort(self.modules))):
            levels[module] = max((levels[target] + 1 for target in self.modules.successors(module)), default=0)
        return levels


def _statements(tree: ast.AST, when: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """The imports under a node of the syntax tree, and when they are run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, when
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _statements(node, "function")
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from _statements(node, "types")
        else:
            yield from _statements(node, when)


def is_in(module: str, place: str) -> bool:
    """Whether a module is in a room, in a folder, or is that module."""
    if place in ROOMS:
        return room_of(module) == place if place != "backends" else module.partition(".")[0] == "backends"
    return module == place or module.startswith(f"{place}.")


def room_of(module: str) -> str | None:
    """The room of a module: the one that names the folder closest to it, or the module itself."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for room in ROOMS.values():
            if ".".join(parts[:length]) in room.modules:
                return room.name
    return None


# -- what is written ---------------------------------------------------------------------------------------------------


def report(structure: Structure) -> str:
    """All figures, for a terminal."""
    written, levels = Counter(item.when for item in structure.imports), structure.levels()
    lines_of = {module: source.count("\n") for module, source in structure.sources.items()}
    longest = max(levels, key=lambda module: levels[module])
    text = [
        f"modules    {len(structure.sources)}, {sum(lines_of.values()):,} lines",
        f"imports    {len(structure.imports)}: {written['module']} at the top of a file, {written['function']} in a "
        f"function, {written['types']} for types alone",
        f"longest    {levels[longest]} imports down from {longest}",
        "",
        "floor  room            modules   lines  imports down  rooms it imports: pairs of modules",
    ]
    for level, floor in reversed(list(enumerate(FLOORS))):
        for room in floor:
            inside = [module for module in structure.sources if room_of(module) == room.name]
            depths = [levels[module] for module in inside] or [0]
            text.append(
                f"{level:5}  {room.name:15} {len(inside):7} {sum(lines_of[module] for module in inside):7,}  "
                f"{min(depths):4} to {max(depths):<4}  {_imported(structure, room)}"
            )
    text.append("")
    for title, found in broken(structure).items():
        text += [f"{title}: {len(found) or 'none'}", *(f"  {item}" for item in found)]
    text += [f"exception: {source} -> {target}: {reason}" for (source, target), reason in EXCEPTIONS.items()]
    return "\n".join(text)


def broken(structure: Structure) -> dict[str, list[str]]:
    """What is wrong, by kind of rule; empty lists where nothing is."""
    return {
        "modules in no room": structure.homeless(),
        "circles": [" <-> ".join(circle) for circle in structure.circles()],
        "arrows that do not go down": structure.upward(),
        "forbidden arrows": structure.forbidden(),
    }


def tables(structure: Structure) -> str:
    """The part of docs/architecture.md that is made from the imports: rooms and their arrows, rules, figures."""
    when, levels = Counter(item.when for item in structure.imports), structure.levels()
    text = [
        f"{len(structure.sources)} modules in {len(structure.rooms)} rooms; {len(structure.imports)} imports of one",
        f"by another: {when['function']} of them inside a function, {when['types']} for types alone. At most",
        f"{max(levels.values())} imports in a row lead down. Circles: {len(structure.circles()) or 'none'}.\n",
        "| floor | room | imports, and how many pairs of modules |",
        "| ---: | --- | --- |",
    ]
    for level, floor in reversed(list(enumerate(FLOORS))):
        text += [f"| {level} | {room.name} | {_imported(structure, room)} |" for room in floor]
    text += ["", "| never | to | because |", "| --- | --- | --- |"]
    sources: dict[tuple[str, str], list[str]] = {}
    for rule in FORBIDDEN:
        an_engine = rule.source in ENGINES
        targets = "another engine" if an_engine else "engines" if rule.targets == ENGINES else ", ".join(rule.targets)
        source = "an engine" if an_engine else "a room below" if rule.targets == TOP else rule.source
        sources.setdefault((targets, rule.reason), []).append(source)
    for (targets, reason), names in sources.items():
        text.append(f"| {', '.join(dict.fromkeys(names))} | {targets} | {reason} |")
    text += [f"\nExcept {source} to {target}: {reason}." for (source, target), reason in EXCEPTIONS.items()]
    return "\n".join(text) + "\n"


def _imported(structure: Structure, room: Room) -> str:
    """The rooms that a room imports, most imports first."""
    arrows = sorted((-count, target) for (source, target), count in structure.arrows().items() if source == room.name)
    return ", ".join(f"{target} {-count}" for count, target in arrows)


# -- the picture -------------------------------------------------------------------------------------------------------

_STOREY, _TALL, _WIDE = 1.18, 0.62, 12.0  # height of a floor and of its rooms, width of the house
_SOFT = "#3d434d"


def picture(structure: Structure, kind: str = "svg") -> bytes:
    """The house: rooms on their floors, and the arrows between them that do not follow from others.

    Args:
        structure: What is drawn.
        kind: "svg" or "png".

    Returns:
        The file, the same bytes each time.
    """
    plt = pyplot("draws the architecture")
    with plt.rc_context({"svg.hashsalt": "architecture", "font.family": "DejaVu Sans"}):
        height = _STOREY * len(FLOORS)
        figure = plt.figure(figsize=(11, 11 * (height + 1.9) / (_WIDE + 1.4)))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(-0.7, _WIDE + 0.7), ylim=(-0.5, height + 1.4))
        axes.axis("off")
        _walls(axes, height, plt)
        counts = structure.arrows()
        for path in _routes(list(nx.transitive_reduction(structure.rooms).edges)):
            _arrow(axes, path, counts[path.ends], plt)
        for level, floor in enumerate(FLOORS):
            for room in floor:
                _room(axes, room, level, plt)
        buffer = BytesIO()
        figure.savefig(buffer, format=kind, dpi=100, metadata={"Date": None} if kind == "svg" else {"Software": None})
        plt.close(figure)
    return buffer.getvalue()


def _bottom(level: int) -> float:
    return level * _STOREY + (_STOREY - _TALL) / 2


def _walls(axes: Any, height: float, plt: Any) -> None:
    roof = [(-0.45, height), (_WIDE / 2, height + 1.3), (_WIDE + 0.45, height)]
    axes.add_patch(plt.Polygon(roof, facecolor="#e9edf3", edgecolor=INK, linewidth=1.6, joinstyle="round"))
    axes.text(_WIDE / 2, height + 0.62, "mobizo_compiler", ha="center", va="center", size=15, weight="bold", color=INK)
    said = "an arrow: imports; its number: pairs of modules; arrows that follow from others are not drawn"
    axes.text(_WIDE / 2, height + 0.24, said, ha="center", va="center", size=8.5, color=_SOFT)
    axes.add_patch(plt.Rectangle((0, 0), _WIDE, height, facecolor="white", edgecolor=INK, linewidth=1.6))
    for level in range(len(FLOORS)):
        if level:
            axes.plot([0, _WIDE], [level * _STOREY] * 2, color="#e3e6ea", linewidth=1, zorder=1)
        axes.text(-0.3, _bottom(level) + _TALL / 2, str(level), ha="center", va="center", size=9, color=GREY)
    axes.plot([-0.7, _WIDE + 0.7], [0, 0], color=INK, linewidth=2.5)
    for number, (colour, said) in enumerate(LEGEND.items()):
        x = 0.15 + 3.05 * number
        axes.add_patch(plt.Rectangle((x, -0.36), 0.28, 0.2, facecolor=colour, edgecolor=BLUE, linewidth=0.8))
        axes.text(x + 0.4, -0.26, said, ha="left", va="center", size=8.5, color=_SOFT)


def _room(axes: Any, room: Room, level: int, plt: Any) -> None:
    from matplotlib.patches import FancyBboxPatch

    left, bottom = room.middle - room.width / 2, _bottom(level)
    style = "round,pad=0,rounding_size=0.09"
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom), room.width, _TALL, boxstyle=style, facecolor=room.colour, edgecolor=BLUE, zorder=4
        )
    )
    axes.text(
        room.middle, bottom + 0.40, room.name, ha="center", va="center", size=10.5, weight="bold", color=INK, zorder=5
    )
    axes.text(room.middle, bottom + 0.17, room.says, ha="center", va="center", size=7.6, color=_SOFT, zorder=5)


@dataclasses.dataclass(frozen=True)
class _Route:
    ends: tuple[str, str]
    points: tuple[tuple[float, float], ...]  # pairs: where a stretch between two floors begins and ends


def _routes(arrows: list[tuple[str, str]]) -> list[_Route]:
    """A way for every arrow that crosses no room, from ports at the bottom of rooms to ports at their top."""
    taken: dict[int, list[float]] = {level: [] for level in range(len(FLOORS))}
    ways: dict[tuple[str, str], list[float]] = {}
    for source, target in sorted(arrows, key=lambda arrow: (LEVEL[arrow[0]] - LEVEL[arrow[1]], arrow)):
        passed = range(LEVEL[source] - 1, LEVEL[target], -1)
        ways[source, target] = _lane(passed, ROOMS[source].middle, ROOMS[target].middle, taken)
        for level, x in zip(passed, ways[source, target], strict=True):
            taken[level].append(x)
    ports: dict[tuple[str, str, int], float] = {}
    for room in ROOMS.values():
        for side in (
            0,
            1,
        ):  # arrows that leave, arrows that arrive: in the order of where they lead, so that none cross
            here = [arrow for arrow in ways if arrow[side] == room.name]
            here.sort(key=lambda arrow: [ROOMS[arrow[0]].middle, *ways[arrow], ROOMS[arrow[1]].middle][1 - 3 * side])
            for number, arrow in enumerate(here):
                ports[(*arrow, side)] = room.middle + room.width * 0.72 * ((number + 0.5) / len(here) - 0.5)
    routes = []
    for (source, target), way in ways.items():
        points = [(ports[source, target, 0], _bottom(LEVEL[source]))]
        for level, x in zip(range(LEVEL[source] - 1, LEVEL[target], -1), way, strict=True):
            points += [(x, _bottom(level) + _TALL), (x, _bottom(level))]
        points.append((ports[source, target, 1], _bottom(LEVEL[target]) + _TALL))
        routes.append(_Route((source, target), tuple(points)))
    return routes


def _lane(passed: range, start: float, end: float, taken: dict[int, list[float]]) -> list[float]:
    """Where an arrow passes each of some floors, between their rooms and other arrows, with few and short bends."""
    blocked = {
        level: [(room.middle - room.width / 2 - 0.15, room.middle + room.width / 2 + 0.15) for room in FLOORS[level]]
        + [(x - 0.18, x + 0.18) for x in taken[level]]
        for level in passed
    }
    places = sorted({start, end, *(edge for blocks in blocked.values() for block in blocks for edge in block)})
    ways: dict[float, tuple[float, list[float]]] = {start: (0.0, [])}  # the best one to each place of the floor above
    for level in passed:
        free = [x for x in places if 0.2 < x < _WIDE - 0.2 and not any(low < x < high for low, high in blocked[level])]
        assert free, f"floor {level} is so full that no arrow passes it: make its rooms narrower"
        ways = {
            x: min((round(cost + _bend(here, x), 6), [*way, x]) for here, (cost, way) in ways.items()) for x in free
        }
    return min((round(cost + _bend(here, end), 6), way) for here, (cost, way) in ways.items())[1]


def _bend(here: float, there: float) -> float:
    return abs(here - there) + (0.5 if abs(here - there) > 0.3 else 0.0)


def _arrow(axes: Any, route: _Route, count: int, plt: Any) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    points, codes = [route.points[0]], [Curve.MOVETO]
    for (x0, y0), (x1, y1) in zip(route.points, route.points[1:], strict=False):
        middle = (y0 + y1) / 2
        points += [(x0, middle), (x1, middle), (x1, y1)]
        codes += [Curve.CURVE4] * 3
    axes.add_patch(
        FancyArrowPatch(
            path=Curve(points, codes),
            arrowstyle="-|>,head_length=5,head_width=2.6",
            color="#5b6c8a",
            linewidth=1.1,
            zorder=2,
            shrinkA=0,
            shrinkB=0,
        )
    )
    (x0, y0), (x1, y1) = route.points[-2:]
    axes.text(
        (x0 + x1) / 2,
        (y0 + y1) / 2,
        str(count),
        ha="center",
        va="center",
        size=7.5,
        color=INK,
        zorder=3,
        bbox={"boxstyle": "round,pad=0.18", "facecolor": "white", "edgecolor": PALE, "linewidth": 0.7},
    )


def main() -> int:
    """Print the figures."""
    structure = Structure()
    print(report(structure))
    return int(any(broken(structure).values()))


if __name__ == "__main__":
    sys.exit(main())
