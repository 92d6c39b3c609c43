"""Cut a step where its lanes begin: what comes before is a method of its own, whose results can be kept.

Given:    %h = embedding(%w, %ids) : f32[rows, 5, 12]     %repeat = repeat(%h, [G, 1, 1])
Result:   input %mobizo_prefix_0 : f32[rows, 5, 12]       %repeat = repeat(%mobizo_prefix_0, [G, 1, 1])
          and, as a program of its own, input %ids, input %mobizo_labels, return prefix_0 = %h
Numbers: exact.

Where rows share the first axis with others, as in %h : f32[5*rows, 12], the input is f32[rows, 5, 12].

No adapter comes before that point, so what a row is there never changes: it is computed once and kept on disk, and
later epochs start from it. With adapters in the last blocks of a network that is most of the work of a step.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import ancestors, operand
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import LABELS_INPUT, PREFIX
from mobizo_compiler.passes.duplicate_lanes import REPEATED

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class AfterPrefix(Pass):
    """Take what comes before the lanes as inputs, in place of the model's."""

    needs = frozenset({facts.LANES, facts.LOSS})
    inputs = "changed"

    def rewrite(self, edit: Editor) -> None:
        """Put one input in the place of every value at the cut."""
        values = cut(edit)
        copies = _copies(edit)
        for index, value in enumerate(values):
            repeated = [copy for copy in copies if operand(copy) is value]
            axis = copies[repeated[0]] if repeated else edit.rows.get(value.name)
            labels, entries = edit.inputs[LABELS_INPUT], _entries_of_a_row(edit, value, axis)
            shape, dtype = value.meta["val"].shape, value.meta["val"].dtype
            kept = (labels.meta["val"].shape[0], entries, *shape[1:]) if entries else shape
            given = edit.add_input(f"{PREFIX}{index}", kept, dtype, before=labels, row_axis=axis)
            for copy in repeated:
                with edit.graph.inserting_before(copy):
                    whole = edit.call(aten.reshape.default, given, [-1, *shape[1:]]) if entries else given
                copy.args = (whole, copy.args[1])
            if value.op == "placeholder":
                edit.replace(value, given)
        for name, node in edit.inputs.items():
            if name != LABELS_INPUT and not name.startswith(PREFIX):
                edit.remove_input(node)


@dataclasses.dataclass(frozen=True)
class Prefix(Pass):
    """Keep what comes before the lanes alone."""

    needs = frozenset({facts.LANES, facts.LOSS})
    breaks = frozenset({facts.LANES, facts.LOSS, facts.SITES})
    outputs = "changed"

    def rewrite(self, edit: Editor) -> None:
        """Return the values at the cut; a value that is an input is copied."""
        outputs = {}
        with edit.graph.inserting_before(edit.graph.output_node()):
            axes = {operand(copy): axis for copy, axis in _copies(edit).items()}
            for index, value in enumerate(cut(edit)):
                if entries := _entries_of_a_row(edit, value, axes.get(value)):
                    sizes = [-1, entries, *value.meta["val"].shape[1:]]
                    outputs[f"prefix_{index}"] = edit.call(aten.reshape.default, value, sizes)
                elif value.op == "placeholder":
                    outputs[f"prefix_{index}"] = edit.call(aten.clone.default, value)
                else:
                    outputs[f"prefix_{index}"] = value
        edit.set_outputs(outputs)
        edit.drop_state()


def cut(edit: Editor) -> list[fx.Node]:
    """The values from which a step can start: what is repeated for the lanes, and inputs that all lanes share.

    Inputs come first, then values in the order of the graph, so that it is one order for any number of lanes. What is
    made of the labels alone is not among them: rows start from one prefix whatever their answers are.
    """
    copies = _copies(edit)
    values = list(dict.fromkeys(operand(copy) for copy in copies if not _of_labels(edit, operand(copy))))
    pending = list(edit.outputs.values())
    needed = set(pending)
    while pending:  # what the step is made of, without what is before the cut
        node = pending.pop()
        for inner in node.all_input_nodes if node not in copies else []:
            if inner not in needed:
                needed.add(inner)
                pending.append(inner)
    inputs = [node for name, node in edit.inputs.items() if name != LABELS_INPUT and (node in needed or node in values)]
    return inputs + [node for node in values if node.op != "placeholder"]


def _of_labels(edit: Editor, value: fx.Node) -> bool:
    """Whether a value is the labels, or made of nothing else that is given."""
    given = {node for node in ancestors([value]) if node.op == "placeholder"} & set(edit.inputs.values())
    return given == {edit.inputs[LABELS_INPUT]}


def _entries_of_a_row(edit: Editor, value: fx.Node, axis: int | None) -> int | None:
    """How many entries of the first axis a row has, where that are several; whatever is repeated has rows outermost."""
    size, rows = value.meta["val"].shape[:1], edit.inputs[LABELS_INPUT].meta["val"].shape[:1]
    if axis != 0 or size == rows:
        return None
    return int(size[0].node.expr / rows[0].node.expr)


def _copies(edit: Editor) -> dict[fx.Node, int]:
    """The calls that repeat rows for the lanes, of those that the losses need, each with the axis of the rows."""
    alive = ancestors(edit.outputs.values())
    named = {node: name for name, node in edit.values.items() if name.startswith(REPEATED)}
    return {node: int(name.rpartition("_axis_")[2]) for node, name in named.items() if node in alive}
