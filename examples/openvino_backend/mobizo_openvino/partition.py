"""What of a program the delegate gets: the network, in float32, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.backend.utils import tag_constant_data
from openvino.frontend.pytorch.torchdynamo.op_support import OperatorSupport
from torch import fx
from torch.export import ExportedProgram
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from mobizo_compiler.graph.program import (
    EPS_INPUT,
    LEARNING_RATE_INPUT,
    PROJECTED_GRADIENT_INPUT,
    SEED_INPUT,
    STATE_INPUT,
)
from mobizo_openvino.preprocess import DEVICE, OpenvinoBackend

_NOT_OF_THE_MODEL = (SEED_INPUT, EPS_INPUT, LEARNING_RATE_INPUT, PROJECTED_GRADIENT_INPUT, STATE_INPUT)
_WHOLE = torch.ops.aten.linear.default  # else its weight would be transposed outside of the delegate, in every call
_SUPPORTED = {name.removeprefix("torch.ops.") for name in OperatorSupport({})._support_dict} | {"aten.linear.default"}


class NetworkPartitioner(Partitioner):  # type: ignore[misc]
    """A partitioner for one method.

    Args:
        inputs: Names of the method's inputs, in order: while ExecuTorch lowers, the inputs have other names.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        super().__init__()
        self.inputs = tuple(inputs)
        self.delegation_spec = DelegationSpec(OpenvinoBackend.__name__, [CompileSpec("device", DEVICE.encode())])

    def ops_to_not_decompose(
        self, exported: ExportedProgram
    ) -> tuple[list[torch._ops.OpOverload], Callable[[fx.Node], bool] | None]:
        """Linear layers."""
        return [_WHOLE], None

    def partition(self, exported: ExportedProgram) -> PartitionResult:
        """One delegate for each connected part; OpenVINO cannot export a model of several."""
        signature = exported.graph_signature
        constants = {*signature.inputs_to_parameters, *signature.inputs_to_buffers}
        constants |= signature.inputs_to_lifted_tensor_constants.keys()
        chosen = _Chosen({node for node in self._network(exported) if _takes(node, constants)})
        partitions = CapabilityBasedPartitioner(
            exported.graph_module, chosen, allows_single_node_partition=True
        ).propose_partitions()
        tags = {}
        for number, part in enumerate(part for partition in partitions for part in _connected(partition.nodes)):
            tags[f"openvino_{number}"] = self.delegation_spec
            for node in part:
                node.meta["delegation_tag"] = f"openvino_{number}"
        tag_constant_data(exported)
        return PartitionResult(tagged_exported_program=exported, partition_tags=tags)

    def _network(self, exported: ExportedProgram) -> set[fx.Node]:
        """What the model's inputs reach and the results need: neither the noise nor the update of the state.

        `replay` repeats both bit by bit, so both must be computed by the same kernels in all methods.
        """
        nodes = {node.name: node for node in exported.graph.nodes}
        given = {n: nodes[arg] for n, arg in zip(self.inputs, exported.graph_signature.user_inputs, strict=True)}
        of_the_model = _reach((node for name, node in given.items() if name not in _NOT_OF_THE_MODEL), _users)
        update = _reach((node for name, node in given.items() if name == LEARNING_RATE_INPUT), _users)
        results = (node for node in exported.graph.output_node().all_input_nodes if node not in update)
        return of_the_model & _reach(results, _operands)


class _Chosen(OperatorSupportBase):
    def __init__(self, nodes: set[fx.Node]) -> None:
        super().__init__()
        self.nodes = nodes

    def is_node_supported(self, submodules: Mapping[str, torch.nn.Module], node: fx.Node) -> bool:
        return node in self.nodes


def _takes(node: fx.Node, constants: set[str]) -> bool:
    """Whether OpenVINO has the operator, and all around it are float32 tensors with axes, or constants.

    Integers and truth values stay outside: embedding tables, masks, labels. What goes into the delegate or out of it
    without axes fails at run time.
    """
    target = getattr(node.target, "__name__", "")
    if node.op != "call_function" or (target != "getitem" and target not in _SUPPORTED):
        return False
    values = [(near.name, value) for near in (node, *node.all_input_nodes) for value in _flat(near.meta["val"])]
    return all(
        isinstance(value, torch.Tensor) and value.dtype == torch.float32 and (value.dim() > 0 or name in constants)
        for name, value in values
    )


def _flat(value: object) -> Iterable[object]:
    return value if isinstance(value, tuple | list) else (value,)


def _connected(nodes: Iterable[fx.Node]) -> Iterable[set[fx.Node]]:
    """The nodes in groups, such that no value goes from one group to another."""
    nodes = list(nodes)
    members, seen = set(nodes), set[fx.Node]()

    def neighbours(node: fx.Node) -> Iterable[fx.Node]:
        return (near for near in (*node.all_input_nodes, *node.users) if near in members)

    for node in nodes:
        if node not in seen:
            part = _reach([node], neighbours)
            seen |= part
            yield part


def _reach(start: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """The nodes that are reached from `start` by any number of steps, `start` among them."""
    found = set(start)
    pending = list(found)
    while pending:
        new = set(step(pending.pop())) - found
        found |= new
        pending += new
    return found


def _users(node: fx.Node) -> Iterable[fx.Node]:
    return node.users


def _operands(node: fx.Node) -> Iterable[fx.Node]:
    return node.all_input_nodes
