"""What Vulkan's partitioner takes and its runtime gets wrong, as one rule each.

Every rule was seen to break a program on a Vulkan device or a software implementation of one, or is written in the
sources of the runtime (ExecuTorch 1.5.1). Some break when a program is loaded, some abort the process, and some
compute other numbers without a word; so all are looked for before a delegate is made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import executorch.backends.vulkan.utils as vulkan_utils
from executorch.backends.vulkan.patterns.quantized_linear import QuantizedLinearMatch, find_quantized_linear_patterns
from executorch.backends.vulkan.patterns.rms_norm import find_rms_norm_patterns
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch import Tensor, fx
from torch.export import ExportedProgram

from mobizo_compiler.backends.vulkan.operators import name_of
from mobizo_compiler.errors import BackendRefusedError
from mobizo_compiler.graph.nodes import source_line

Finding = tuple[fx.Node | None, str]


@dataclasses.dataclass(frozen=True)
class Delegated:
    """What is about to become a delegate.

    Args:
        exported: The program in the edge dialect, with its tags.
        calls: The calls that have a tag.
        specs: The compile specs of the delegate.
    """

    exported: ExportedProgram
    calls: tuple[fx.Node, ...]
    specs: tuple[CompileSpec, ...]

    def is_constant(self, node: object) -> bool:
        """Whether a node is a weight, or a view or conversion of one, that goes into the delegate."""
        if not isinstance(node, fx.Node):
            return False
        placeholder, _ = vulkan_utils.trace_args_until_placeholder(node)
        return placeholder is not None and "delegation_tag" in placeholder.meta

    def quantized_linears(self) -> Iterator[QuantizedLinearMatch]:
        """The products with quantized weights that the delegate has a kernel for."""
        for node in self.calls:
            match = find_quantized_linear_patterns(node)
            if match is not None:
                yield match


Rule = Callable[[Delegated], Iterator[Finding]]


@dataclasses.dataclass(frozen=True)
class Violation:
    """A rule that a delegate would break, and where.

    Args:
        rule: Name of the rule.
        where: Node and the user's source line.
        problem: What the runtime would do.
        hint: What to do about it.
    """

    rule: str
    where: str
    problem: str
    hint: str


def negative_gather_axis(program: Delegated) -> Iterator[Finding]:
    """The kernel takes a negative axis for another axis."""
    for node in _named(program, "gather"):
        axis = node.args[1]
        if isinstance(axis, int) and axis < 0:
            yield node, f"gather along axis {axis} gives wrong numbers: the kernel does not count axes from the end"


def batched_4bit_linear(program: Delegated) -> Iterator[Finding]:
    """The kernel reads one matrix, whatever comes before its last two axes."""
    for match in _four_bit(program, dynamic=False):
        shape = tuple(match.pattern_input_node.meta["val"].shape)
        if math.prod(shape[:-2]) > 1:
            yield match.anchor_node, f"a product of 4-bit weights with a value of shape {shape} gives garbage"


def batched_8da4w_linear(program: Delegated) -> Iterator[Finding]:
    """The kernel that finds the scales of activations takes a matrix."""
    for match in _four_bit(program, dynamic=True):
        shape = tuple(match.pattern_input_node.meta["val"].shape)
        if math.prod(shape[:-2]) > 1:
            yield match.anchor_node, f"a program that quantizes activations of shape {shape} by token cannot be loaded"


def single_row_8da4w_linear(program: Delegated) -> Iterator[Finding]:
    """For one row another kernel runs, which leaves activations as they are."""
    for match in _four_bit(program, dynamic=True):
        shape = tuple(match.pattern_input_node.meta["val"].shape)
        if math.prod(shape[:-1]) == 1:
            yield match.anchor_node, "with one row activations are not quantized, and results are off by 1e-2"


def view_before_4bit_linear(program: Delegated) -> Iterator[Finding]:
    """The pattern looks through a reshape and takes the value behind it, whose last axis may be another one."""
    for match in program.quantized_linears():
        behind, width = match.pattern_input_node.meta["val"].shape, match.weight_node.meta["val"].shape[-1]
        if behind[-1] != width:
            yield match.anchor_node, f"a product over {width} values would read a value of shape {tuple(behind)}"


def view_behind_8da4w_linear(program: Delegated) -> Iterator[Finding]:
    """The pattern takes a reshape behind the product for a part of it, and the kernel does not reshape."""
    for match in _four_bit(program, dynamic=True):
        view = match.output_view_copy_node
        if view is None or match.quantize_output_node is not None:
            continue
        if view.meta["val"].shape[:-1] != match.pattern_input_node.meta["val"].shape[:-1]:
            yield match.anchor_node, "the reshape behind the product would be lost"


def not_4bit_weight(program: Delegated) -> Iterator[Finding]:
    """There are kernels for 4-bit weights in groups; a weight that is anything else aborts the process."""
    known = set()
    for match in _four_bit(program):
        known.add(match.dequantize_weight_node)
        if match.dequantize_input_node is not None:
            known.add(match.dequantize_input_node)
    for node in program.calls:
        if "dequantize" in name_of(node) and node not in known:
            yield node, "weights that are not 4-bit in groups along the input abort the process of the runtime"


def integer_equality(program: Delegated) -> Iterator[Finding]:
    """There is no such kernel; for floats it says equal where values differ by less than 1e-5."""
    for node in _named(program, "eq"):
        if not isinstance(node.args[1], fx.Node):
            continue
        if any(not inner.meta["val"].dtype.is_floating_point for inner in node.all_input_nodes):
            yield node, "a program that compares integers of two tensors cannot be loaded"
        else:
            yield node, "values of two tensors that differ by less than 1e-5 are taken for equal"


def no_axes(program: Delegated) -> Iterator[Finding]:
    """Tensors have at least one axis, but for numbers that are written in the program."""
    numbers = numbers_of(program.exported)
    for node in program.calls:
        for inner in (node, *node.all_input_nodes):
            value = inner.meta.get("val")
            if isinstance(value, Tensor) and value.dim() == 0 and inner.name not in numbers:
                yield node, f"a program with the value %{inner.name}, which has no axes, cannot be loaded"
                break


def mutated_buffer(program: Delegated) -> Iterator[Finding]:
    """State in a delegate is a copy that belongs to one method."""
    signature = program.exported.graph_signature
    mutated = set(signature.buffers_to_mutate.values())
    for node in program.exported.graph.nodes:
        if "delegation_tag" in node.meta and signature.inputs_to_buffers.get(node.name) in mutated:
            yield node, "a buffer that the program changes would be a private copy in each method, and fails to run"


def half_precision(program: Delegated) -> Iterator[Finding]:
    """Differences of losses vanish."""
    for spec in program.specs:
        if spec.key == "force_fp16" and any(spec.value):
            yield None, "in half precision the losses of lanes are equal, so that the projected gradient is 0"


def varying_table(program: Delegated) -> Iterator[Finding]:
    """The table of an embedding and the weight of a norm are packed when a program is loaded."""
    for node in _named(program, "embedding"):
        if not program.is_constant(node.args[0]):
            yield node, "an embedding whose table is no weight of the model crashes when it is loaded"
    for node in program.calls:
        match = find_rms_norm_patterns(node)
        if match is not None and not program.is_constant(match.weight_node):
            yield node, "an RMSNorm whose weight is no weight of the model crashes when it is loaded"


def varying_weight(program: Delegated) -> Iterator[Finding]:
    """A product with a transposed matrix becomes a linear layer, whose weight is packed when a program is loaded."""
    for node in program.calls:
        if name_of(node) not in ("mm", "addmm", "linear"):
            continue
        weight: Any = node.args[2 if name_of(node) == "addmm" else 1]
        if name_of(node) != "linear" and name_of(weight) not in ("permute", "t"):
            continue
        source = weight if name_of(node) == "linear" else weight.args[0]
        if source.op != "placeholder" and "dequantize" not in name_of(source):
            yield node, f"a layer whose weight is computed, by {name_of(source)}, cannot be loaded"


def exact_gelu(program: Delegated) -> Iterator[Finding]:
    """There is one kernel, the tanh form, which does not look at the argument."""
    for node in _named(program, "gelu"):
        if node.kwargs.get("approximate", "none") == "none":
            yield node, "GELU with erf is computed with tanh instead, which is off by up to 5e-4"


FOUR_BITS = (
    "quantize to 4-bit weights in groups of 32 along the input, the output layer as well "
    '(QuantizationConfig("8da4w", head="8da4w"))'
)
_MATRIX = "keep tokens and rows in one axis: the pass flatten_tokens does that where nothing mixes tokens"
RULES: dict[Rule, str] = {
    negative_gather_axis: "count the axis from the front",
    batched_4bit_linear: _MATRIX,
    batched_8da4w_linear: _MATRIX,
    single_row_8da4w_linear: "compile for more than one token or row, or quantize weights only (4-bit, groups of 32)",
    view_before_4bit_linear: "put an elementwise operator between reshape and product",
    view_behind_8da4w_linear: "put an elementwise operator between product and reshape",
    not_4bit_weight: FOUR_BITS,
    integer_equality: "compare with a number, or leave the comparison outside of the delegate",
    no_axes: "keep an axis of size 1: keepdim=True, x[0:1] for x[0]",
    mutated_buffer: "leave the tag of the delegate off the buffer",
    half_precision: "leave force_fp16 out",
    varying_table: "make the table or the weight a parameter of the model",
    varying_weight: "store the weight in float32, or as 4-bit codes in groups of 32; multiply activations with bmm",
    exact_gelu: 'use gelu(approximate="tanh"), or write the function out',
}


def numbers_of(exported: ExportedProgram) -> set[str]:
    """Names of the constants without axes: in the edge dialect, the numbers that are written in a program."""
    user = set(exported.graph_signature.user_inputs)
    constants = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name not in user]
    return {node.name for node in constants if node.meta["val"].dim() == 0}


def violations(exported: ExportedProgram, specs: Sequence[CompileSpec] = ()) -> list[Violation]:
    """Every rule that the delegates of a program would break."""
    calls = tuple(n for n in exported.graph.nodes if n.op == "call_function" and "delegation_tag" in n.meta)
    program = Delegated(exported, calls, tuple(specs))
    found = []
    for rule, hint in RULES.items():
        for node, problem in rule(program):
            where = "the compile options" if node is None else source_line(node)
            found.append(Violation(rule.__name__, where, problem, hint))
    return found


def check_delegates(exported: ExportedProgram, specs: Sequence[CompileSpec] = ()) -> None:
    """Refuse a program that the runtime would get wrong.

    Raises:
        BackendRefusedError: It names each rule, node and source line.
    """
    found = violations(exported, specs)
    if found:
        lines = [f"{v.rule}: {v.problem}\n    at: {v.where}" for v in found]
        raise BackendRefusedError(
            "the Vulkan runtime would get this program wrong:\n  - " + "\n  - ".join(lines),
            hint="; ".join(dict.fromkeys(v.hint for v in found)),
        )


def _named(program: Delegated, name: str) -> list[fx.Node]:
    return [node for node in program.calls if name_of(node) == name]


def _four_bit(program: Delegated, dynamic: bool | None = None) -> Iterator[QuantizedLinearMatch]:
    """The products that become kernels for 4-bit weights in groups.

    ExecuTorch looks at the values of weights. Partitioners see none, so what counts here is the range they are said
    to be in.
    """
    for match in program.quantized_linears():
        node = match.dequantize_weight_node
        schema: Any = node.target
        arguments = dict(zip((a.name for a in schema._schema.arguments), node.args, strict=False)) | node.kwargs
        in_range = arguments.get("quant_min", -128) >= -8 and arguments.get("quant_max", 127) <= 7
        if not in_range or not match.is_weight_pergroup_quantized():
            continue
        if not match.is_weight_only_quantized() and not match.is_input_dynamic_perchannel_quantized():
            continue
        if dynamic in (None, not match.is_weight_only_quantized()):
            yield match
