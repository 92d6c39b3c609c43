"""Programs whose prefix is a method of its own, and the file that keeps what it made of every row."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, ZOConfig
from mobizo_compiler.analysis.costs import multiply_adds
from mobizo_compiler.device.prefix_cache import PrefixCacheWarning
from mobizo_compiler.errors import ConfigError, InputError, JournalLockedError
from mobizo_compiler.step.losses import CausalLMLoss
from mobizo_compiler.testing import TinyCausalLM, zoo
from mobizo_compiler.text.data import TextData
from mobizo_compiler.text.evaluation import measure
from mobizo_compiler.text.prompts import PromptConfig, Sample

pytestmark = pytest.mark.xdist_group("prefix")  # one process, so that its programs are made once

LAYERS, ROWS, TOKENS = 2, 3, 6
LORA = {
    "last block": LoraConfig(r=3, layers_to_transform=1),
    "last feed-forward": LoraConfig(r=3, target_modules=("up_proj", "down_proj"), layers_to_transform=1),
}


def batch(step: int) -> tuple[Any, torch.Tensor]:
    """Rows of an epoch of five batches."""
    ids = torch.randint(1, 23, (5, ROWS, TOKENS), generator=torch.Generator().manual_seed(0))[step % 5]
    return (ids, torch.ones_like(ids)), torch.cat((torch.full((ROWS, TOKENS - 1), -100), ids[:, -1:]), 1)


class Classes(torch.nn.Module):
    """Two classes from what a decoder makes of the last token."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.decoder, self.score = TinyCausalLM(vocabulary=vocabulary), torch.nn.Linear(vocabulary, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.score(self.decoder(input_ids, attention_mask)["logits"][:, -1])
        return scores


@functools.cache
def program(where: str, backend: str, split: bool = True, **options: Any) -> mobizo.Program:
    torch.manual_seed(0)
    return mobizo.compile(
        TinyCausalLM(layers=LAYERS).eval(),
        batch(0)[0],
        LORA[where],
        ZOConfig(queries=2, **options),
        CausalLMLoss(max_labels=1),
        backend=backend,
        split_prefix=split,
    )


@pytest.mark.parametrize(
    ("where", "backend"),
    [(where, "eager") for where in LORA]
    + [pytest.param(where, backend, marks=pytest.mark.slow) for where in LORA for backend in ("portable", "xnnpack")]
    + [pytest.param("last feed-forward", "aot_inductor", marks=pytest.mark.slow)],
)
def test_a_step_from_the_prefix_is_the_whole_step(where: str, backend: str, tmp_path: Path) -> None:
    whole, split = program(where, "eager", split=False), program(where, backend)
    sessions = Session(whole), Session(split), Session(split, prefix_cache=tmp_path / "rows")
    for step in range(11):
        options: dict[str, Any] = {"seed": step, "learning_rate": 0.05, "eps": 0.05}
        results = [session.train_step(*batch(step), **options) for session in sessions]
        torch.testing.assert_close(results[0].lane_losses, results[1].lane_losses, rtol=0, atol=2e-5)
        assert torch.equal(results[1].lane_losses, results[2].lane_losses)
    assert torch.equal(sessions[1].state(), sessions[2].state())
    torch.testing.assert_close(sessions[0].state(), sessions[1].state(), rtol=0, atol=1e-3)
    assert sessions[0].state().abs().max() > 1e-3
    first, second = sessions[0].evaluate(batch(1)[0]), sessions[1].evaluate(batch(1)[0])
    torch.testing.assert_close(first, second, rtol=0, atol=1e-3)


@pytest.mark.parametrize("where", LORA)
def test_rows_are_measured_from_the_prefix(where: str, tmp_path: Path) -> None:
    """The losses of `evaluate`'s logits, for labels of the rows and for others, from one computation of each row."""
    session = Session(program(where, "eager"), prefix_cache=tmp_path / "rows")
    session.train_step(*batch(0), seed=0, learning_rate=0.5, eps=0.05)
    calls: list[str] = []
    inner = session._runner.call
    session._runner.call = lambda method, given: (calls.append(method), inner(method, given))[1]  # type: ignore[method-assign]
    for rows in (ROWS, ROWS - 1):  # a batch may have fewer
        inputs, labels = batch(0)
        inputs, labels = tuple(value[:rows] for value in inputs), labels[:rows]
        other = labels.where(labels == -100, 7)
        loss, weight = session.row_losses(inputs, labels, [other])
        logits = session.evaluate(batch(0)[0])["logits"][:rows, -2]
        for found, answer in zip(loss, (labels, other), strict=True):
            wanted = torch.nn.functional.cross_entropy(logits, answer[:, -1], reduction="none")
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert torch.equal(weight, torch.ones(2, rows))
    assert calls.count("prefix") == 1  # of the filled batch; the whole one was kept by the step
    with pytest.raises(InputError, match="do not count where"):
        session.row_losses(inputs, labels, [labels.roll(-1, dims=1)])
    with pytest.raises(ConfigError, match="no prefix that rows start from"):
        Session(program(where, "eager", split=False)).row_losses(*batch(0))


@pytest.mark.parametrize(
    ("loss", "answers"),
    [
        (CausalLMLoss(max_labels=2), ("happy", "sad")),
        (CausalLMLoss(max_labels=3), ("happy", "sad sad")),
        (mobizo.ChoiceLoss((0, 1), max_labels=1), ("happy", "sad")),
        (mobizo.SequenceClassificationLoss(), ("1", "0")),
    ],
    ids=["one token", "several tokens", "choices", "classes"],
)
def test_a_score_from_the_prefix_is_that_of_the_whole_model(
    loss: Any, answers: tuple[str, str], words: Any, tmp_path: Path
) -> None:
    """What is validated during a run, from what is kept of the rows; the rows are computed once in all."""
    if isinstance(loss, mobizo.ChoiceLoss):
        loss = dataclasses.replace(loss, choices=tuple(words(answer).input_ids[0] for answer in answers))
    torch.manual_seed(0)
    ids = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    classes = isinstance(loss, mobizo.SequenceClassificationLoss)
    model = Classes(len(words)).eval() if classes else TinyCausalLM(vocabulary=len(words)).eval()
    split = mobizo.compile(
        model, {"input_ids": ids, "attention_mask": ids}, LORA["last block"], loss=loss, backend="eager",
        split_prefix=True,
    )  # fmt: skip
    prompt = PromptConfig("{text} :", answer_column="tone", choices=None if classes else answers, end_answers=False)
    rows = [("good day", 0), ("bad", 1), ("the rain", 1), ("a sun", 0)]  # a batch, and one that is not full
    texts = [Sample({"text": text}, answers[right], text) for text, right in rows]
    data = TextData.encode(texts, split.manifest, words, prompt)
    plain, kept = Session(split), Session(split, prefix_cache=tmp_path / "rows")
    for step in range(5):
        plain.train_step(*data.batches(0)(step), seed=step, learning_rate=0.5)
    kept.load_state(plain.state())
    wanted, found = measure(plain, data), measure(kept, data)
    assert wanted is not None and found is not None and wanted.log_NC is not None
    torch.testing.assert_close(found.log_NC, wanted.log_NC, rtol=0, atol=1e-5)
    if not isinstance(loss, mobizo.ChoiceLoss):
        assert found.score.loss == pytest.approx(wanted.score.loss, abs=1e-5)
    inner = kept._runner.call
    kept._runner.call = lambda method, given: (inner(method, given), calls.append(method))[0]  # type: ignore[method-assign]
    calls: list[str] = []
    assert measure(kept, data).score == found.score  # type: ignore[union-attr]
    assert set(calls) == {"row_losses"}


@pytest.mark.parametrize("where", LORA)
def test_the_step_no_longer_has_the_prefix(where: str) -> None:
    whole, split = program(where, "eager", split=False), program(where, "eager")

    def products(graph: Any) -> int:
        return sum(map(multiply_adds, graph.graph.nodes))

    step, rest = products(whole.methods["train_step"]), products(split.methods["train_step"])
    assert rest + products(split.methods["prefix"]) == step
    assert rest < 0.8 * step
    assert "input_ids" not in str(split.methods["train_step"].inputs)


def test_a_row_is_computed_once(tmp_path: Path) -> None:
    split = program("last block", "eager")
    session = Session(split, prefix_cache=tmp_path / "rows")
    calls: list[str] = []
    inner = session._runner.call
    session._runner.call = lambda method, given: (calls.append(method), inner(method, given))[1]  # type: ignore[method-assign]
    for step in range(10):
        session.train_step(*batch(step), seed=step, learning_rate=0.1)
    assert calls.count("prefix") == 5 and calls.count("train_step") == 10
    with pytest.raises(JournalLockedError):
        Session(split, prefix_cache=tmp_path / "rows")
    session.close()
    size = (tmp_path / "rows").stat().st_size
    again = Session(split, prefix_cache=tmp_path / "rows")
    inner_again, later = again._runner.call, []
    again._runner.call = lambda method, given: (later.append(method), inner_again(method, given))[1]  # type: ignore[method-assign]
    again.train_step(*batch(0), seed=0, learning_rate=0.1)
    assert later == ["train_step"] and (tmp_path / "rows").stat().st_size == size
    again.close()
    limited = Session(split, prefix_cache=tmp_path / "small", prefix_cache_bytes=size // 2)
    for step in range(10):
        limited.train_step(*batch(step), seed=step, learning_rate=0.1)
    assert torch.equal(limited.state(), session.state())
    assert 0 < (tmp_path / "small").stat().st_size <= size // 2


def test_damage_costs_time_and_nothing_else(tmp_path: Path) -> None:
    split, path = program("last block", "eager"), tmp_path / "rows"
    session = Session(split, prefix_cache=path)
    expected = [session.train_step(*batch(s), seed=s, learning_rate=0.0).lane_losses for s in range(5)]
    session.close()
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        place = int(torch.randint(0, len(whole), (1,), generator=generator))
        cut = int(torch.randint(0, 2, (1,), generator=generator))
        path.write_bytes(whole[:place] + (b"" if cut else bytes([whole[place] ^ 16]) + whole[place + 1 :]))
        damaged = Session(split, prefix_cache=path)
        for s in range(5):
            found = damaged.train_step(*batch(s), seed=s, learning_rate=0.0).lane_losses
            assert torch.equal(found, expected[s])
        damaged.close()
    other = program("last feed-forward", "eager")
    foreign = Session(other, prefix_cache=path)
    foreign.train_step(*batch(0), seed=0, learning_rate=0.0)
    foreign.close()


@pytest.mark.parametrize("how", ["half", "none"])
def test_a_full_disk_costs_time_and_nothing_else(how: str, tmp_path: Path) -> None:
    """The run goes on, the rows that are there stay whole, and the next session reads them."""
    split, path = program("last block", "eager"), tmp_path / "rows"

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            written: int = self.file.write(data[: len(data) // 2])
            if how == "none":
                raise OSError(28, "No space left on device")
            return written

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    plain, session = Session(split), Session(split, prefix_cache=path)
    for step in range(5):
        if step == 2:
            cache: Any = session._prefix_cache
            before, cache._file = path.stat().st_size, Full(cache._file)
        for one in (plain, session):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                one.train_step(*batch(step), seed=step, learning_rate=0.1)
            said = [w for w in caught if w.category is PrefixCacheWarning]
            assert len(said) == (one is session and step == 2), "it is said once"
    assert torch.equal(plain.state(), session.state()) and path.stat().st_size == before
    session.close()
    again = Session(split, prefix_cache=path)
    assert again._prefix_cache is not None and again._prefix_cache.rows == 6
    again.close()


@pytest.mark.parametrize("limit", [-1, "1 GB", 0.5])
def test_limits_that_are_none(limit: Any, tmp_path: Path) -> None:
    split = program("last block", "eager")
    with pytest.raises(InputError, match="prefix_cache_bytes is"):
        Session(split, prefix_cache=tmp_path / "rows", prefix_cache_bytes=limit)
    with pytest.raises(InputError, match="prefix_cache is not"):
        Session(split, prefix_cache_bytes=1000)


def test_a_place_that_is_no_file_is_left_unlocked(tmp_path: Path) -> None:
    split = program("last block", "eager")
    (tmp_path / "rows").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        Session(split, prefix_cache=tmp_path / "rows")
    (tmp_path / "rows").rmdir()
    Session(split, prefix_cache=tmp_path / "rows").close()


def test_rows_that_share_an_axis_are_kept_apart(tmp_path: Path) -> None:
    """GPT-2 multiplies [rows * tokens, width]: the prefix ends there, and is kept row by row."""
    case = zoo()["gpt2"]
    lora = LoraConfig(r=2, target_modules=("c_fc",), layers_to_transform=1)
    inputs, options = case.inputs(), {"backend": "eager"}
    whole, split = (
        Session(mobizo.compile(case.model(), inputs, lora, ZOConfig(queries=1), split_prefix=split, **options), **kept)
        for split, kept in ((False, {}), (True, {"prefix_cache": tmp_path / "rows"}))
    )
    order = torch.tensor([2, 0, 1])
    for turned in (slice(None), order):
        rows = {name: value[turned] for name, value in inputs.items()}
        steps = [s.train_step(rows, rows["input_ids"], seed=1, learning_rate=0.05, eps=0.05) for s in (whole, split)]
        torch.testing.assert_close(steps[0].lane_losses, steps[1].lane_losses, rtol=0, atol=2e-5)
    cache: Any = split._prefix_cache
    assert cache.rows == 3


def test_what_has_no_prefix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no prefix"):
        Session(program("last block", "eager", split=False), prefix_cache=tmp_path / "rows")
    with pytest.raises(ConfigError, match="exclude"):
        mobizo.compile(
            TinyCausalLM().eval(),
            batch(0)[0],
            backend="eager",
            split_prefix=True,
            dynamic_shapes={name: {1: torch.export.Dim("tokens", max=9)} for name in (0, 1)},
        )


@pytest.mark.slow
def test_runs_with_a_prefix_resume(tmp_path: Path) -> None:
    split = program("last feed-forward", "portable", estimator="one-sided", normalize=True)
    whole, part = Session(split), Session(split, prefix_cache=tmp_path / "rows")
    whole.finetune(batch, steps=8, learning_rate=0.05, run=tmp_path / "whole")
    part.finetune(batch, steps=3, learning_rate=0.05, run=tmp_path / "part")
    resumed = Session(split)
    resumed.finetune(batch, steps=8, learning_rate=0.05, run=tmp_path / "part")
    assert torch.equal(resumed.state(), whole.state())
    split.save(tmp_path / "program.pte")
    loaded = Session(tmp_path / "program.pte")
    loaded.restore(tmp_path / "whole")
    assert torch.equal(loaded.state(), whole.state())
