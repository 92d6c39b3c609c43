"""Capture a model of half precision as its float32 self, without a float32 copy of its weights.

Given:  a module with weights in bfloat16 or float16
Result: input %x: f32[rows, 6]    tensor %p_up_weight: f32[8, 6], stored as bf16
          %up = linear(%x, %p_up_weight)
Numbers: those of `model.float()`.

While a model is captured, memory that nobody writes or reads stands in for its weights. The graph reads float32, and
`GraphProgram` keeps the weights as they were given; see `as_read`. Like `capture`, this is no `Pass`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mobizo_compiler.graph.example import HALVES


def is_half(model: object) -> bool:
    """Whether a module has weights of half precision."""
    return isinstance(model, nn.Module) and any(weight.dtype in HALVES for weight in model.parameters())


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Within the block, the module has float32 weights without values, and float32 buffers.

    Yields:
        The weights of half precision, by the address of what stands in for them.
    """
    originals: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        made: dict[int, Tensor] = {}  # modules that share a weight share what stands in for it
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is None or tensor.dtype not in HALVES:
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = _stand_in(tensor, originals)
                    stack.callback(table.__setitem__, name, tensor)
                    table[name] = made[id(tensor)]
        yield originals


def _stand_in(tensor: Tensor, originals: dict[int, Tensor]) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return tensor.float()
    empty = torch.empty(tensor.shape, dtype=torch.float32)  # the system gives pages to what is written alone
    originals[empty.data_ptr()] = tensor.detach()
    return nn.Parameter(empty, requires_grad=tensor.requires_grad)


def restored(tensor: Tensor, originals: Mapping[int, Tensor]) -> Tensor:
    """The weight that a tensor stands in for, or the tensor itself."""
    original = originals.get(tensor.data_ptr())
    if original is None:
        return tensor
    return nn.Parameter(original, requires_grad=False) if isinstance(tensor, nn.Parameter) else original
