"""The noise of a step: a counter-based generator in plain int32 tensor operations.

Shape suffixes: Q queries, P parameters, H pairs (half of P, rounded up), N = 2 H, T entries of the table.

The same functions make the noise in eager PyTorch, inside every lowered program, and in the reference, so the same
seed gives the same directions everywhere. `docs/program_format.md` defines the stream for authors of other hosts.
Only xor, wrapping multiply and add, shifts with a mask, and lookups in a table are used: every ExecuTorch kernel
library has them, none of them rounds, and none depends on a host's random state. The mixing function is Chris
Wellons' `lowbias32` (public domain).
"""

from __future__ import annotations

import functools
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from mobizo_compiler.errors import ConfigError
from mobizo_compiler.options import MAX_SEED, check_int

QUANTILES = 4096  # entries of the table that normal numbers are taken from
NORMAL_TABLE = "mobizo_normal_table"  # the constant of a program that has it
NOISE_VERSION = 2  # part of a program's fingerprint: 1 made normal numbers of logarithms and cosines


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


def noise_words(seed_1: Tensor, queries: int, count: int) -> Tensor:
    """Random 32-bit words.

    Args:
        seed_1: Seed, int32, shape [1].
        queries: Number Q of queries.
        count: Number of words per query.

    Returns:
        int32, shape [Q, count]. Word [k, c] depends on seed, k and c alone.
    """
    query_Q1 = torch.arange(queries, dtype=torch.int32, device=seed_1.device).reshape(queries, 1)
    key_Q1 = _mix(torch.bitwise_xor(_mix(seed_1 + _i32(0x9E3779B9)), query_Q1 * _i32(0x85EBCA6B) + 1))
    second_key_Q1 = _mix(key_Q1 + 0x5851F42D)
    counter_C = torch.arange(count, dtype=torch.int32, device=seed_1.device) * _i32(0x9E3779B9)
    return _mix(_mix(torch.bitwise_xor(counter_C, key_Q1)) + second_key_Q1)


@functools.cache
def normal_table() -> Tensor:
    """The quantiles of the normal distribution in the middle of 4,096 equal parts, scaled to a variance of 1.

    Returns:
        float32, shape [4096, 1], in ascending order; entry 4095 - i is minus entry i. Not to be changed.
    """
    upper = [statistics.NormalDist().inv_cdf((QUANTILES // 2 + i + 0.5) / QUANTILES) for i in range(QUANTILES // 2)]
    upper_H = torch.tensor(upper, dtype=torch.float64)
    table_T = torch.cat((-upper_H.flip(0), upper_H))
    return (table_T / table_T.square().mean().sqrt()).to(torch.float32).reshape(QUANTILES, 1)


def noise_values(
    seed_1: Tensor, queries: int, parameters: int, distribution: str, table_T1: Tensor | None = None
) -> Tensor:
    """Directions z, float32, shape [Q, P], for a seed held in an int32 tensor of shape [1].

    Gaussian: word c of a query gives elements 2c and 2c+1, each an entry of the table: its bits 20 to 31 and 8 to 19
    say which. Nothing is rounded, so that every engine has the same numbers. Rademacher: element c is -1 where the
    top bit of word c is set, else +1. So any range of elements can be made on its own.

    Args:
        seed_1: Seed, int32, shape [1].
        queries: Number Q of queries.
        parameters: Number P of elements.
        distribution: "gaussian" or "rademacher".
        table_T1: `normal_table`, where a graph has it as a constant.
    """
    if distribution == "rademacher":
        return 1.0 - 2.0 * _shift_right(noise_words(seed_1, queries, parameters), 31).to(torch.float32)
    table_T1 = normal_table().to(seed_1.device) if table_T1 is None else table_T1
    pairs = (parameters + 1) // 2
    word_QH1 = noise_words(seed_1, queries, pairs).reshape(queries, pairs, 1)
    # Times 1 and times 4096: the upper 12 bits of the products are the two numbers of a pair.
    shifted_QH2 = word_QH1 * (torch.arange(2, dtype=torch.int32, device=seed_1.device) * (QUANTILES - 1) + 1)
    entry_QN = _shift_right(shifted_QH2.reshape(queries, 2 * pairs), 20)
    normal = F.embedding(entry_QN, table_T1).reshape(queries, 2 * pairs)
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
        device: Where it is made. The numbers are the same everywhere, bit for bit.

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
