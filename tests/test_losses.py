"""Losses against PyTorch's, through whole steps on every kind of output; functions as losses; rewards from a host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_compiler as mobizo
from mobizo_compiler import (
    LoraConfig,
    MaskedLMLoss,
    MSELoss,
    SequenceClassificationLoss,
    Session,
    TokenClassificationLoss,
    ZOConfig,
)
from mobizo_compiler.errors import ConfigError, InputError, LabelError, LossError, RowMixingError, TokenRangeError
from mobizo_compiler.step.losses import CallableLoss
from mobizo_compiler.testing import Oracle, TinyCausalLM, TokenWise, check_against_oracle, tiny_batch

TOKENS = (torch.tensor([[1, 2, 3, 4, 0], [5, 6, 7, 8, 9], [3, 1, 4, 1, 5]]),)
LORA = LoraConfig(r=3, lora_alpha=5, target_modules=("up",))


class Pooled(TokenWise):
    """Outputs of many shapes, as a dict with values that are no tensors."""

    def forward(self, tokens: Tensor) -> Any:
        logits = super().forward(tokens)
        return {"logits": logits.mean(1), "nested": {"value": logits[:, :, 0].mean(1)}, "length": 5, "nothing": None}


def test_masked_lm_is_cross_entropy_without_a_shift() -> None:
    logits, labels = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    labels[0, 2:], labels[2, :5] = -100, -100
    total, count = MaskedLMLoss()(logits, labels)
    torch.testing.assert_close(total.sum() / count.sum(), F.cross_entropy(logits.transpose(1, 2), labels))
    labels[1, :5] = -100
    torch.testing.assert_close(MaskedLMLoss(max_labels=2)(logits, labels), MaskedLMLoss()(logits, labels))
    assert TokenClassificationLoss is MaskedLMLoss


def test_sequence_classification_and_regression() -> None:
    logits, labels = torch.randn(4, 6), torch.tensor([5, -100, 0, 3])
    total, count = SequenceClassificationLoss()(logits, labels)
    torch.testing.assert_close(total.sum() / count.sum(), F.cross_entropy(logits, labels))
    assert count.tolist() == [1, 0, 1, 1]
    target = torch.randn(4, 6)
    error, count = MSELoss()(logits, target)
    torch.testing.assert_close(error.mean(), F.mse_loss(logits, target))
    torch.testing.assert_close(MSELoss("b")({"a": target, "b": logits}, target)[0], error)
    assert MSELoss()(logits[:, 0], target[:, 0])[0].shape == (4,)


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (TokenWise, MaskedLMLoss()),
        (TokenWise, MaskedLMLoss(max_labels=2)),
        (Pooled, SequenceClassificationLoss()),
        (Pooled, MSELoss()),
    ],
    ids=repr,
)
def test_steps_with_every_loss(model: type[nn.Module], loss: Any) -> None:
    torch.manual_seed(0)
    check_against_oracle(model().eval(), TOKENS, backend="eager", lora=LORA, loss=loss)


def cross_entropy_per_row(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs["logits"], labels, reduction="none", label_smoothing=0.1)


def squared_error(outputs: Any, labels: Tensor) -> Tensor:
    """`mse_loss` broadcasts its operands first."""
    return F.mse_loss(outputs["logits"], labels[:, None] * 0.1, reduction="none").mean(1)


def share_of_the_batch(outputs: Any, labels: Tensor) -> Tensor:
    """The number of rows as a number: it must be that of a lane, not that of all lanes."""
    return F.cross_entropy(outputs["logits"], labels, reduction="none") / labels.shape[0]


def misses(outputs: Any, labels: Tensor) -> Tensor:
    """Not differentiable: how many classes score higher than the right one."""
    right = outputs["logits"].gather(1, labels[:, None])
    return (outputs["logits"] > right).sum(1) + outputs["nested"]["value"] * 0


FUNCTIONS = (cross_entropy_per_row, squared_error, misses, share_of_the_batch)
ENGINES = [(function, "eager") for function in FUNCTIONS]
ENGINES += [pytest.param(function, "portable", marks=pytest.mark.slow) for function in FUNCTIONS]


@pytest.mark.parametrize(("function", "backend"), ENGINES)
def test_any_function_of_outputs_and_labels(function: Any, backend: str) -> None:
    torch.manual_seed(0)
    model, labels = Pooled().eval(), torch.tensor([3, 9, 0])
    program = mobizo.compile(model, TOKENS, LORA, ZOConfig(queries=2), function, backend=backend, example_labels=labels)
    session = Session(program)
    oracle = Oracle(
        model,
        program.sites,
        program.lora_a_by_fqn,
        zo=program.manifest.zo,
        loss=CallableLoss(function, (), torch.int64),
    )
    oracle.state = torch.randn(program.parameters, generator=torch.Generator().manual_seed(1)).double()
    session.load_state(oracle.state.float())
    found = session.train_step(TOKENS, labels, seed=1, learning_rate=0.1, eps=0.5)
    wanted = oracle.train_step(TOKENS, labels, seed=1, learning_rate=0.1, eps=0.5)
    torch.testing.assert_close(found.lane_losses.double(), wanted.lane_losses.double(), rtol=0, atol=1e-5)
    assert found.lane_losses.std() > 0
    assert program.manifest.loss["function"] == function.__qualname__
    outputs = session.evaluate(TOKENS)
    assert (outputs["length"], outputs["nothing"]) == (5, None)
    torch.testing.assert_close(outputs["nested"]["value"].double(), oracle.evaluate(TOKENS)["nested"]["value"])


def compiled(loss: Any, **options: Any) -> mobizo.Program:
    return mobizo.compile(Pooled().eval(), TOKENS, LORA, ZOConfig(queries=2), loss, backend="eager", **options)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda o, y: F.cross_entropy(o["logits"], y), LossError, 'reduction="none"'),
        (lambda o, y: F.mse_loss(o["logits"][:, 0], y * 1.0) * torch.ones_like(y), RowMixingError, 'reduction="none"'),
        (lambda o, y: o["logits"][:, 0] - o["logits"].mean(0)[:1], RowMixingError, "mean over the batch"),
        (lambda o, y: o["logits"], LossError, "must return one loss per row"),
        (lambda o, y: o["logits"].mean(1)[:-1], LossError, r"not \[rows\]"),
        (lambda o, y: o["missing"], LossError, "cannot be traced"),
        (lambda o, y: torch.tensor([float(v) for v in y]), LossError, "replay"),
    ],
)
def test_functions_that_are_no_row_losses(loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compiled(loss, example_labels=torch.tensor([3, 9, 0]))


def test_functions_need_example_labels_and_others_have_no_use_for_them() -> None:
    with pytest.raises(ConfigError, match="example_labels must be a tensor"):
        compiled(cross_entropy_per_row)
    with pytest.raises(ConfigError, match="only for a loss that is a function"):
        compiled(MSELoss(), example_labels=torch.zeros(3))
    with pytest.raises(LossError, match=r"output named 'embeds'"):
        compiled(MSELoss("embeds"))
    with pytest.raises(LossError, match=r"logits of shape \[rows, tokens, vocabulary\]"):
        compiled(MaskedLMLoss())


def test_labels_of_whole_rows_are_checked() -> None:
    session = Session(compiled(SequenceClassificationLoss()))
    step = {"seed": 1, "learning_rate": 0.1, "eps": 0.1}
    with pytest.raises(TokenRangeError, match="the value 11"):
        session.train_step(TOKENS, torch.tensor([0, 11, 2]), **step)  # type: ignore[arg-type]
    with pytest.raises(LabelError, match="nothing is labelled"):
        session.train_step(TOKENS, torch.full((3,), -100), **step)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"labels' has shape \[2\]"):
        session.train_step(TOKENS, torch.tensor([0, 1]), **step)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["eager", pytest.param("portable", marks=pytest.mark.slow)])
def test_lanes_that_a_host_runs_are_the_lanes_of_a_step(backend: str) -> None:
    torch.manual_seed(0)
    inputs, labels = tiny_batch()
    model = TinyCausalLM(layers=1).eval()
    program = mobizo.compile(model, inputs, LoraConfig(r=3), ZOConfig(queries=2), backend=backend)
    session = Session(program)
    start = torch.randn(program.parameters, generator=torch.Generator().manual_seed(1)) * 0.3
    session.load_state(start)
    scored = session.train_step(inputs, labels, seed=4, learning_rate=0.0, eps=0.05)
    losses = []
    for index in range(4):
        with session.lane(index, seed=4, eps=0.05):
            row_loss, row_weight = mobizo.CausalLMLoss()(session.evaluate(inputs), labels)
        losses.append(row_loss.sum() / row_weight.sum())
        assert torch.equal(session.state(), start)
    torch.testing.assert_close(torch.stack(losses), scored.lane_losses, rtol=0, atol=3e-6)
    with pytest.raises(RuntimeError, match="host"), session.lane(0, seed=4, eps=0.05):
        raise RuntimeError("host")
    assert torch.equal(session.state(), start)
    for arguments in ({"index": 4}, {"eps": 0.0}, {"seed": -1}, {"eps": float("nan")}):
        with pytest.raises(InputError), session.lane(**{"index": 0, "seed": 4, "eps": 0.1, **arguments}):  # type: ignore[arg-type]
            pass


def test_what_does_not_count_is_selected_away() -> None:
    """Logits that are -inf or no number where nothing is labelled: PyTorch's `ignore_index` leaves them out."""
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 9), torch.randint(1, 9, (3, 6))
    labels[0, :3], labels[1] = -100, -100
    logits[..., 0] = -torch.inf  # as a token that the model never gives
    logits[0, :2] = torch.nan  # as rows of padding come out of attention with masks of -inf
    wanted = F.cross_entropy(logits.transpose(1, 2), labels)
    assert wanted.isfinite()
    for loss in (MaskedLMLoss(), MaskedLMLoss(max_labels=6)):
        total, count = loss(logits, labels)
        torch.testing.assert_close(total.sum() / count.sum(), wanted)
    shifted = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])
    for causal in (mobizo.CausalLMLoss(), mobizo.CausalLMLoss(max_labels=5)):
        total, count = causal(logits, labels)
        torch.testing.assert_close(total.sum() / count.sum(), shifted)
    choices = torch.where(labels == -100, -100, labels % 2 + 3)
    total, count = mobizo.ChoiceLoss((3, 4), max_labels=None)(logits, choices)
    among = F.cross_entropy(logits[:, :-1, 3:5].transpose(1, 2), torch.where(choices < 0, choices, choices - 3)[:, 1:])
    torch.testing.assert_close(total.sum() / count.sum(), among)
    classes = torch.tensor([2, -100, 5])
    rows = logits[:, 3].clone()
    rows[1] = torch.nan
    total, count = SequenceClassificationLoss()(rows, classes)
    torch.testing.assert_close(total.sum() / count.sum(), F.cross_entropy(rows, classes))


class NeverPads(TokenWise):
    """The logit of token 0 is -inf in every row."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).masked_fill(torch.arange(11) == 0, -torch.inf)


class LeftPadded(nn.Module):
    """Attention by hand with a mask of -inf: queries at padding on the left see nothing, and come out as NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.head = nn.Embedding(11, 12), nn.Linear(12, 9), nn.Linear(9, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.up(self.embedding(input_ids))
        sees = (
            torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
            & attention_mask[:, None, :].bool()
        )
        weights = torch.softmax((hidden @ hidden.transpose(1, 2)).masked_fill(~sees, -torch.inf), -1)
        logits: Tensor = self.head(weights @ hidden)
        return logits


@pytest.mark.parametrize(
    ("backend", "max_labels"),
    [
        ("eager", None),
        ("eager", 2),
        *(pytest.param(name, most, marks=pytest.mark.slow) for name in ("xnnpack", "portable") for most in (None, 2)),
    ],
)
def test_steps_where_logits_are_infinite_or_no_number(backend: str, max_labels: int | None) -> None:
    torch.manual_seed(0)
    loss = mobizo.CausalLMLoss(max_labels=max_labels)
    tokens = torch.randint(1, 11, (3, 5))
    labels = torch.full((3, 5), -100)
    labels[:, 3:] = tokens[:, 3:]
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[0, :2] = 0
    for model, inputs in ((NeverPads(), (tokens,)), (LeftPadded(), {"input_ids": tokens, "attention_mask": mask})):
        if backend != "eager" and (max_labels is None) == isinstance(model, LeftPadded):
            continue  # as the others, at the price of a lowering
        program = mobizo.compile(model.eval(), inputs, LORA, ZOConfig(queries=1), loss, backend=backend)
        session = Session(program)
        found = session.train_step(inputs, labels, seed=1, learning_rate=0.1, eps=1e-3)
        with torch.no_grad():
            logits = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        wanted = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])
        assert found.loss == pytest.approx(float(wanted), abs=1e-3)
        assert session.state().isfinite().all() and session.state().any()


def misses_of_rows(outputs: Any, labels: Tensor) -> Tensor:
    """Whether the best class is the right one: a constant, for perturbations that are small."""
    return (outputs["logits"].argmax(-1) != labels).to(torch.float32)


@pytest.mark.parametrize(
    ("backend", "rule"),
    [
        *(("eager", rule) for rule in ("sgd", "adam", "scalar-adam")),
        pytest.param("portable", "scalar-adam", marks=pytest.mark.slow),
        pytest.param("xnnpack", "adam", marks=pytest.mark.slow),
    ],
)
def test_a_constant_objective_moves_nothing(backend: str, rule: str) -> None:
    """With lanes of one loss the spread is 0, and so is every projected gradient."""
    torch.manual_seed(0)
    labels = torch.tensor([3, 9, 0])
    program = mobizo.compile(
        Pooled().eval(), TOKENS, LORA, ZOConfig(queries=3, normalize=True), misses_of_rows, backend=backend, rule=rule,
        example_labels=labels,
    )  # fmt: skip
    session = Session(program)
    before = session.state()[: program.parameters]
    found = session.train_step(TOKENS, labels, seed=1, learning_rate=0.1, eps=1e-4)
    assert float(found.lane_losses.std()) == 0.0 and not found.projected_gradient.any()
    assert torch.equal(session.state()[: program.parameters], before)
