"""What the method `forward` needs of ExecuTorch beyond what every method does: its cache, and what its runner asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from executorch.exir.passes.reinplace import reinplace_pass
from torch.export import ExportedProgram

from mobizo_compiler.format.manifest import Generation
from mobizo_compiler.upstream import edge_operators

FORWARD = "forward"


def runner_methods(generation: Generation | None) -> Mapping[str, Any]:
    """The constant methods that the language model runner of ExecuTorch reads (`extension/llm/runner`, `constants.h`).

    A prompt goes in as one call. A runner cuts one that is longer than `get_max_seq_len`, which none can be.
    """
    if generation is None:
        return {}
    return {
        "get_max_seq_len": generation.context - 1,
        "get_max_context_len": generation.context,
        "get_vocab_size": generation.vocabulary,
        "get_eos_ids": list(generation.stop_ids),
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
        "use_sdpa_with_kv_cache": False,
    }


def write_in_place(methods: Mapping[str, ExportedProgram]) -> None:
    """Let new keys and values be written into the cache, which is else copied twice a layer in every call."""
    if FORWARD not in methods:
        return
    program = reinplace_pass(methods[FORWARD])
    for node in program.graph.find_nodes(op="call_function", target=edge_operators.edge.aten.index_put_.default):
        # What such a call returns is the cache itself, but a view of it would be one of memory that nobody planned.
        for reader in [user for user in node.users if user.op != "output"]:
            reader.replace_input_with(node, node.args[0])
