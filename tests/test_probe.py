"""The probe of an adapter: what it compares, what it must not, and what no number may get past it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, ZOConfig
from mobizo_compiler.errors import AdapterError
from mobizo_compiler.format.probe import Probe, answer_of

BASE = (1.0, -2.0, 0.5, 3.0, -1.0, 0.25, 2.0, -0.5)


def moved(share: float, base: tuple[float, ...] = BASE) -> tuple[float, ...]:
    return tuple(value + share * (1.0 + 0.1 * place) for place, value in enumerate(base))


def session(rows: int, tokens: int) -> Session:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 12), nn.Linear(12, 16)).eval()
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    return Session(mobizo.compile(model, (ids,), LoraConfig(r=3), ZOConfig(queries=1), backend="eager"))


def test_programs_of_other_shapes_take_the_adapter(tmp_path: Path) -> None:
    """Their input is another, and so is the answer: there is nothing to compare."""
    trained = session(2, 5)
    trained.load_state(torch.randn(trained.state().shape, generator=torch.Generator().manual_seed(0)))
    file, folder = trained.export_ptd(tmp_path / "a.ptd"), trained.export_adapter(tmp_path / "a")
    for rows, tokens in ((2, 5), (1, 5), (2, 9)):
        other = session(rows, tokens)
        for load in (lambda other=other: other.import_ptd(file), lambda other=other: other.import_adapter(folder)):
            other.load_state(torch.zeros_like(other.state()))
            load()
            assert torch.equal(other.state(), trained.state()) and other.probe().effect > 0


def test_small_adapters_are_not_lost_in_rounding() -> None:
    """What other engines make of the answer without an adapter is allowed with one; what comes back was kept."""
    noisy = tuple(value * (1 + 1e-5 * (-1) ** place) for place, value in enumerate(BASE))
    for share in (1e-8, 1e-7, 1e-6, 1e-3, 1.0):
        probe = Probe(BASE, moved(share), 7)
        assert Probe.from_tensor(probe.tensor()) == probe and Probe.from_json(probe.to_json(), "here") == probe
        probe.check(probe, "here")
        probe.check(Probe(noisy, moved(share + 1e-6), 7), "here")


@pytest.mark.parametrize("now", [BASE, moved(-0.3), moved(0.8), (math.nan,) * 8, (math.inf,) * 8])
def test_what_is_something_else_is_refused(now: tuple[float, ...]) -> None:
    """The adapter left out, turned round, more than once, and answers that are no numbers."""
    with pytest.raises(AdapterError, match="moves the model's answer to the probe"):
        Probe(BASE, moved(0.3), 7).check(Probe(BASE, now, 7), "here")
    Probe(BASE, moved(0.3), 7).check(Probe(BASE, now, 8), "here")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_kept_probe_has_numbers(value: float) -> None:
    bad = dataclasses.replace(Probe(BASE, BASE), base=(value, *BASE[1:]))
    with pytest.raises(AdapterError, match="8 finite numbers"):
        Probe.from_json(bad.to_json(), "here")
    with pytest.raises(ValueError, match="8 finite numbers"):
        Probe.from_tensor(bad.tensor())


@pytest.mark.parametrize("asked", ["1e999", "1" + 400 * "0" + ".5"])
def test_a_kept_probe_is_of_an_input(asked: str) -> None:
    with pytest.raises(AdapterError, match="cannot be read"):
        Probe.from_json(Probe(BASE, BASE, 7).to_json().replace('"asked": 7', f'"asked": {asked}'), "here")
    with pytest.raises(ValueError, match="of an input"):
        Probe.from_tensor(torch.cat([torch.tensor([math.inf]).double(), Probe(BASE, BASE).tensor()[1:]]))


def test_outputs_that_are_no_answers_do_not_hide_others() -> None:
    """A mask of infinities, the smallest number, an output of another type, and none at all."""
    answer = torch.tensor([[0.0, 1.0], [2.0, -3.0]])
    mask = torch.full((2, 3), -math.inf)
    mask[1, 2] = torch.finfo(torch.float32).min
    others: list[Tensor] = [mask, torch.arange(4), torch.zeros(0), torch.ones(3, dtype=torch.bfloat16)]
    assert answer_of([answer, *others]) == answer_of([answer])
    assert answer_of([*others[1:], 2 * answer]) == tuple(2 * value for value in answer_of([answer]))
