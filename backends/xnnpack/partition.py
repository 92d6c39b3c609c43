"""ExecuTorch's XNNPACK partitioner, with only those of the delegate's passes that a delegate has use for.

Inside every delegate upstream runs 17 passes, each of which interprets the whole graph again. Most of them are about
convolutions, batch norms, paddings, fused activations and constants; a delegate of linear layers, products and
elementwise operators comes out of them as it went in. The compile spec "dqlinear_partitioner", which upstream reads
in `XnnpackBackend.preprocess`, leaves one pass of them. It is the larger half of the time of lowering.
"""

from __future__ import annotations

from typing import Any

from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, PartitionResult
from torch import fx
from torch.export import ExportedProgram

# Operators that none of the skipped passes looks at.
_PLAIN = frozenset(
    (
        "abs",
        "add",
        "bmm",
        "cos",
        "div",
        "exp",
        "gelu",
        "linear",
        "log",
        "maximum",
        "minimum",
        "mul",
        "neg",
        "permute_copy",
        "pow",
        "rsqrt",
        "sigmoid",
        "sin",
        "slice_copy",
        "_softmax",
        "sqrt",
        "square",
        "sub",
        "tanh",
        "unsqueeze_copy",
        "view_copy",
    )
)
_ONE_PASS = CompileSpec("dqlinear_partitioner", b"")


class XnnpackPartitionerWithFewPasses(XnnpackPartitioner):  # type: ignore[misc]
    """As the one of ExecuTorch; what comes out is the same, sooner."""

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Partition, and mark the delegates that one pass is enough for."""
        result = super().partition(exported_program)
        members: dict[str, list[fx.Node]] = {}
        for node in result.tagged_exported_program.graph.nodes:
            if node.op == "call_function" and "delegation_tag" in node.meta:
                members.setdefault(node.meta["delegation_tag"], []).append(node)
        result.partition_tags = {
            tag: DelegationSpec(spec.backend_id, [*spec.compile_specs, _ONE_PASS])
            if all(map(_is_plain, members.get(tag, [])))
            else spec
            for tag, spec in result.partition_tags.items()
        }
        return result


def _is_plain(node: fx.Node) -> bool:
    """The node is left alone by every pass but the one that stays. What is constant would be computed by another."""
    target: Any = node.target
    name = target._op._schema.name.rpartition("::")[2]
    short_cat = name == "cat" and len(node.all_input_nodes) <= 5
    # A placeholder without a tag stays outside of the delegate and is one of its inputs.
    varies = any(inner.op == "call_function" or "delegation_tag" not in inner.meta for inner in node.all_input_nodes)
    return (name in _PLAIN or short_cat) and varies
