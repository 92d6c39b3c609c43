"""The Vulkan partitioner of ExecuTorch, told what to leave outside so that a network is one delegate.

Outside stay, in portable kernels:

- the noise, a function of the seed alone: Vulkan has no integer shifts and no xor;
- the update of the state: `replay` makes it again without a delegate, and must give the same bits;
- what has integers or truth values in it, but for the indices of lookups, and what has no axes;
- what Vulkan has no kernel for.

A call in the middle of a network that stays outside cuts it in two. In front of the first matrix product, or behind the
last one, it need not: all calls before it, or after it, stay outside with it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

import executorch.backends.vulkan.patterns as vulkan_patterns
import torch
from executorch.backends.vulkan import utils as vulkan_utils
from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner, VulkanSupportedOperators
from executorch.exir.backend.partitioner import Partitioner, PartitionResult
from torch import Tensor, fx
from torch.export import ExportedProgram

from mobizo_compiler.backends.vulkan.known_faults import check_delegates, numbers_of
from mobizo_compiler.backends.vulkan.operators import PRODUCTS, name_of
from mobizo_compiler.graph.nodes import ancestors
from mobizo_compiler.graph.program import SEED_INPUT, STATE, STATE_INPUT
from mobizo_compiler.step.noise import NORMAL_TABLE

_OUTSIDE = "mobizo_outside"  # name of a module that no model has
_MODULES = "nn_module_stack"
_INDEXED = {"embedding": 1, "gather": 2, "index_select": 2}  # position of the indices


class OneDelegate(Partitioner):  # type: ignore[misc]
    """ExecuTorch's partitioner, steered and checked; raises `BackendRefusedError` where the runtime would be wrong.

    Args:
        inputs: Names of the user inputs of the method; lowering gives them others.
        outputs: Names of its user outputs.
    """

    def __init__(self, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        _remember_patterns()
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.inner = VulkanPartitioner({}, nn_module_blocklist=[_OUTSIDE])
        self.delegation_spec = self.inner.delegation_spec

    def ops_to_not_decompose(self, exported: ExportedProgram) -> tuple[list[Any], Any]:
        """What Vulkan takes whole."""
        operators, wanted = self.inner.ops_to_not_decompose(exported)
        return list(operators), wanted

    def partition(self, exported: ExportedProgram) -> PartitionResult:
        """Tag what is delegated."""
        with _said_to_be_outside(outside(exported, self.inputs, self.outputs)):
            result = self.inner.partition(exported)
        signature = exported.graph_signature
        for node in exported.graph.nodes:
            if signature.inputs_to_buffers.get(node.name) in {STATE, *signature.buffers_to_mutate.values()}:
                node.meta.pop("delegation_tag", None)  # an input of the delegate, not a part of it
        check_delegates(exported, self.delegation_spec.compile_specs)
        return result


@functools.cache
def _remember_patterns() -> None:
    """Have ExecuTorch trace the patterns that it fuses once.

    It means to: `rope_hf.get_hf_rope_graphs` has an `lru_cache`. But what is registered is the function within that,
    and four lookups for each delegate took two fifths of the time of compiling a small model.
    """
    for entry in vulkan_patterns.fusable_patterns.values():
        if entry.get_graphs_fn is not None:
            entry.get_graphs_fn = functools.cache(entry.get_graphs_fn)


@contextlib.contextmanager
def _said_to_be_outside(nodes: Iterable[fx.Node]) -> Iterator[None]:
    """Let the inner partitioner take nodes for calls of a module that it was told to leave out.

    Taking tags off afterwards would not do: it can leave a delegate that needs its own results.
    """
    marked = list(nodes)
    before = [node.meta.get(_MODULES) for node in marked]
    for node in marked:
        node.meta[_MODULES] = {_OUTSIDE: (_OUTSIDE, _OUTSIDE)}
    try:
        yield
    finally:
        for node, modules in zip(marked, before, strict=True):
            if modules is None:
                del node.meta[_MODULES]
            else:
                node.meta[_MODULES] = modules


def outside(exported: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> set[fx.Node]:
    """The calls that are not to be delegated, of a method with these user inputs and outputs."""
    calls = [node for node in exported.graph.nodes if node.op == "call_function"]
    products = [node for node in calls if name_of(node) in PRODUCTS]
    found = _noise_and_update(exported, calls, inputs, outputs)
    behind = _descendants(calls, products)
    in_front = ancestors(products) - set(products)
    supported = _supported(exported)
    numbers = numbers_of(exported)
    for node in calls:
        if node in found or not (_has_integers(node) or _has_no_axes(node, numbers) or not supported(node)):
            continue
        if node not in behind:
            found |= {inner for inner in ancestors([node]) if inner.op == "call_function"}
        elif node not in in_front and node not in products:
            found |= _descendants(calls, [node])
        else:
            found.add(node)
    return found


def _noise_and_update(
    exported: ExportedProgram, calls: Sequence[fx.Node], inputs: Sequence[str], outputs: Sequence[str]
) -> set[fx.Node]:
    """Calls on the seed and nothing else of this call, with the counters they need; and calls for the state alone."""
    signature = exported.graph_signature
    nodes = {node.name: node for node in exported.graph.nodes}
    by_name = dict(zip(signature.user_inputs, inputs, strict=True))
    numbers = numbers_of(exported)
    made_of: dict[fx.Node, set[str]] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            constant = signature.inputs_to_buffers.get(node.name) == NORMAL_TABLE
            made_of[node] = set() if constant else {by_name.get(node.name, node.name)} - numbers
        else:
            made_of[node] = set().union(*(made_of[inner] for inner in node.all_input_nodes))
    noise = ancestors(node for node in calls if made_of[node] == {SEED_INPUT})
    results = zip(outputs, signature.user_outputs, strict=True)
    shown = {nodes[str(result)] for name, result in results if name != STATE_INPUT}
    network = ancestors(shown | {node for node in calls if name_of(node) in PRODUCTS})  # a gradient may not be shown
    return {node for node in calls if node in noise or node not in network}


def _descendants(calls: Sequence[fx.Node], of: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes with all calls that use them."""
    found = set(of)
    for node in calls:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _supported(exported: ExportedProgram) -> Any:
    """What the inner partitioner would say of a node."""
    operators = VulkanSupportedOperators(
        vulkan_utils.DEFAULT_TEXTURE_LIMITS,
        vulkan_utils.DEFAULT_BUFFER_LIMIT,
        fusable_subgraphs=vulkan_patterns.get_all_fusable_subgraphs(exported.graph_module),
    )
    return operators._is_node_supported


def _has_integers(node: fx.Node) -> bool:
    """Whether a call computes on or to integers or truth values; quantization is a matter of its own."""
    name = name_of(node)
    if name == "getitem" or "quantize_" in name or "choose_qparams" in name:
        return False
    indices = node.args[_INDEXED[name]] if name in _INDEXED else None
    return any(
        not tensor.dtype.is_floating_point
        for inner in (node, *node.all_input_nodes)
        if inner is not indices
        for tensor in _tensors(inner)
    )


def _has_no_axes(node: fx.Node, numbers: Container[str]) -> bool:
    """Whether a call computes on or to a tensor without axes; a number of the program is written as one."""
    values = [node, *(inner for inner in node.all_input_nodes if inner.name not in numbers)]
    return any(tensor.dim() == 0 for inner in values for tensor in _tensors(inner))


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for tensor in value if isinstance(tensor, torch.Tensor)] if isinstance(value, (tuple, list)) else []
