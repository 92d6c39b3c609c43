"""Pictures, drawn by matplotlib, which is optional: the course of a run, and a program beside its inference graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobizo_compiler.analysis.costs import si
from mobizo_compiler.drawing import BLUE, GREEN, GREY, INK, MINT, ORANGE, PALE, SAND, check_format, pyplot, write_figure
from mobizo_compiler.errors import ConfigError
from mobizo_compiler.extensions import spelled
from mobizo_compiler.format.manifest import Block, Manifest
from mobizo_compiler.optional import optional

_LIGHT_BYTES = 1024


def draw_program(manifest: Manifest, path: Path) -> None:
    """The captured graph beside the training step it became, block by block.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ConfigError: The program has no outline, or the format is unknown.
    """
    check_format(path)
    if not manifest.outline:
        raise ConfigError("the program does not say what blocks its model has, so there is nothing to draw")
    plt = pyplot("a drawing")
    plt.rcParams["svg.hashsalt"] = "mobizo"
    blocks = _drawn_blocks(manifest.outline)
    drawing = _Drawing(plt, len(blocks) + 4)
    drawing.inference(manifest, blocks)
    drawing.step(manifest, blocks)
    write_figure(drawing.figure, path, dpi=130)
    plt.close(drawing.figure)


def _drawn_blocks(outline: Sequence[Block]) -> list[Block]:
    """What has hardly any weights and is there once (masks, positions) is drawn as one, where the first of it is."""
    light = [b for b in outline if not b.multiply_adds and b.parameter_bytes < _LIGHT_BYTES and b.lanes == "none"]
    if len(light) < 2:
        return list(outline)
    names = ", ".join(block.name for block in light)
    calls = sum(block.calls for block in light)
    merged = Block("masks, positions and the like", names, 1, calls, 0, 0, {}, "none")
    return [merged if block is light[0] else block for block in outline if block not in light[1:]]


class _Drawing:
    """Two columns of boxes, from the top down; the unit of both axes is the height of a row."""

    LEFT, RIGHT, WIDTH, HEIGHT = 0.2, 7.1, 5.3, 0.66
    STATE = 13.6

    def __init__(self, plt: Any, rows: int) -> None:
        self._patches = optional("matplotlib.patches", "a drawing")
        self.figure, self._axes = plt.subplots(figsize=(12.4, 0.72 * (rows + 1.6)), layout="constrained")
        self._axes.set(xlim=(0, 16.8), ylim=(rows + 0.7, -1.3))
        self._axes.axis("off")

    def inference(self, manifest: Manifest, blocks: Sequence[Block]) -> None:
        """The column of the captured graph."""
        self._title(self.LEFT, "inference, as captured", f"of {_sizes(manifest)}")
        names = ", ".join(spec.name for spec in manifest.inputs)
        self._box(self.LEFT, 0, "inputs", names, face="white")
        for row, block in enumerate(blocks, start=1):
            self._arrow(self.LEFT, row - 1, row)
            self._box(self.LEFT, row, _named(block), _described(block))
        last = len(blocks) + 1
        self._arrow(self.LEFT, last - 1, last)
        self._box(self.LEFT, last, "outputs", ", ".join(spec.name for spec in manifest.outputs), face="white")

    def step(self, manifest: Manifest, blocks: Sequence[Block]) -> None:
        """The column of the training step, with its state and noise."""
        zo, lora = manifest.zo, manifest.lora
        lanes = f"{zo.lanes} lanes of every row"
        self._title(self.RIGHT, "train_step", f"of {_sizes(manifest)}, {lanes}")
        self._box(self.RIGHT, 0, "inputs", "the same, and labels", face="white")
        begun = False
        adapted = []
        for row, block in enumerate(blocks, start=1):
            self._arrow(self.RIGHT, row - 1, row, wide=begun)
            inside = block.lanes != "none"
            self._box(self.RIGHT, row, _named(block), _adapted(block) or _times(block, zo.lanes), lanes=inside)
            if inside and not begun and block.multiply_adds:
                begun = True
                self._mark(row, block.lanes == "some", zo.lanes)
            adapted += [row] * bool(block.adapters)
        row = len(blocks) + 1
        ending = [
            ("loss of every lane", manifest.loss["name"], True),
            ("projected gradient", f"{zo.queries} numbers, {spelled(zo.to_json()['estimator'])} estimate", False),
            ("update of B", "by the noise of every lane, as the gradient says", False),
        ]
        for offset, (name, text, wide) in enumerate(ending):
            self._arrow(self.RIGHT, row + offset - 1, row + offset, wide=offset < 2, shadow=offset < 1)
            self._box(self.RIGHT, row + offset, name, text, face=SAND, lanes=wide)
        top, bottom = (min(adapted) if adapted else 1), row + 2
        middle = (top + bottom - 1) / 2
        state = f"{manifest.parameters:,} numbers, r {lora.r}"
        noise, kept = middle - 0.9, middle + 0.5
        self._box(self.STATE, noise, "noise z", f"{zo.noise}, from the seed", face=SAND, width=3.0)
        self._box(self.STATE, kept, "state: B of all adapters", state, face=MINT, width=3.0)
        for target in adapted:
            self._curve((self.STATE, noise), (self.RIGHT + self.WIDTH + 0.18, target - 0.1), ORANGE)
            self._curve((self.STATE, kept), (self.RIGHT + self.WIDTH + 0.18, target + 0.1), GREEN)
        self._curve((self.RIGHT + self.WIDTH, bottom), (self.STATE + 1.5, kept + self.HEIGHT / 2), GREEN)
        self._axes.text(self.STATE + 0.6, bottom - 0.1, "new B", fontsize=8, color=GREEN)

    def _title(self, x: float, title: str, text: str) -> None:
        self._axes.text(x, -0.95, title, fontsize=13, fontweight="bold", color=INK)
        self._axes.text(x, -0.6, text, fontsize=9, color=GREY)

    def _box(
        self, x: float, row: float, title: str, text: str, face: str = PALE, lanes: bool = False, width: float = WIDTH
    ) -> None:
        for shift in (0.16, 0.08) if lanes else ():
            self._rectangle(x + shift, row - shift, width, face)
        self._rectangle(x, row, width, face)
        room = int(width * 13)
        self._axes.text(x + 0.15, row - 0.1, title, fontsize=10, fontweight="bold", color=INK, va="center")
        self._axes.text(x + 0.15, row + 0.19, _within(text, room), fontsize=8, color="#40464f", va="center")

    def _rectangle(self, x: float, row: float, width: float, face: str) -> None:
        box = self._patches.FancyBboxPatch(
            (x, row - self.HEIGHT / 2),
            width,
            self.HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=face,
            edgecolor=BLUE,
            linewidth=0.9,
        )
        self._axes.add_patch(box)

    def _arrow(self, x: float, above: int, below: int, wide: bool = False, shadow: bool = True) -> None:
        for shift in (-0.25, 0.0, 0.25) if wide else (0.0,):
            middle = x + self.WIDTH / 2 + shift
            self._axes.annotate(
                "",
                (middle, below - self.HEIGHT / 2 - (0.16 if wide and shadow else 0)),
                (middle, above + self.HEIGHT / 2),
                arrowprops={"arrowstyle": "-|>", "color": BLUE, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0},
            )

    def _curve(self, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.0, "connectionstyle": "arc3,rad=0.08"}
        self._axes.annotate("", end, start, arrowprops=style)

    def _mark(self, row: int, inside: bool, lanes: int) -> None:
        """Where rows are repeated: before a block, or in it."""
        y = row - self.HEIGHT / 2 + 0.02 if inside else row - 0.5
        self._axes.plot([self.RIGHT - 1.35, self.RIGHT], [y, y], "--", color=ORANGE, linewidth=1.4)
        where = "in here" if inside else "from here"
        text = f"rows x {lanes}\n{where}"
        self._axes.text(self.RIGHT - 1.35, y - 0.06, text, fontsize=8, color=ORANGE, va="bottom")


def _named(block: Block) -> str:
    return f"{block.name}  x {block.count}" if block.count > 1 else block.name


def _described(block: Block) -> str:
    parts = [block.kind, f"{block.calls} operator{'s' * (block.calls != 1)}"]
    parts += [f"{si(block.parameter_bytes)}B"] * bool(block.parameter_bytes)
    parts += [f"{si(block.multiply_adds)} multiply-adds"] * bool(block.multiply_adds)
    return ", ".join(part for part in parts if part)


def _adapted(block: Block) -> str:
    if not block.adapters:
        return ""
    return "adapters with noise: " + ", ".join(block.adapter_names)


def _times(block: Block, lanes: int) -> str:
    return {"none": "once, for all lanes", "some": "partly in every lane", "all": f"in each of {lanes} lanes"}[
        block.lanes
    ]


def _sizes(manifest: Manifest) -> str:
    shape = manifest.inputs[0].shape
    return f"[{', '.join(str(size) for size in shape)}]"


def _within(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 3].rstrip(", ") + "..."
