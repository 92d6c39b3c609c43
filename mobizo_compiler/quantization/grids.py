"""Weights that were quantized before: found again, with the codes and scales that they have in a GGUF checkpoint.

A checkpoint of llama.cpp is decoded when it is loaded. Of the types Q8_0, Q4_0 and Q4_1, blocks of 32 weights with a
float16 scale each, the codes and scales follow from the decoded numbers, so that nothing is rounded a second time
(ggml-quants.c; gguf-py, quants.py).

Shape suffixes: O out features, G groups, S weights of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 32
Blocks = tuple[Tensor, Tensor, Tensor | None]  # codes [O, G, S], scales [O, G, 1] and offsets, all float32


@dataclasses.dataclass(frozen=True)
class Grid:
    """Weights as codes * scale + offset, exactly.

    Args:
        codes: int8 [out_features, in_features].
        scale: [out_features, groups], in the precision that is stored.
        offset: float32, of the same shape; None if all are 0.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None


def find_grid(weight: Tensor, bits: int, group_size: int) -> Grid | None:
    """The codes and scales of a weight that was decoded from blocks; None if any number lies elsewhere.

    Args:
        weight: float32 [out_features, in_features].
        bits: 8 for Q8_0; 4 for Q4_0 and Q4_1.
        group_size: Weights that share a scale.
    """
    if weight.dim() != 2 or group_size != BLOCK or weight.shape[1] % BLOCK:
        return None
    for candidate in (_q8_0,) if bits == 8 else (_q4_0, _q4_1):
        # Most weights are on no grid; some rows say so in a moment.
        if _exact(weight[:8], candidate) is not None:
            return _exact(weight, candidate)
    return None


def _exact(weight: Tensor, candidate: Callable[[Tensor], Blocks]) -> Grid | None:
    w_OGS = weight.reshape(weight.shape[0], -1, BLOCK)
    code_OGS, scale_OG1, offset_OG1 = candidate(w_OGS)
    found = code_OGS * scale_OG1
    if offset_OG1 is not None:
        found = found + offset_OG1
    if not torch.equal(found, w_OGS):
        return None
    offset = None if offset_OG1 is None else offset_OG1.squeeze(-1)
    return Grid(code_OGS.to(torch.int8).reshape(weight.shape), scale_OG1.squeeze(-1).half(), offset)


def _codes(w_OGS: Tensor, scale_OG1: Tensor, lowest: int, highest: int) -> Tensor:
    """The nearest codes; 0 where the scale is."""
    step_OG1 = torch.where(scale_OG1 == 0, torch.ones_like(scale_OG1), scale_OG1)
    return torch.clamp(torch.round(w_OGS / step_OG1), lowest, highest)


def _q8_0(w_OGS: Tensor) -> Blocks:
    """The weight with the largest magnitude is 127 or -127 times the scale."""
    scale_OG1 = (w_OGS.abs().amax(-1, keepdim=True) / 127).half().float()
    return _codes(w_OGS, scale_OG1, -127, 127), scale_OG1, None


def _q4_0(w_OGS: Tensor) -> Blocks:
    """The weight with the largest magnitude is -8 times the scale, which may be negative."""
    scale_OG1 = (w_OGS.gather(-1, w_OGS.abs().argmax(-1, keepdim=True)) / -8).half().float()
    return _codes(w_OGS, scale_OG1, -8, 7), scale_OG1, None


def _q4_1(w_OGS: Tensor) -> Blocks:
    """The least weight has the code 0, and the largest the code 15; here they are -8 and 7."""
    low_OG1, high_OG1 = w_OGS.amin(-1, keepdim=True), w_OGS.amax(-1, keepdim=True)
    scale_OG1 = ((high_OG1 - low_OG1) / 15).half().float()
    return _codes(w_OGS - low_OG1, scale_OG1, 0, 15) - 8, scale_OG1, low_OG1 + 8 * scale_OG1
