"""The generator: its statistics, that it is one stream on every engine, and that any part of it stands alone."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mobizo_compiler import errors
from mobizo_compiler.step.noise import noise, noise_values, noise_words, normal_table

SEEDS = [0, 1, 2, 3, 17, 1000, 123_456, 2**30, 2**31 - 2, 2**31 - 1]
COUNT = 100_000
# Ten seeds and some fifteen statistics are 150 tests of 4.5 standard deviations: 1 in 1000 sound generators fails.
SIGMAS = 4.5


def bound(samples: int) -> float:
    return SIGMAS / samples**0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_gaussian_moments_and_shape(seed: int) -> None:
    z = noise(seed, 4, COUNT).double()
    n = z.numel()
    assert abs(z.mean()) < bound(n)
    assert abs(z.var() - 1) < bound(n) * 2**0.5
    assert abs((z**3).mean()) < bound(n) * 15**0.5
    assert abs((z**4).mean() - 3) < bound(n) * 96**0.5
    assert scipy.stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-5


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_correlation_along_a_stream_or_between_streams(seed: int, distribution: str) -> None:
    z = noise(seed, 4, COUNT, distribution).double()
    following = noise((seed + 1) % 2**31, 4, COUNT, distribution).double()
    for lag in (1, 2, 3, 64, 576):
        assert abs((z[:, lag:] * z[:, :-lag]).mean()) < bound(4 * (COUNT - lag))
    for k in range(4):
        assert abs((z[k] * following[k]).mean()) < bound(COUNT)
        for other in range(k):
            assert abs((z[k] * z[other]).mean()) < bound(COUNT)
            assert abs((z[k].square() * z[other].square()).mean() - 1) < bound(COUNT) * 8**0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_bits_of_the_words_are_balanced_and_pairwise_independent(seed: int) -> None:
    words = noise_words(torch.tensor([seed], dtype=torch.int32), 4, COUNT)
    bits = torch.stack([(words.flatten() >> b) & 1 for b in range(32)]).double() * 2 - 1
    n = bits.shape[1]
    assert bits.mean(dim=1).abs().max() < 5 / n**0.5
    correlation = (bits @ bits.T / n).fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / n**0.5


@given(seed=st.integers(0, 2**31 - 1), queries=st.integers(1, 5), parameters=st.integers(1, 99))
@settings(max_examples=50, deadline=None)
def test_an_element_depends_on_seed_query_and_position_alone(seed: int, queries: int, parameters: int) -> None:
    for distribution in ("gaussian", "rademacher"):
        larger = noise(seed, queries + 2, parameters + 5, distribution)
        assert torch.equal(noise(seed, queries, parameters, distribution), larger[:queries, :parameters])


def test_the_table_is_that_of_the_format() -> None:
    """Symmetric, of variance 1, and the bytes that docs/program_format.md states."""
    table = normal_table().flatten()
    assert torch.equal(table, -table.flip(0)) and bool((table.diff() > 0).all())
    assert abs(table.double().square().mean() - 1) < 1e-8
    quantiles = torch.from_numpy(scipy.stats.norm.ppf((torch.arange(4096).double().numpy() + 0.5) / 4096))
    torch.testing.assert_close(table.double(), quantiles / quantiles.square().mean().sqrt(), rtol=1e-7, atol=0)
    page = (Path(__file__).parent.parent / "docs" / "program_format.md").read_text()
    assert f"bytes is `{zlib.crc32(table.numpy().astype('<f4').tobytes()):08x}`" in page


def test_seeds_differ() -> None:
    streams = {tuple(noise(seed, 1, 8).flatten().tolist()) for seed in range(1000)}
    assert len(streams) == 1000


def test_the_same_function_is_traced_into_graphs() -> None:
    assert torch.equal(noise(5, 3, 10), noise_values(torch.tensor([5], dtype=torch.int32), 3, 10, "gaussian"))


@pytest.mark.parametrize(
    "arguments", [(-1, 1, 1), (2**31, 1, 1), (0, 0, 1), (0, 1, 0), (0, 1, 1, "cauchy"), (True, 1, 1), (0.5, 1, 1)]
)
def test_bad_arguments(arguments: tuple) -> None:
    with pytest.raises(errors.ConfigError):
        noise(*arguments)
