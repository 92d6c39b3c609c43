"""Batches as people have them: what is taken computes what it would in the plain form."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import BatchEncoding

import mobizo_compiler as mobizo
from mobizo_compiler import CausalLMLoss, JournalWarning, LoraConfig, Session, ZOConfig
from mobizo_compiler.device.batches import by_step
from mobizo_compiler.device.journal import Journal, Record, read_journal
from mobizo_compiler.device.run import START
from mobizo_compiler.errors import InputError, JournalError, LabelError, StateError
from mobizo_compiler.testing import TinyCausalLM

ROWS, TOKENS = 3, 7
STEP: dict[str, Any] = {"learning_rate": 0.05, "eps": 0.01}


def sample(number: int) -> dict[str, Tensor]:
    tokens = torch.randint(0, 23, (TOKENS,), generator=torch.Generator().manual_seed(number))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def stacked(samples: list[dict[str, Tensor]]) -> BatchEncoding:
    """What a collator of transformers makes."""
    return BatchEncoding({name: torch.stack([one[name] for one in samples]) for name in samples[0]})


def pair(batch: BatchEncoding) -> tuple[dict[str, Tensor], Tensor]:
    inputs = dict(batch)
    return inputs, inputs.pop("labels")


def compiled(rows: int = ROWS, **options: Any) -> mobizo.Program:
    torch.manual_seed(0)
    model, (inputs, _) = TinyCausalLM(layers=1).eval(), pair(stacked([sample(i) for i in range(rows)]))
    return mobizo.compile(model, inputs, LoraConfig(r=3), ZOConfig(queries=2), backend="eager", **options)


@pytest.fixture(scope="module")
def program() -> mobizo.Program:
    return compiled()


def test_labels_among_the_inputs(program: mobizo.Program) -> None:
    batch = stacked([sample(i) for i in range(ROWS)])
    inputs, labels = pair(batch)
    one, other = Session(program), Session(program)
    wanted = one.train_step(inputs, labels, seed=1, **STEP)
    found = other.train_step(batch, seed=1, **STEP)
    assert torch.equal(found.lane_losses, wanted.lane_losses) and torch.equal(one.state(), other.state())
    assert "labels" in batch, "what was given is left as it is"
    assert torch.equal(other.evaluate(batch)["logits"], one.evaluate(inputs)["logits"])


def test_a_model_that_takes_labels_keeps_them() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            result: Tensor = self.layer(x) + labels
            return result

    x, shift = torch.ones(2, 4), torch.ones(2, 1)
    program = mobizo.compile(
        Shifted().eval(), {"x": x, "labels": shift}, LoraConfig(r=2), loss=mobizo.MSELoss(), backend="eager"
    )
    session = Session(program)
    assert not torch.equal(session.evaluate({"x": x, "labels": shift}), session.evaluate({"x": x, "labels": 2 * shift}))
    with pytest.raises(InputError, match="there are no labels"):
        session.train_step({"x": x, "labels": shift}, seed=0, **STEP)


SCALARS: dict[str, Callable[[float], Any]] = {
    "float": float,
    "float32": numpy.float32,
    "float64": numpy.float64,
    "float16": numpy.float16,
}


@pytest.mark.parametrize("kind", SCALARS)
def test_scalars_of_numpy(kind: str, program: mobizo.Program, tmp_path: Path) -> None:
    """The number is what float32 makes of it, in the graph and in the journal."""
    session, plain, batch = Session(program), Session(program), stacked([sample(i) for i in range(ROWS)])
    rate, eps = SCALARS[kind](0.05), SCALARS[kind](0.01)
    session.train_step(batch, seed=numpy.int64(5), learning_rate=rate, eps=eps)
    plain.train_step(batch, seed=5, learning_rate=float(rate), eps=float(eps))
    assert session.state().any() and torch.equal(session.state(), plain.state())
    Session(program).finetune(
        [batch], steps=numpy.int64(2), seed=numpy.uint8(3), learning_rate=rate, eps=eps, run=tmp_path / "a"
    )
    Session(program).finetune([batch], steps=2, seed=3, learning_rate=float(rate), eps=float(eps), run=tmp_path / "b")
    assert (tmp_path / "a" / "journal").read_bytes() == (tmp_path / "b" / "journal").read_bytes()
    for record in read_journal(tmp_path / "a" / "journal", program):
        seen = torch.tensor([float(rate), float(eps)])
        assert (record.learning_rate, record.eps) == tuple(seen.tolist())


@pytest.mark.parametrize(
    ("given", "loss"),
    [
        (1, CausalLMLoss()),
        (2, CausalLMLoss(max_labels=TOKENS - 2)),
        (1, mobizo.ChoiceLoss(tuple(range(23)), max_labels=7)),
        pytest.param(2, CausalLMLoss(), marks=pytest.mark.slow),
        pytest.param(1, CausalLMLoss(max_labels=TOKENS - 2), marks=pytest.mark.slow),
        pytest.param(2, mobizo.ChoiceLoss(tuple(range(23)), max_labels=7), marks=pytest.mark.slow),
    ],
)
def test_rows_that_are_missing_do_not_count(given: int, loss: Any) -> None:
    """The step is that of a program for as many rows as there are."""
    batch = stacked([sample(i) for i in range(given)])
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :2] = -100
    wide, narrow = Session(compiled(loss=loss)), Session(compiled(given, loss=loss))
    found, wanted = (session.train_step(batch, seed=4, **STEP) for session in (wide, narrow))
    torch.testing.assert_close(found.lane_losses, wanted.lane_losses, rtol=1e-6, atol=1e-6)
    # A loss of 3 is rounded by 4e-7, a difference of two over 2 eps = 0.02 by 4e-5.
    torch.testing.assert_close(found.projected_gradient, wanted.projected_gradient, rtol=0, atol=1e-4)
    with pytest.raises(InputError, match=r"'input_ids' has shape"):
        wide.evaluate(batch)


def test_rows_are_not_filled_where_all_rows_count() -> None:
    program = mobizo.compile(
        nn.Linear(4, 3).eval(), (torch.ones(3, 4),), LoraConfig(r=2), loss=mobizo.MSELoss(), backend="eager"
    )
    with pytest.raises(InputError, match=r"has shape \[2, 4\], the program takes \[3, 4\]"):
        Session(program).train_step((torch.ones(2, 4),), torch.ones(2, 3), seed=0, **STEP)


def test_rows_in_another_axis_are_filled_there() -> None:
    class BatchSecond(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            result: Tensor = self.layer(x + table).mean(0)
            return result

    torch.manual_seed(0)
    model, x, table = BatchSecond().eval(), torch.randn(7, 3, 6), torch.randn(7, 1, 6)

    def session(rows: int) -> Session:
        loss, axes = mobizo.SequenceClassificationLoss(), {0: 1, 1: None}
        options: dict[str, Any] = {"row_axes": axes, "loss": loss, "backend": "eager"}
        return Session(mobizo.compile(model, (x[:, :rows], table), LoraConfig(r=2), ZOConfig(queries=2), **options))

    labels = torch.tensor([1, 4])
    found = session(3).train_step((x[:, :2], table), labels, seed=1, **STEP)
    wanted = session(2).train_step((x[:, :2], table), labels, seed=1, **STEP)
    torch.testing.assert_close(found.projected_gradient, wanted.projected_gradient, rtol=0, atol=1e-4)


def loader(**options: Any) -> DataLoader[Any]:
    """Three batches, the last of one row."""
    samples: Any = [sample(i) for i in range(2 * ROWS + 1)]
    return DataLoader(samples, batch_size=ROWS, collate_fn=stacked, **options)


def test_a_loader_of_transformers(program: mobizo.Program, tmp_path: Path) -> None:
    """Gone through again and again, taken up in the middle of a pass, the last batch of each pass filled."""
    batches = list(loader())
    assert len(batches) == 3 and batches[2]["input_ids"].shape[0] == 1
    plain = Session(program)
    plain.finetune([pair(batch) for batch in batches], steps=8, run=tmp_path / "plain", **STEP)
    first, second = Session(program), Session(program)
    first.finetune(loader(), steps=5, run=tmp_path / "loader", **STEP)
    summary = second.finetune(loader(), steps=8, run=tmp_path / "loader", **STEP)
    assert (summary.resumed_at, summary.steps) == (5, 8)
    assert (tmp_path / "loader" / "journal").read_bytes() == (tmp_path / "plain" / "journal").read_bytes()
    assert torch.equal(second.state(), plain.state())


def test_a_loader_is_read_once_for_each_step(tmp_path: Path) -> None:
    read: list[int] = []

    class Numbers(IterableDataset[Any]):
        def __iter__(self) -> Iterator[tuple[int, int]]:
            for number in range(3):
                read.append(number)
                yield number, number

    batch = by_step(DataLoader(Numbers(), batch_size=None))
    assert [batch(step)[0] for step in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert read == [0, 1, 2, 0, 1, 2, 0]
    assert [batch(step)[0] for step in (1, 8)] == [1, 2], "back and forth"
    with_length = by_step(DataLoader(TensorDataset(torch.arange(3), torch.arange(3)), batch_size=None))
    assert [int(with_length(step)[0]) for step in (1000, 1001, 1002, 2)] == [1, 2, 0, 2]


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        (DataLoader([], batch_size=1), "batches is empty"),
        ([], "batches is empty"),
        (iter([1]), "a generator cannot be rewound"),
        ({"input_ids": 1}, "batches is a dict"),
        (3, "batches is a int"),
        ([1], "a batch is a int"),
        ([(1, 2, 3)], "a batch is 3 values"),
        (lambda step: None, "a batch is a NoneType"),
        ([{"input_ids": torch.zeros(3, 7)}], "there are no labels"),
    ],
)
def test_other_batches_are_refused(batches: Any, match: str, program: mobizo.Program, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=match):
        Session(program).finetune(batches, steps=1, run=tmp_path / "run", **STEP)


def test_a_run_without_a_folder(program: mobizo.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[int] = []
    session, kept = Session(program), Session(program)
    summary = session.finetune(loader(), steps=5, on_step=lambda step, _: told.append(step), **STEP)
    assert not list(tmp_path.iterdir()) and told == list(range(5))
    assert summary == kept.finetune(loader(), steps=5, run=tmp_path / "run", **STEP)
    assert torch.equal(session.state(), kept.state())
    assert session.finetune(loader(), steps=3, stop=lambda: True, **STEP).steps == 0


@pytest.mark.parametrize("rate", [1e39, -1e39, 1e-50, math.nan, True, "fast"])
def test_learning_rates_that_float32_has_not(rate: Any, program: mobizo.Program, tmp_path: Path) -> None:
    session, batch = Session(program), stacked([sample(i) for i in range(ROWS)])
    with pytest.raises(InputError, match="learning_rate is"):
        session.finetune([batch], steps=1, learning_rate=rate, run=tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing is left of a run that was refused at once"
    with pytest.raises(InputError, match="learning_rate is"):
        session.replay(0, [1.0, 1.0], rate)
    with pytest.raises(InputError, match="learning_rate is"):
        session.finetune([batch], steps=1, learning_rate=lambda step: rate, run=tmp_path / "run")
    assert not session.state().any()


@pytest.mark.parametrize("weight", [1e39, 1e-50, 1e-45])
def test_a_merge_changes_nothing_or_all(weight: float, program: mobizo.Program, tmp_path: Path) -> None:
    """The last weight is a number, and the learning rates times it are none."""
    batch = stacked([sample(i) for i in range(ROWS)])
    Session(program).finetune([batch], steps=3, run=tmp_path, **STEP)
    with Journal(tmp_path / "large", program) as large:
        for step in range(8):
            large.append(Record(step, 1, 1.0, 0.1, 0.1, (8.0, 8.0)))
    journals = [tmp_path / "journal", tmp_path / "large"]
    session = Session(program)
    with pytest.raises(InputError, match="in float32"):
        session.merge([tmp_path / "journal"], weight=weight)
    assert not session.state().any()
    with pytest.raises(StateError, match="too large for float32"):
        session.merge(journals, weight=3e38)
    assert not session.state().any()
    session.merge([tmp_path / "journal"])
    assert session.state().any()


def test_a_journal_is_merged_once(program: mobizo.Program, tmp_path: Path) -> None:
    batch = stacked([sample(i) for i in range(ROWS)])
    for device, seed in (("a", 1), ("b", 1), ("c", 2)):
        Session(program).finetune([batch], steps=2, seed=seed, run=tmp_path / device, **STEP)
    session = Session(program)
    for same in ("a", "b"):
        with pytest.raises(InputError, match=r"/a/journal and \S*/journal hold the same steps(.|\n)*distinct seeds"):
            session.merge([tmp_path / device / "journal" for device in ("a", "c", same)])
    assert not session.state().any()
    assert session.merge([tmp_path / device / "journal" for device in ("a", "c")]) == 4


@pytest.mark.parametrize("backend", ["eager", pytest.param("portable", marks=pytest.mark.slow)])
def test_an_update_that_is_too_large_changes_nothing(backend: str, tmp_path: Path) -> None:
    """A learning rate that float32 has, and that destroys the state."""
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(6, 5)).eval(), torch.randn(2, 6)
    loss: Any = mobizo.MSELoss()
    session = Session(mobizo.compile(layer, (x,), LoraConfig(r=2), ZOConfig(queries=2), loss, backend=backend))
    target = torch.full((2, 5), 1e4)
    session.train_step((x,), target, seed=1, learning_rate=1e-6)
    before = session.state()
    with pytest.raises(StateError, match=r"too large for float32(.|\n)*lower learning rate"):
        session.train_step((x,), target, seed=2, learning_rate=3e38)
    with pytest.raises(StateError, match="too large for float32"):
        session.replay(2, [100.0, 1.0], 3e38)
    with pytest.raises(StateError, match="too large for float32"):
        session.finetune([((x,), target)], steps=2, learning_rate=3e38, run=tmp_path)
    assert before.any() and torch.equal(session.state(), before)
    session.finetune([((x,), target)], steps=2, learning_rate=1e-6, run=tmp_path)
    assert session.restore(tmp_path) == 2


def test_a_journal_of_no_bytes_is_begun_anew(program: mobizo.Program, tmp_path: Path) -> None:
    """As a process leaves it that dies while the system makes the file."""
    batch = stacked([sample(i) for i in range(ROWS)])
    for run, start in ((tmp_path / "first", False), (tmp_path / "second", True)):
        Session(program).finetune([batch], steps=0 if start else 1, run=run, **STEP)
        if not start:
            for path in run.iterdir():
                path.unlink()
        assert (run / START).exists() == start
        (run / "journal").write_bytes(b"")
        with pytest.warns(JournalWarning, match="the journal is empty, and is begun anew"):
            summary = Session(program).finetune([batch], steps=2, run=run, **STEP)
        assert (summary.resumed_at, summary.steps) == (0, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", JournalWarning)
        assert Session(program).restore(run) == 2
    (run / "journal").write_bytes(b"")
    with pytest.raises(JournalError, match=r"the journal is empty, but there is a snapshot(.|\n)*begins anew"):
        Session(program).finetune([batch], steps=2, run=run, **STEP)
    assert (run / "journal").stat().st_size == 0, "nothing is changed"
    with pytest.raises(JournalError, match="the journal is empty"):
        read_journal(run / "journal", program)
    with pytest.warns(JournalWarning, match="begun anew"):
        Journal(run / "journal", program).close()


def test_a_batch_without_labels_that_count_is_an_error_also_when_filled(program: mobizo.Program) -> None:
    batch = stacked([sample(0)])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(LabelError, match="nothing is labelled"):
        Session(program).train_step(batch, seed=0, **STEP)
