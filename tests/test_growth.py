"""Work on graphs and tables grows with their size, and not with its square: calls are counted, not seconds."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mobizo_compiler import CausalLMLoss, LoraConfig, MSELoss, passes
from mobizo_compiler.analysis.axes import row_axes
from mobizo_compiler.analysis.ranges import check_lookups, input_ranges
from mobizo_compiler.analysis.targets import find_targets
from mobizo_compiler.graph import Editor, GraphProgram, Pipeline, parse, program_text
from mobizo_compiler.text.answers import AnswerRows, Encoded
from mobizo_compiler.text.batch_shape import BatchShape
from mobizo_compiler.text.data import TextData
from mobizo_compiler.text.evaluation import auc
from mobizo_compiler.text.prompts import PromptConfig, samples, split
from mobizo_compiler.text.rows import read_rows
from mobizo_compiler.text.speller import Speller

aten = torch.ops.aten
TIMES = 4
MOST = 5.0  # what is linear makes at most four times as many calls, what is quadratic comes to sixteen


def calls(run: Callable[[], object]) -> int:
    """How many functions are called, of Python and of C."""
    count = 0

    def count_calls(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count_calls)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def growth(make: Callable[[int], Any], run: Callable[[Any], object], size: int) -> float:
    """By what factor the calls grow where the input is `TIMES` as large."""
    few, many = (calls(functools.partial(run, made)) for made in (make(size), make(TIMES * size)))
    return many / max(few, 50)


def test_a_square_is_noticed() -> None:
    assert growth(range, len, 50) <= 1
    assert growth(range, lambda numbers: [number.bit_length() for number in numbers], 50) == pytest.approx(4, abs=0.2)
    assert growth(range, lambda numbers: [a.bit_length() for a in numbers for _ in numbers], 50) > 15


# -- graphs ------------------------------------------------------------------------------------------------------------


def graph(lines: list[str], last: str, head: str = "input %x: f32[rows, 6, 8]", weights: int = 0) -> GraphProgram:
    tensors = [f"tensor %p_{index}_weight: f32[8, 8]" for index in range(weights)]
    return parse("\n".join([head, *tensors, *lines, f"return output_0 = %{last}"]))


@functools.cache
def layers(count: int) -> GraphProgram:
    """Blocks of two layers that read one value, with views and a residual sum."""
    lines, x = [], "x"
    for i in range(count):
        lines += [f"%q_{i} = linear(%{x}, %p_{2 * i}_weight)", f"%k_{i} = linear(%{x}, %p_{2 * i + 1}_weight)"]
        lines += [f"%t_{i} = mul.Tensor(%q_{i}, %k_{i})", f"%s_{i} = add.Tensor(%t_{i}, %{x})"]
        lines += [f"%a_{i} = transpose.int(%s_{i}, 1, 2)", f"%b_{i} = transpose.int(%a_{i}, 1, 2)"]
        x = f"b_{i}"
    return graph(lines, x, weights=2 * count)


def diamonds(count: int) -> GraphProgram:
    lines, x = [], "x"
    for i in range(count):
        lines += [f"%l_{i} = mul.Tensor(%{x}, 2.0)", f"%r_{i} = tanh(%{x})", f"%d_{i} = add.Tensor(%l_{i}, %r_{i})"]
        x = f"d_{i}"
    return graph(lines, x)


def star(count: int) -> GraphProgram:
    """One value with many users, some of them equal, which one call joins."""
    lines = ["%v = tanh(%x)", *(f"%a_{i} = mul.Tensor(%v, {i // 2}.0)" for i in range(count))]
    return graph([*lines, f"%c = cat([{', '.join(f'%a_{i}' for i in range(count))}], -1)"], "c")


def indices(count: int) -> GraphProgram:
    lines, x = [], "ids"
    for i in range(count):
        lines += [f"%l_{i} = add.Tensor(%{x}, 1)", f"%c_{i} = clamp(%l_{i}, 0, 7)", f"%m_{i} = minimum(%l_{i}, %c_{i})"]
        x = f"m_{i}"
    return graph([*lines, f"%e = embedding(%p_0_weight, %{x})"], "e", "input %ids: i64[rows, 6]", weights=1)


def after(make: Callable[[int], GraphProgram], *steps: passes.Pass) -> Callable[[int], GraphProgram]:
    return functools.cache(lambda count: Pipeline(list(steps)).run(make(count)))


def with_loss(make: Callable[[int], GraphProgram], loss: Any) -> Callable[[int], GraphProgram]:
    return after(make, passes.AttachLoss(loss), passes.Canonicalize(), passes.FreeRows())


def edited(make: Callable[[int], GraphProgram]) -> Callable[[int], Editor]:
    return lambda count: Editor(make(count))


def changed(edit: Editor) -> GraphProgram:
    """Every operation of an editor, for every node."""
    for index, node in enumerate(edit.calls(aten.mul.Tensor)):
        with edit.graph.inserting_before(node):
            edit.replace(node, edit.call(aten.add.Tensor, *node.args))
        edit.add_constant(f"constant_{index}", torch.zeros(2))
        edit.shared_constant("one", torch.ones(1))
        edit.remove_input(edit.add_input(f"given_{index}", (2, 3), torch.float32))
    edit.refresh()
    return edit.finish(edit.before.facts, edit.before.history)


LORA = LoraConfig(r=2, target_modules="all-linear")
JOINED = with_loss(layers, MSELoss())
ADAPTED = after(JOINED, passes.InsertMPLoRA(LORA))
LANES = after(ADAPTED, passes.MergeSiblings(), passes.DuplicateLanes(2))
FIXED = after(LANES, passes.Specialize(2))
ONE_TOKEN = with_loss(diamonds, CausalLMLoss(max_labels=1))


def run(*steps: passes.Pass) -> Callable[[GraphProgram], object]:
    return Pipeline(list(steps)).run


def axes(edit: Editor) -> object:
    return row_axes(edit.graph, edit.rows, None, edit.tensors)


def lookups(program: GraphProgram) -> object:
    return input_ranges(program), check_lookups(program, [torch.zeros(2, 6, dtype=torch.int64)])


GRAPHS: dict[str, tuple[Callable[[int], Any], Callable[[Any], object], int]] = {
    "parse": (lambda count: program_text(layers(count)), parse, 10),
    "print": (layers, program_text, 30),
    "print a star": (star, program_text, 50),
    "edit": (edited(layers), changed, 10),
    "axes": (edited(layers), axes, 20),
    "axes of diamonds": (edited(diamonds), axes, 20),
    "axes of a star": (edited(star), axes, 50),
    "targets": (edited(layers), find_targets, 30),
    "ranges": (indices, lookups, 50),
    "canonicalize": (layers, run(passes.Canonicalize()), 30),
    "canonicalize a star": (star, run(passes.Canonicalize()), 50),
    "hoist picks": (ONE_TOKEN, run(passes.HoistPicks()), 20),
    "slice outputs": (JOINED, run(passes.SliceOutputs()), 30),
    "insert adapters": (JOINED, run(passes.InsertMPLoRA(LORA)), 10),
    "merge siblings": (ADAPTED, run(passes.MergeSiblings()), 10),
    "prefix": (LANES, run(passes.Prefix()), 10),
    "after the prefix": (LANES, run(passes.AfterPrefix()), 10),
    "tidy": (FIXED, run(passes.Tidy()), 10),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_work_on_a_graph_is_linear(name: str) -> None:
    make, work, size = GRAPHS[name]
    assert growth(make, work, size) < MOST


# -- text --------------------------------------------------------------------------------------------------------------

PROMPT = PromptConfig(template="Message: {text} Tone:", choices=("happy", "sad"))
LAYOUT = BatchShape(2, 12, 12, ("input_ids",), 22, None, 1, None)


@pytest.mark.parametrize("form", ["csv", "tsv", "quoted tsv", "jsonl"])
def test_reading_a_table_is_linear(form: str, tmp_path: Path) -> None:
    rows = {"csv": "a day {0},happy", "tsv": "a day {0}\thappy", "quoted tsv": '"a\nday {0}"\thappy'}
    rows["jsonl"] = '{{"text": "a day {0}", "label": "happy"}}'

    def table(count: int) -> Path:
        path = tmp_path / f"{count}.{form.split()[-1]}"
        head = {"csv": ["text,label"], "jsonl": []}.get(form, ["text\tlabel"])
        path.write_text("\n".join([*head, *(rows[form].format(index) for index in range(count))]))
        return path

    assert growth(table, read_rows, 100) < MOST


def test_making_samples_of_rows_is_linear(tmp_path: Path, words: Any) -> None:
    def table(count: int) -> Any:
        path = tmp_path / f"{count}.csv"
        lines = (f"a day {'the ' * (i % 5)},{('happy', 'sad')[i % 2]}\n" for i in range(count))
        path.write_text("text,answer\n" + "".join(lines))
        return read_rows(path)

    def encoded(rows: Any) -> object:
        training, validation = split(samples(rows, PROMPT), 0.2, 0)
        maker = AnswerRows(training, LAYOUT, Speller(words), PROMPT)
        return [maker.row(sample) for sample in (*training, *validation)]

    assert growth(table, encoded, 60) < MOST


@pytest.mark.parametrize("balanced", [False, True])
def test_an_epoch_of_batches_is_linear(balanced: bool) -> None:
    """Also where there are as many choices as a table of that size has."""

    def data(count: int) -> TextData:
        names = tuple(f"choice {index}" for index in range(count // 5))
        rows = tuple(Encoded((1, 2, 3), 1, index % len(names), 0) for index in range(count))
        return TextData(rows, LAYOUT, names, (), 0, PROMPT)

    def epoch(data: TextData) -> None:
        batch = data.batches(0, balanced)
        for step in range(len(data) // LAYOUT.rows):
            batch(step)

    assert growth(data, epoch, 100) < MOST


def test_the_area_under_a_curve_is_linear() -> None:
    assert growth(lambda count: (torch.rand(count), torch.arange(count) % 2), lambda pair: auc(*pair), 500) < MOST
