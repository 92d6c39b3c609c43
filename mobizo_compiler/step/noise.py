"""The noise of a step: a counter-based generator in plain int32 tensor operations.

Shape suffixes: Q queries, P parameters, H pairs (half of P, rounded up).

The same functions make the noise in eager PyTorch, inside every lowered program, and in the reference, so the same
seed gives the same directions everywhere. `docs/program_format.md` defines the stream for authors of other hosts.
Only xor, wrapping multiply and add, and shifts with a mask are used: every ExecuTorch kernel library has them, and
none of them depends on a host's random state. The mixing function is Chris Wellons' `lowbias32` (public domain).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mobizo_compiler.errors import ConfigError
from mobizo_compiler.options import MAX_SEED, check_int


def _i32(word: int) -> int:
    """The unsigned 32-bit `word` as the signed int that int32 tensors take."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift right of int32 values."""
    return torch.bitwise_and(torch.bitwise_right_shift(x, bits), (1 << (32 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """lowbias32: a bijection of 32-bit words in which every input bit changes every output bit half of the time."""
    x = torch.bitwise_xor(x, _shift_right(x, 16)) * 0x7FEB352D
    x = torch.bitwise_xor(x, _shift_right(x, 15)) * _i32(0x846CA68B)
    return torch.bitwise_xor(x, _shift_right(x, 16))


def noise_words(seed_1: Tensor, queries: int, count: int) -> tuple[Tensor, Tensor]:
    """Two streams of random 32-bit words.

    Args:
        seed_1: Seed, int32, shape [1].
        queries: Number Q of queries.
        count: Number of words per query and stream.

    Returns:
        Two int32 tensors, shape [Q, count]. Word [k, c] depends on seed, k and c alone.
    """
    query_Q1 = torch.arange(queries, dtype=torch.int32, device=seed_1.device).reshape(queries, 1)
    key_Q1 = _mix(torch.bitwise_xor(_mix(seed_1 + _i32(0x9E3779B9)), query_Q1 * _i32(0x85EBCA6B) + 1))
    second_key_Q1 = _mix(key_Q1 + 0x5851F42D)
    third_key_Q1 = _mix(second_key_Q1 + 1)
    counter_C = torch.arange(count, dtype=torch.int32, device=seed_1.device) * _i32(0x9E3779B9)
    first = _mix(_mix(torch.bitwise_xor(counter_C, key_Q1)) + second_key_Q1)
    return first, _mix(torch.bitwise_xor(first, third_key_Q1))


def noise_values(seed_1: Tensor, queries: int, parameters: int, distribution: str) -> Tensor:
    """Directions z, float32, shape [Q, P], for a seed held in an int32 tensor of shape [1].

    Gaussian: pair c of a query gives elements 2c and 2c+1 (Box-Muller), with the radius from the upper 24 bits of
    the first word and the angle from the upper 24 bits of the second. Rademacher: element c is -1 where the top bit
    of the first word c is set, else +1. So any range of elements can be made on its own.
    """
    if distribution == "rademacher":
        first_QP, _ = noise_words(seed_1, queries, parameters)
        return 1.0 - 2.0 * _shift_right(first_QP, 31).to(torch.float32)
    pairs = (parameters + 1) // 2
    first_QH, second_QH = noise_words(seed_1, queries, pairs)
    uniform_QH = (_shift_right(first_QH, 8).to(torch.float32) + 0.5) * 2.0**-24
    angle_QH = _shift_right(second_QH, 8).to(torch.float32) * (2 * math.pi * 2.0**-24)
    radius_QH = torch.sqrt(torch.log(uniform_QH) * -2.0)
    both_QH2 = torch.stack((radius_QH * torch.cos(angle_QH), radius_QH * torch.sin(angle_QH)), dim=-1)
    normal = both_QH2.reshape(queries, 2 * pairs)
    return normal if parameters % 2 == 0 else normal[:, :parameters]


def noise(
    seed: int,
    queries: int,
    parameters: int,
    distribution: str = "gaussian",
    device: torch.device | str = "cpu",
) -> Tensor:
    """The directions z that a step with this seed uses.

    Args:
        seed: 0..2^31-1.
        queries: Number q of queries.
        parameters: Number P of trained parameters.
        distribution: "gaussian" or "rademacher".
        device: Where it is made. Integers and signs are the same everywhere; normal numbers may differ in the last
            places, because engines compute cosines and logarithms differently.

    Returns:
        float32, shape [q, P]. A site's part is `noise[:, offset:offset + r * out].reshape(q, r, out)`.

    Raises:
        ConfigError: An argument is out of range.

    >>> noise(17, queries=2, parameters=3, distribution="rademacher")
    tensor([[-1.,  1., -1.],
            [ 1.,  1., -1.]])
    """
    check_int("seed", seed, 0, MAX_SEED)
    check_int("queries", queries, 1, 1 << 20)
    check_int("parameters", parameters, 1, MAX_SEED)
    if distribution not in ("gaussian", "rademacher"):
        raise ConfigError(f"distribution is {distribution!r}", hint='use "gaussian" or "rademacher"')
    return noise_values(torch.tensor([seed], dtype=torch.int32, device=device), queries, parameters, distribution)
