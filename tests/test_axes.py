"""Where the rows are: one operator at a time, whole modules, and every way in which rows can meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, MSELoss, SequenceClassificationLoss, Session, ZOConfig, passes
from mobizo_compiler.analysis.axes import Layout, axis_rule, row_axes
from mobizo_compiler.analysis.axes.rules import AXIS_RULES
from mobizo_compiler.errors import (
    CaptureError,
    FixedRowsError,
    NoAxisRuleError,
    RowMixingError,
    UnsupportedGraphError,
)
from mobizo_compiler.graph.example import bind_example
from mobizo_compiler.testing import check_against_oracle
from mobizo_compiler.testing.models import TinyCausalLM, TokenWise, tiny_batch
from mobizo_compiler.testing.plain import FlatWindows, plain_cases


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def layout_of(function: Callable[..., Any], *inputs: Tensor, symbolic: bool = True, **options: Any) -> Layout | None:
    """Layout of the result of a function of tensors."""
    model = Function(function).eval()
    program = passes.capture(model, bind_example(model, inputs, **options), symbolic=symbolic)
    found = row_axes(program.graph, program.rows, program.fixed_rows)
    return found.layout(next(iter(program.output_nodes.values())))


X = torch.randn(3, 5, 8)
KEPT: dict[str, tuple[Callable[..., Any], Layout]] = {
    "pointwise": (lambda x: torch.tanh(x) * 2 + torch.arange(8), Layout(0)),
    "transposed": (lambda x: x.transpose(0, 1), Layout(1)),
    "flattened": (lambda x: x.reshape(-1, 8), Layout(0, 1, 5)),
    "flattened, tokens first": (lambda x: x.transpose(0, 1).reshape(-1, 8), Layout(0, 5, 1)),
    "split again": (lambda x: x.reshape(-1, 8).reshape(-1, 5, 2, 4), Layout(0)),
    "heads in the batch": (lambda x: x.reshape(-1, 5, 2, 4).transpose(1, 2).reshape(-1, 5, 4), Layout(0, 1, 2)),
    "windows": (lambda x: x[:, :4].reshape(-1, 2, 2, 8).permute(1, 0, 2, 3).reshape(-1, 2, 8), Layout(0, 2, 1)),
    "stacked": (lambda x: torch.stack([x, x], 0), Layout(1)),
    "concatenated": (lambda x: torch.cat([x, x.new_zeros(x.shape[0], 1, 8)], 1), Layout(0)),
    "reduced": (lambda x: x.transpose(0, 1).mean(0), Layout(0)),
    "largest": (lambda x: x.max(dim=1).values, Layout(0)),
    "summed, kept": (lambda x: x.sum((1, 2), keepdim=True), Layout(0)),
    "product with a matrix": (lambda x: x @ torch.ones(8, 3), Layout(0)),
    "product of a matrix": (lambda x: torch.ones(3, 5) @ x.permute(1, 0, 2).reshape(5, -1), Layout(1, 1, 8)),
    "scores": (lambda x: x @ x.transpose(1, 2), Layout(0)),
    "attention": (lambda x: F.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3), Layout(0)),
    "repeated": (lambda x: x.repeat(2, 1, 1), Layout(0, 2, 1)),
    "interleaved": (lambda x: x.repeat_interleave(2, 0), Layout(0, 1, 2)),
    "picked by number": (lambda x: x[torch.arange(x.shape[0]), 2], Layout(0)),
    "picked by place": (lambda x: x[torch.arange(x.shape[0]), x.argmax(1)[:, 0]], Layout(0)),
    "gathered": (lambda x: x.gather(1, x.argmax(1, keepdim=True)), Layout(0)),
    "masked": (lambda x: x.masked_fill(torch.ones(5, 8).tril().bool(), 0.0), Layout(0)),
    "padded": (lambda x: F.pad(x, (0, 0, 1, 0)), Layout(0)),
    "rolled": (lambda x: x.roll(1, 1), Layout(0)),
    "convolved": (lambda x: F.conv1d(x, torch.ones(4, 5, 3)), Layout(0)),
    "pooled": (lambda x: F.avg_pool1d(x, 2), Layout(0)),
    "normed": (lambda x: F.layer_norm(x.transpose(0, 1), (8,)), Layout(1)),
    "sorted": (lambda x: x.sort(dim=2).values, Layout(0)),
    "split": (lambda x: x.split([3, 5], 2)[1], Layout(0)),
    "unbound": (lambda x: x.unbind(1)[0], Layout(0)),
    "part replaced": (lambda x: torch.slice_scatter(x, torch.zeros_like(x[:, 1:]), 1, 1), Layout(0)),
    "looked up": (lambda x: torch.ones(9, 4)[x.argmax(2)], Layout(0)),
    "einsum": (lambda x: torch.einsum("ntd,nsd->nts", x, x), Layout(0)),
}


# With fixed rows those in quick runs whose rows are merged with other axes, split off again or told apart by numbers.
FIXED = {
    "flattened, tokens first",
    "split again",
    "windows",
    "repeated",
    "picked by number",
    "looked up",
    "concatenated",
}


@pytest.mark.parametrize(
    ("case", "symbolic"),
    [
        *(pytest.param(case, True, id=f"{case}-symbolic") for case in KEPT),
        *(
            pytest.param(case, False, id=f"{case}-fixed", marks=() if case in FIXED else pytest.mark.slow)
            for case in KEPT
        ),
    ],
)
def test_rows_are_followed(case: str, symbolic: bool) -> None:
    function, wanted = KEPT[case]
    assert layout_of(function, X, symbolic=symbolic) == wanted


MIXED: dict[str, tuple[Callable[..., Any], str]] = {
    "mean over the batch": (lambda x: x - x.mean(0), "mean over the batch"),
    "sum of everything": (lambda x: x / x.sum(), "sum over the batch"),
    "softmax over the batch": (lambda x: x.softmax(0), "softmax over the batch"),
    "contrastive": (lambda x: x[:, 0] @ x[:, 0].T, "every row meets every other"),
    "sum over rows by a product": (lambda x: x.permute(1, 2, 0) @ x.transpose(0, 1), "sums over the rows"),
    "first row": (lambda x: x - x[0], "one row is picked"),
    "reversed": (lambda x: x.flip(0), "flip over the batch"),
    "concatenated rows": (lambda x: torch.cat([x, x]), "concatenated along the rows"),
    "cumulative": (lambda x: x.reshape(-1, 8).cumsum(0), "cumsum over the batch"),
    "batch as tokens": (lambda x: F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3), "attend to each other"),
    "other rows looked up": (lambda x: x[x.argmax(1)[:, 0] % 2], "other rows are looked up"),
    "outer difference": (lambda x: x[:, None, :, :] - x[None], "rows in axis"),
    "batch statistics": (lambda x: F.batch_norm(x, None, None, training=True), "statistics of the batch"),
    "convolution over rows": (lambda x: F.conv1d(x.permute(2, 1, 0), torch.ones(4, 5, 1)), "convolution works on"),
    "orders differ": (
        lambda x: x.reshape(-1, 8) + x.transpose(0, 1).reshape(-1, 8),
        "different orders",
    ),
}


@pytest.mark.parametrize("case", MIXED)
def test_rows_that_meet_are_refused_with_node_line_and_reason(case: str) -> None:
    function, reason = MIXED[case]
    with pytest.raises(RowMixingError, match=reason) as caught:
        layout_of(function, X)
    assert caught.value.where is not None
    assert "test_axes.py" in caught.value.where and "%" in caught.value.where


def test_rows_that_are_cut_out_of_a_fixed_batch_are_refused() -> None:
    for function in (lambda x: x[1:], lambda x: x[:, None].expand(-1, 3, -1, -1).reshape(-1, 5, 8)[:3]):
        with pytest.raises(RowMixingError, match="rows are cut"):
            layout_of(function, X, symbolic=False)


def test_the_number_of_rows_as_a_number_is_refused_where_it_is_a_symbol() -> None:
    with pytest.raises(RowMixingError, match="number of rows is used as a number"):
        layout_of(lambda x: x / x.shape[0], X)
    assert layout_of(lambda x: x / x.shape[0], X, symbolic=False) == Layout(0), "in a lane it is the lane's own number"
    with pytest.raises(RowMixingError, match="numbers of the rows are used as values"):
        layout_of(lambda x: x * torch.arange(x.shape[0])[:, None, None], X)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + x.new_full((x.shape[0], 1, 1), 1 / x.shape[0]),
        lambda x: x + torch.full((1,), float(x.shape[0])),
        lambda x: x[:, : x.shape[0]] if x.shape[0] < 4 else x,
        lambda x: x[torch.arange(x.shape[0])[:, None].expand(-1, 5).sum(1) // 5],
        lambda x: torch.arange(9.0)[torch.arange(x.shape[0])][:, None, None] + x,
    ],
)
def test_numbers_of_rows_do_not_get_into_values(function: Any) -> None:
    """Whatever torch.export makes of these: a symbol that is refused, or the lane's own number of rows."""
    with pytest.raises((RowMixingError, CaptureError)):
        layout_of(function, X)


def test_writing_into_rows() -> None:
    def by_row(x: Tensor) -> Tensor:
        return x.index_put((torch.arange(x.shape[0]), x.argmax(1)[:, 0]), x[:, 0])

    assert layout_of(by_row, X) == Layout(0)
    with pytest.raises(RowMixingError):
        layout_of(lambda x: x.index_put((x.argmax(1)[:, 0] % 3,), x), X)
    square = torch.randn(3, 3, 8)
    columns = torch.tensor([0, 1, 2])
    with pytest.raises(RowMixingError, match="rows in axis"):
        layout_of(lambda x: torch.ops.aten.index_put(x, [None, columns], x.transpose(0, 1)), square, symbolic=False)


def test_batches_that_are_no_rows_are_refused_when_fixed() -> None:
    """In a fixed capture a constant with as many entries as there are rows must not be taken for rows."""
    table = torch.randn(3, 1, 8)
    with pytest.raises(RowMixingError, match="different entries along the axis of the rows"):
        layout_of(lambda x: x + table, X, symbolic=False)
    assert layout_of(lambda x: x + table[:1], X, symbolic=False) == Layout(0)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    rows=st.integers(1, 4),
    axis=st.integers(0, 3),
    merge=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
def test_reshapes_agree_with_where_the_entries_go(sizes: list[int], rows: int, axis: int, merge: int) -> None:
    """Number the entries by row, reshape, and look where the numbers are."""
    axis %= len(sizes)
    before = [rows if a == axis else s for a, s in enumerate(sizes)]
    merge %= len(before) - 1
    after = [*before[:merge], before[merge] * before[merge + 1], *before[merge + 2 :]]
    numbers = torch.arange(rows).reshape([-1 if a == axis else 1 for a in range(len(before))]).expand(before)
    found = Layout(axis).reshaped(before, after, rows)
    assert found is not None
    size = after[found.axis]
    assert size == found.outer * rows * found.inner
    wanted = (torch.arange(size) // found.inner) % rows
    shape = [-1 if a == found.axis else 1 for a in range(len(after))]
    assert torch.equal(numbers.reshape(after), wanted.reshape(shape).expand(after))
    back = found.reshaped(after, before, rows)
    assert back is not None and (rows == 1 or back == Layout(axis))


def test_an_operator_without_a_rule_is_refused_until_one_is_registered() -> None:
    @torch.library.custom_op("mobizo_tests::twist", mutates_args=())
    def twist(x: Tensor) -> Tensor:
        return x * 2

    @twist.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    with pytest.raises(NoAxisRuleError, match=r"mobizo_tests::twist(.|\n)*axis_rule"):
        layout_of(lambda x: twist(x), X)
    axis_rule("mobizo_tests::twist")(lambda call: call.results(call.first()[0]))
    try:
        assert layout_of(lambda x: twist(x), X) == Layout(0)
    finally:
        del AXIS_RULES._registered["mobizo_tests.twist"]


# Of recurrent networks and of convolutions one each; what a decoder computes is the matter of test_step.py.
SLOW = {"gru_batch_second", "rnn", "cnn_1d", "tiny_causal_lm"}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=pytest.mark.slow if case.name in SLOW else ()) for case in plain_cases()],
)
def test_modules_with_rows_anywhere(case: Any) -> None:
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=case.target_modules)
    check_against_oracle(case.model(), case.inputs(), backend="eager", lora=lora, loss=case.loss, **case.options)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_program_exported_with_fixed_rows(rows: int) -> None:
    """Also with one row, and with as many rows as heads, windows and tokens of a window."""
    torch.manual_seed(0)
    model = FlatWindows(rows).eval()
    x = torch.randn(rows, 6, 12)
    lora = LoraConfig(r=3, target_modules=("up", "down"))
    losses = []
    for source in (torch.export.export(model, (x,)), FlatWindows().eval()):
        if isinstance(source, nn.Module):
            source.load_state_dict(model.state_dict())
        program = mobizo.compile(source, (x,), lora, ZOConfig(queries=2), MSELoss(), backend="eager")
        session = Session(program)
        session.load_state(torch.randn(program.parameters, generator=torch.Generator().manual_seed(1)))
        labels = torch.randn(rows, 6, 6, generator=torch.Generator().manual_seed(2))
        losses.append(session.train_step((x,), labels, seed=1, learning_rate=0.1, eps=0.05).lane_losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)


def test_a_transformer_exported_with_fixed_rows() -> None:
    torch.manual_seed(0)
    model = TinyCausalLM(layers=1).eval()
    inputs, labels = tiny_batch()
    found = []
    for source in (model, torch.export.export(model, (), inputs)):
        program = mobizo.compile(source, inputs, LoraConfig(r=3), ZOConfig(queries=2), backend="eager")
        session = Session(program)
        session.load_state(torch.randn(program.parameters, generator=torch.Generator().manual_seed(1)))
        found.append(session.train_step(inputs, labels, seed=1, learning_rate=0.1, eps=0.05).lane_losses)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_fixed_rows_that_cannot_be_freed_are_refused_at_the_node() -> None:
    table = nn.Parameter(torch.randn(3, 1, 12))

    class OneTableRowPerRow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.table = nn.Linear(12, 8), table

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x + self.table)

    exported = torch.export.export(OneTableRowPerRow().eval(), (torch.randn(3, 5, 12),))
    with pytest.raises(UnsupportedGraphError, match=r"different entries(.|\n)*test_axes.py"):
        mobizo.compile(exported, (torch.randn(3, 5, 12),), loss=MSELoss(), backend="eager")
    assert issubclass(FixedRowsError, UnsupportedGraphError)


def test_rows_may_meet_where_the_loss_does_not_look() -> None:
    """As in CLIP: the similarity of all pairs goes out beside the embeddings that are trained."""

    class TwoOutputs(TokenWise):
        def forward(self, tokens: Tensor) -> Any:
            hidden = super().forward(tokens).mean(1)
            return {"embeds": hidden, "similarity": hidden @ hidden.T}

    tokens = torch.randint(0, 11, (3, 5))
    torch.manual_seed(0)
    model = TwoOutputs().eval()
    report = check_against_oracle(
        model,
        (tokens,),
        backend="eager",
        lora=LoraConfig(r=3, target_modules=("up", "head")),
        loss=MSELoss("embeds"),
    )
    outputs = Session(report.program).evaluate(tokens)
    assert outputs["similarity"].shape == (3, 3)
    with pytest.raises(RowMixingError, match="every row meets every other"):
        mobizo.compile(model, (tokens,), loss=MSELoss("similarity"), backend="eager")


def test_a_layer_on_a_value_without_rows_is_refused() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 12))
            self.key, self.up, self.head = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.up(x) + self.key(self.table)).mean(1))

    def compiled(**lora: Any) -> mobizo.Program:
        x = torch.randn(3, 5, 12)
        loss = SequenceClassificationLoss()
        return mobizo.compile(Table().eval(), (x,), LoraConfig(r=2, **lora), loss=loss, backend="eager")

    with pytest.raises(UnsupportedGraphError, match=r"layer key works on a value that has no rows(.|\n)*test_axes.py"):
        compiled(target_modules=("key", "up"))
    assert [site.fqn for site in compiled().sites] == ["up"], "the default leaves it out"
