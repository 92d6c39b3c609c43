"""Differential privacy: the accountant, clipping by row, noise, what a run leaves, and an attack on what it tells."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, norm
from torch import Tensor, nn

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Privacy, SequenceClassificationLoss, Session, ZOConfig
from mobizo_compiler.device.accountant import Accountant
from mobizo_compiler.device.journal import Journal, read_journal
from mobizo_compiler.device.private_run import clipped, slopes_of_rows
from mobizo_compiler.device.run import step_seed
from mobizo_compiler.errors import ConfigError, InputError, JournalError, RunMismatchError
from mobizo_compiler.step.estimators import TwoSided

FEATURES, CLASSES, ROWS, ALL = 16, 3, 4, 40
COUNTED = Privacy(noise_multiplier=1.0)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 24), nn.Tanh(), nn.Linear(24, CLASSES)).eval()


def compiled(zo: ZOConfig, backend: str = "eager", **options: Any) -> mobizo.Program:
    given = (torch.zeros(ROWS, FEATURES),)
    lora = LoraConfig(r=4, target_modules=("0", "2"), train_a=True)
    return mobizo.compile(model(), given, lora, zo, loss=SequenceClassificationLoss(), backend=backend, **options)


@pytest.fixture(scope="module")
def program() -> mobizo.Program:
    return compiled(ZOConfig(queries=3, row_losses=True))


class Rows:
    """Rows with classes that say nothing of them, so that they can only be learnt by heart."""

    def __init__(self, count: int = ALL, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x_NF = torch.randn(count, FEATURES, generator=draw)
        self.y_N = torch.randint(0, CLASSES, (count,), generator=draw)
        self.asked: list[list[int]] = []

    def __call__(self, numbers: Sequence[int]) -> tuple[tuple[Tensor], Tensor]:
        self.asked.append(list(numbers))
        return (self.x_NF[list(numbers)],), self.y_N[list(numbers)]


# The accountant


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (5.0, 30), (20.0, 1000)])
def test_epsilon_without_sampling_is_that_of_the_closed_form(noise: float, steps: int) -> None:
    """The Gaussian mechanism, exactly (Balle & Wang 2018, theorem 8); steps add up as one with less noise."""
    found = Accountant(noise, 1.0, 1e-5).epsilon(steps)
    size = math.sqrt(steps) / noise

    def delta(epsilon: float) -> float:
        first, second = norm.cdf(size / 2 - epsilon / size), norm.logcdf(-size / 2 - epsilon / size)
        return float(first - math.exp(epsilon + second))

    assert delta(found) <= 1e-5 and delta(found * 0.99) > 1e-5


@pytest.mark.parametrize(("noise", "rate", "steps"), [(0.8, 0.01, 500), (1.0, 0.004, 5000), (2.0, 0.1, 300)])
def test_epsilon_of_a_sample_is_close_to_that_of_moments(noise: float, rate: float, steps: int) -> None:
    """Renyi differential privacy of the sampled Gaussian mechanism (Mironov et al. 2019, section 3.3, integer orders),
    turned into epsilon (Canonne et al. 2020, proposition 12): an upper bound, and not a loose one."""
    delta, bounds = 1e-5, []
    for order in range(2, 200):
        terms = [
            math.log(math.comb(order, k)) + (order - k) * math.log1p(-rate) + k * math.log(rate)
            + k * (k - 1) / (2 * noise**2)
            for k in range(order + 1)
        ]  # fmt: skip
        renyi = steps * float(torch.logsumexp(torch.tensor(terms, dtype=torch.float64), 0)) / (order - 1)
        bounds.append(renyi + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    found = Accountant(noise, rate, delta).epsilon(steps)
    assert 0.7 * min(bounds) < found < min(bounds)


def test_a_budget_has_noise_and_steps() -> None:
    privacy = Privacy(epsilon=2.0).settled(rows=400, batch_rows=8, steps=50)
    assert (privacy.delta, privacy.sample_rows) == (pytest.approx(0.1 / 400), 8)
    assert privacy.noise_multiplier is not None and privacy.delta is not None
    accountant = Accountant(privacy.noise_multiplier, 8 / 400, privacy.delta)
    assert 1.97 < accountant.epsilon(50) <= 2.0 and accountant.epsilon(0) == 0
    assert accountant.steps_within(2.0, 50) == 50
    fewer = accountant.steps_within(1.0, 50)
    assert accountant.epsilon(fewer) <= 1.0 < accountant.epsilon(fewer + 1)


@pytest.mark.parametrize(
    "fields",
    [{}, {"epsilon": 0}, {"epsilon": math.inf}, {"epsilon": 1e4}, {"noise_multiplier": 0.01},
     {"noise_multiplier": True}, {"epsilon": 1, "delta": 1}, {"epsilon": 1, "row_clip": -1},
     {"epsilon": 1, "sample_rows": 0}],
)  # fmt: skip
def test_settings_that_say_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Privacy"):
        Privacy(**fields)


# What a row says


def test_losses_of_rows_are_those_of_the_model(program: mobizo.Program) -> None:
    session, rows = Session(program), Rows()
    numbers = [5, 0, 7]  # fewer than a batch has
    (x_NF,), y_N = rows(numbers)
    result = session.train_step((x_NF,), y_N, seed=1, learning_rate=0.0, eps=0.1)
    loss_GR = result.row_losses
    assert loss_GR is not None and loss_GR.shape == (6, ROWS) and not loss_GR[:, 3].any()
    torch.testing.assert_close(loss_GR[:, :3].mean(1), result.lane_losses)
    slopes_QR = slopes_of_rows(TwoSided(), loss_GR, torch.tensor([0.1]), 3)
    torch.testing.assert_close(slopes_QR[:, :3].mean(1), result.projected_gradient, atol=1e-5, rtol=1e-5)
    alone = [session.train_step((x_NF[i : i + 1],), y_N[i : i + 1], seed=1, learning_rate=0.0, eps=0.1) for i in (0, 2)]
    for column, one in zip((0, 2), alone, strict=True):
        torch.testing.assert_close(loss_GR[:, column], one.lane_losses)


@pytest.mark.parametrize("estimator", ["two-sided", pytest.param("one-sided", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", [pytest.param("portable", marks=pytest.mark.slow), "xnnpack"])
def test_an_engine_has_them_too(estimator: str, backend: str) -> None:
    """That they are right is what compiling checks: here they must be there, and differ."""
    made = compiled(ZOConfig(queries=2, estimator=estimator, row_losses=True), backend)
    (x_NF,), y_N = Rows()([0, 1, 2, 3])
    loss_GR = Session(made).train_step((x_NF,), y_N, seed=1, learning_rate=0.1, eps=0.1).row_losses
    assert loss_GR is not None and loss_GR.shape == (made.manifest.zo.lanes, ROWS)
    assert len(set(loss_GR.flatten().tolist())) == loss_GR.numel()


def test_wrong_losses_of_rows_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import mobizo_compiler.passes.difference_losses as difference_losses
    from mobizo_compiler.errors import LoweringError

    monkeypatch.setattr(difference_losses, "_by_row", lambda loss, weight: loss / (weight + 1.0))
    with pytest.raises(LoweringError, match="losses of rows"):
        compiled(ZOConfig(queries=2, row_losses=True))


@given(st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1, max_size=6), st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_no_row_says_more_than_it_may(rows: list[list[float]], most: float) -> None:
    slopes_QR = torch.tensor(rows).t()
    found = clipped(slopes_QR, most)
    assert bool(found.isfinite().all()) and bool((found.norm(dim=0) <= most * (1 + 1e-9)).all())
    for column, row in zip(found.t(), rows, strict=True):
        if all(map(math.isfinite, row)) and math.hypot(*row) < most:
            torch.testing.assert_close(column, torch.tensor(row, dtype=torch.float64))


def test_only_steps_made_from_losses_have_them() -> None:
    with pytest.raises(ConfigError, match="row_losses has no meaning for the exact"):
        ZOConfig(estimator="exact", row_losses=True)
    assert "row_losses" not in ZOConfig().to_json()
    assert ZOConfig.from_json(ZOConfig(row_losses=True).to_json()).row_losses


# A run


def recorded(program: mobizo.Program, run: Path) -> list[Any]:
    return read_journal(run / "journal", program)


def test_the_noise_has_the_size_that_it_is_said_to_have(program: mobizo.Program, tmp_path: Path) -> None:
    """With every row in every step the sum is known; what is added to it is normal, as chi-squared says."""
    session, rows, steps = Session(program), Rows(6), 60
    privacy = Privacy(noise_multiplier=2.5, row_clip=0.4, sample_rows=6)
    session.finetune_privately(rows, 6, privacy, steps=steps, learning_rate=0.0, eps=0.1, run=tmp_path / "run")
    found = []
    for record in recorded(program, tmp_path / "run"):
        total_Q = torch.zeros(3, dtype=torch.float64)
        for numbers in ([0, 1, 2, 3], [4, 5]):
            (x_NF,), y_N = rows(numbers)
            seed = step_seed(0, record.step)
            measured = session.train_step((x_NF,), y_N, seed=seed, learning_rate=0.0, eps=0.1)
            total_Q += clipped(slopes_of_rows(TwoSided(), measured.row_losses, torch.tensor([0.1]), 3), 0.4).sum(1)
        released_Q = torch.tensor(record.projected_gradient, dtype=torch.float64)
        found += ((released_Q * 6 - total_Q) / (2.5 * 0.4)).tolist()
    low, high = chi2.ppf([1e-6, 1 - 1e-6], len(found))
    assert len(found) == 180 and low < sum(x * x for x in found) < high
    assert abs(statistics.fmean(found)) < 5 / math.sqrt(len(found))


def test_rows_are_drawn_one_by_one_and_more_of_them_than_a_batch_has(program: mobizo.Program, tmp_path: Path) -> None:
    session, rows = Session(program), Rows()
    per_step: list[int] = []
    before = 0

    def count(step: int, result: mobizo.StepResult) -> None:
        nonlocal before
        per_step.append(sum(map(len, rows.asked[before:])))
        before = len(rows.asked)
        assert result.loss == 0 and not result.lane_losses.any()

    privacy = Privacy(noise_multiplier=1.0, sample_rows=6)
    session.finetune_privately(rows, ALL, privacy, steps=200, learning_rate=0.01, on_step=count, run=tmp_path / "run")
    assert max(map(len, rows.asked)) <= ROWS < max(per_step) and len(set(per_step)) > 5
    assert abs(statistics.fmean(per_step) - 6) < 5 * math.sqrt(6 * (1 - 6 / ALL) / 200)
    taken = [number for asked in rows.asked for number in asked]
    assert set(taken) == set(range(ALL)) and bool(session.state().isfinite().all())


def test_nothing_of_it_can_be_guessed_from_the_seed(program: mobizo.Program, tmp_path: Path) -> None:
    """Two runs with the same seed have the same directions, other rows and other noise, also in steps without rows."""
    asked, released = [], []
    for name in ("a", "b"):
        rows = Rows(1000)
        privacy = Privacy(noise_multiplier=1.0, sample_rows=1)
        Session(program).finetune_privately(rows, 1000, privacy, steps=20, learning_rate=0.01, run=tmp_path / name)
        asked.append(rows.asked)
        released.append([record.projected_gradient for record in recorded(program, tmp_path / name)])
    assert asked[0] != asked[1] and all(len(steps) < 20 + 15 for steps in asked)
    numbers = [number for steps in released for step in steps for number in step]
    assert len(set(numbers)) == len(numbers) == 120


def test_a_run_goes_on_and_is_a_replay_of_its_journal(program: mobizo.Program, tmp_path: Path) -> None:
    run, rows, privacy = tmp_path / "run", Rows(), Privacy(epsilon=4.0, row_clip=0.5)
    session, settings = Session(program), {"learning_rate": 0.05, "run": run}
    with pytest.raises(KeyboardInterrupt):
        session.finetune_privately(rows, ALL, privacy, steps=9, on_step=_interrupted_at(3), **settings)
    kept = json.loads((run / "privacy.json").read_text())
    assert kept["steps"] == 4 and 2 < kept["epsilon_spent"] < 4
    session = Session(program)
    # What is left open is as it was.
    done = session.finetune_privately(rows, ALL, Privacy(epsilon=4.0), steps=9, **settings)
    assert (done.resumed_at, done.steps, set(done.losses), done.void, done.limit) == (4, 9, {0.0}, (), None)
    (run / "snapshot.safetensors").unlink()
    again = Session(program)
    assert again.restore(run) == 9 and torch.equal(again.state(), session.state())
    kept = json.loads((run / "privacy.json").read_text())
    assert kept["steps"] == 9 and kept["rows"] == ALL and 3.9 < kept["epsilon_spent"] <= 4.0
    # What was calibrated for nine steps is not enough for ten.
    more = session.finetune_privately(rows, ALL, privacy, steps=12, **settings)
    assert more.steps == 9 and more.limit == "the budget of epsilon 4 is spent"
    (run / "journal").unlink()
    with pytest.raises(JournalError, match="9 steps were counted, and the journal has 0"):
        session.finetune_privately(rows, ALL, privacy, steps=12, **settings)


def test_a_step_that_is_not_in_the_journal_did_not_happen(
    program: mobizo.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, run = Session(program), tmp_path / "run"
    append, after_two = Journal.append, []

    def full(journal: Journal, record: Any) -> None:
        if record.step == 2:
            raise JournalError("the disk is full", where="here")
        append(journal, record)
        after_two[:] = [session.state()]

    monkeypatch.setattr(Journal, "append", full)
    with pytest.raises(JournalError, match="disk is full"):
        session.finetune_privately(Rows(), ALL, COUNTED, steps=5, learning_rate=0.05, run=run)
    assert torch.equal(session.state(), after_two[0]) and json.loads((run / "privacy.json").read_text())["steps"] == 2


def test_settings_of_a_run_stay(program: mobizo.Program, tmp_path: Path) -> None:
    session, rows, steps = Session(program), Rows(), {"steps": 2, "learning_rate": 0.01}
    private, plain = tmp_path / "private", tmp_path / "plain"
    # Before its first step a run is not bound to anything.
    session.finetune_privately(
        rows, ALL, dataclasses.replace(COUNTED, row_clip=7.0), run=private, **steps | {"steps": 0}
    )
    session.finetune_privately(rows, ALL, COUNTED, run=private, **steps)
    other = dataclasses.replace(COUNTED, row_clip=2.0)
    with pytest.raises(RunMismatchError, match=r"another row_clip \(1.0 before, 2.0 now\)"):
        session.finetune_privately(rows, ALL, other, run=private, **steps)
    with pytest.raises(RunMismatchError, match="another rows"):
        session.finetune_privately(rows, ALL - 1, COUNTED, run=private, **steps)
    with pytest.raises(RunMismatchError, match="the run is private"):
        session.finetune([rows([0, 1, 2, 3])], run=private, **steps)
    session.finetune([rows([0, 1, 2, 3])], run=plain, **steps)
    with pytest.raises(RunMismatchError, match="begun without privacy"):
        session.finetune_privately(rows, ALL, COUNTED, run=plain, **steps)
    with pytest.raises(ConfigError, match="a state that is not the program's own"):
        session.finetune_privately(rows, ALL, COUNTED, run=tmp_path / "new", **steps)
    public = dataclasses.replace(COUNTED, public_start=True)
    assert session.finetune_privately(rows, ALL, public, run=tmp_path / "new", **steps).steps == 2


def test_steps_of_others_are_not_taken_for_private(program: mobizo.Program, tmp_path: Path) -> None:
    """A host that does not know of privacy.json goes on with a private run, and its steps are not noised."""
    session, rows, steps = Session(program), Rows(), {"learning_rate": 0.01, "run": tmp_path / "run"}
    session.finetune_privately(rows, ALL, COUNTED, steps=2, **steps)
    kept = (tmp_path / "run" / "privacy.json").rename(tmp_path / "kept")
    session.finetune([rows([0, 1, 2, 3])], steps=3, **steps)
    kept.rename(tmp_path / "run" / "privacy.json")
    with pytest.raises(RunMismatchError, match="steps that were not private"):
        session.finetune_privately(rows, ALL, COUNTED, steps=4, **steps)


def test_what_cannot_be_private_is_refused(program: mobizo.Program, tmp_path: Path) -> None:
    rows, steps = Rows(), {"steps": 2, "learning_rate": 0.01, "run": tmp_path / "run"}
    with pytest.raises(ConfigError, match="does not return the losses of rows"):
        Session(compiled(ZOConfig(queries=2))).finetune_privately(rows, ALL, COUNTED, **steps)
    session = Session(program)
    with pytest.raises(ConfigError, match="takes 4 rows on average, and there are 3"):
        session.finetune_privately(rows, 3, COUNTED, **steps)
    with pytest.raises(InputError, match="takes a function of row numbers"):
        session.finetune_privately([rows([0])], ALL, COUNTED, **steps)
    every = dataclasses.replace(COUNTED, sample_rows=ALL)
    with pytest.raises(InputError, match="input"):
        session.finetune_privately(
            lambda some: ((torch.zeros(len(some), 3),), rows.y_N[list(some)]), ALL, every, **steps
        )
    # More rows than were asked for would say more than a row may.
    with pytest.raises(InputError, match="asked for 3 rows and gave labels of shape \\[4\\]"):
        session.finetune_privately(
            lambda some: rows([0, 1, 2, 3]), 3, dataclasses.replace(every, sample_rows=3), **steps
        )
    assert torch.equal(session.state(), program.initial_state())


def test_rows_without_a_label_say_nothing(program: mobizo.Program, tmp_path: Path) -> None:
    rows = Rows()
    rows.y_N[:] = -100
    privacy = dataclasses.replace(COUNTED, sample_rows=ALL)
    done = Session(program).finetune_privately(rows, ALL, privacy, steps=2, learning_rate=0.01, run=tmp_path / "run")
    assert done.steps == 2 and not done.void


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_a_rule_that_remembers_sees_the_noised_step_alone(rule: str, tmp_path: Path) -> None:
    made = compiled(ZOConfig(queries=3, row_losses=True), rule=rule)
    session, run = Session(made), tmp_path / "run"
    privacy = dataclasses.replace(COUNTED, sample_rows=9)
    session.finetune_privately(Rows(), ALL, privacy, steps=8, learning_rate=0.01, run=run)
    again = Session(made)
    for record in recorded(made, run):
        again.replay(record.seed, record.projected_gradient, record.learning_rate)
    assert torch.equal(again.state(), session.state())


# The attack


def _advantage(session: Session, members: Rows, others: Rows) -> float:
    """Area under the curve of an attack that calls rows with a low loss members (Yeom et al. 2018)."""

    def losses(rows: Rows) -> Tensor:
        found = []
        for first in range(0, len(rows.y_N), ROWS):
            logits = session.evaluate((rows.x_NF[first : first + ROWS],))
            found.append(torch.nn.functional.cross_entropy(logits, rows.y_N[first : first + ROWS], reduction="none"))
        return torch.cat(found)

    lower = losses(members)[:, None] < losses(others)[None, :]
    return float(lower.double().mean())


@pytest.mark.slow
def test_who_was_learnt_shows_without_noise_and_not_with_it(tmp_path: Path) -> None:
    """24 rows learnt by heart; classes say nothing of rows, so that others are as hard as they come.

    1 is a sure attack, .5 a coin; means over five runs of 24 rows are within some .04.
    """
    lora, given = LoraConfig(r=8, lora_alpha=8, target_modules=("0", "2")), (torch.zeros(ROWS, FEATURES),)
    zo, loss = ZOConfig(queries=16, row_losses=True), SequenceClassificationLoss()
    learns = mobizo.compile(model(), given, lora, zo, loss=loss, backend="eager")
    count, steps = 24, 250
    members, others = Rows(count, seed=1), Rows(count, seed=2)

    def in_turns(step: int) -> tuple[tuple[Tensor], Tensor]:
        return members([(step * ROWS + place) % count for place in range(ROWS)])

    plain = Session(learns)
    plain.finetune(in_turns, steps=1000, learning_rate=0.3, eps=0.05)
    assert _advantage(plain, members, others) > 0.85

    def attacked(noise: float) -> float:
        privacy, found = Privacy(noise_multiplier=noise, delta=1e-3, row_clip=20.0), []
        for seed in range(5):
            members, others, private = Rows(count, seed=2 * seed), Rows(count, seed=2 * seed + 1), Session(learns)
            run = tmp_path / f"{noise}-{seed}"
            private.finetune_privately(members, count, privacy, steps=steps, learning_rate=0.3, eps=0.05, run=run)
            found.append(_advantage(private, members, others))
        return statistics.fmean(found)

    assert Accountant(12.0, ROWS / count, 1e-3).epsilon(steps) < 0.6
    # The same steps with the least noise there is learn by heart as well.
    assert (noised := attacked(12.0)) < 0.68 < (clear := attacked(0.2)), (noised, clear)


def _interrupted_at(last: int) -> Any:
    def interrupted(step: int, result: mobizo.StepResult) -> None:
        if step == last:
            raise KeyboardInterrupt

    return interrupted
