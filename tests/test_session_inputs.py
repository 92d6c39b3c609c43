"""Bad input: a clear error, of the right class, before anything runs or changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import mobizo_compiler as mobizo
from mobizo_compiler import ChoiceLoss, LoraConfig, Session
from mobizo_compiler.errors import (
    CaptureError,
    ConfigError,
    ExampleInputError,
    InputError,
    LabelError,
    LossError,
    MobizoError,
    NoMatchingTargetError,
    StateError,
    TokenRangeError,
    UnsupportedGraphError,
    raised_errors,
)
from mobizo_compiler.testing import TinyCausalLM, TokenWise, tiny_batch

pytestmark = pytest.mark.xdist_group("session_inputs")  # one process, so that its programs are made once


@pytest.fixture(scope="module", params=["eager", pytest.param("portable", marks=pytest.mark.slow)])
def session(request: pytest.FixtureRequest) -> Session:
    torch.manual_seed(0)
    inputs, _ = tiny_batch()
    program = mobizo.compile(TinyCausalLM(layers=1).eval(), inputs, LoraConfig(r=3), backend=request.param)
    return Session(program)


Change = Callable[[dict[str, Any]], object]
STEP_CASES: dict[str, tuple[Change, type[MobizoError], str]] = {
    "missing key": (lambda a: a["inputs"].pop("attention_mask"), InputError, "'attention_mask' is missing"),
    "unknown key": (lambda a: a["inputs"].update(x=torch.ones(1)), InputError, "no input 'x'"),
    "tuple for keywords": (lambda a: a.update(inputs=tuple(a["inputs"].values())), InputError, "must be a dict"),
    "shape": (
        lambda a: a["inputs"].update(input_ids=torch.zeros(3, 8, dtype=torch.int64)),
        InputError,
        r"'input_ids' has shape \[3, 8\], the program takes \[3, 7\]",
    ),
    "dtype": (
        lambda a: a["inputs"].update(input_ids=torch.zeros(3, 7)),
        InputError,
        "float32, the program takes int64",
    ),
    "no tensor": (lambda a: a["inputs"].update(input_ids=[[0]]), InputError, "is a list, not a tensor"),
    "token too large": (
        lambda a: a["inputs"]["input_ids"].__setitem__((1, 2), 23),
        TokenRangeError,
        r"'input_ids' has the value 23 at \[1, 2\], outside 0..22",
    ),
    "token negative": (lambda a: a["inputs"]["input_ids"].__setitem__((0, 0), -1), TokenRangeError, "-1"),
    "label too large": (
        lambda a: a["labels"].__setitem__((0, 3), 23),
        TokenRangeError,
        r"'labels' has the value 23 at \[0, 3\], outside 0..22 \(or -100\)",
    ),
    "labels all ignored": (lambda a: a["labels"].fill_(-100), LabelError, "nothing is labelled"),
    "only the first token labelled": (lambda a: a["labels"][:, 1:].fill_(-100), LabelError, "nothing is labelled"),
    "label shape": (lambda a: a.update(labels=a["labels"][:2]), InputError, r"'labels' has shape \[2, 7\]"),
    "no labels": (lambda a: a.pop("labels"), InputError, "there are no labels"),
    "labels twice": (lambda a: a["inputs"].update(labels=a["labels"]), InputError, "no input 'labels'"),
    "no row": (lambda a: a.update(labels=a["labels"][:0]), InputError, r"'labels' has shape \[0, 7\]"),
    "rows missing from the inputs alone": (
        lambda a: a["inputs"].update(input_ids=a["inputs"]["input_ids"][:2]),
        InputError,
        r"'input_ids' has shape \[2, 7\]",
    ),
    "rows missing from one input": (
        lambda a: a.update(labels=a["labels"][:2], inputs={**a["inputs"], "input_ids": a["inputs"]["input_ids"][:2]}),
        InputError,
        r"'input_ids' has shape \[2, 7\]",
    ),
    "label dtype": (lambda a: a.update(labels=a["labels"].int()), InputError, "int32"),
    "seed negative": (lambda a: a.update(seed=-1), InputError, "seed is -1"),
    "seed float": (lambda a: a.update(seed=1.0), InputError, "seed"),
    "seed too large": (lambda a: a.update(seed=2**31), InputError, "seed"),
    "eps zero": (lambda a: a.update(eps=0.0), InputError, "eps is 0.0"),
    "eps nan": (lambda a: a.update(eps=float("nan")), InputError, "eps"),
    "eps text": (lambda a: a.update(eps="small"), InputError, "eps"),
    "eps too small": (lambda a: a.update(eps=1e-46), InputError, "eps is 1e-46; in float32(.*)that is 0"),
    "eps too large": (lambda a: a.update(eps=1e39), InputError, r"eps is 1e\+39; in float32(.*)that is inf"),
    "learning rate inf": (lambda a: a.update(learning_rate=float("inf")), InputError, "learning_rate"),
    "learning rate bool": (lambda a: a.update(learning_rate=True), InputError, "learning_rate is True"),
    "learning rate too large": (lambda a: a.update(learning_rate=1e39), InputError, "in float32(.*)that is inf"),
    "learning rate too small": (lambda a: a.update(learning_rate=-1e-50), InputError, "in float32(.*)that is -0"),
    "seed of numpy's bool": (lambda a: a.update(seed=numpy.True_), InputError, "seed is np.True_"),
}


@pytest.mark.parametrize("case", STEP_CASES)
def test_bad_steps(case: str, session: Session) -> None:
    change, error, message = STEP_CASES[case]
    inputs, labels = tiny_batch()
    labels[:, 1] = 1
    arguments: dict[str, Any] = dict(inputs=inputs, labels=labels, seed=1, learning_rate=0.1, eps=0.01)
    change(arguments)
    before = session.state()
    with pytest.raises(error, match=message):
        session.train_step(**arguments)
    assert torch.equal(session.state(), before)


def test_bad_states_and_replays(session: Session) -> None:
    before = session.state()
    size = before.numel()
    for state in (torch.zeros(size + 1), torch.zeros(size, dtype=torch.float64), [0.0] * size):
        with pytest.raises(StateError, match="the state is"):
            session.load_state(state)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="not finite"):
        session.load_state(torch.full((size,), float("nan")))
    for gradient in (torch.zeros(3), [1.0, 2.0, 3.0, float("nan")]):
        with pytest.raises(InputError, match="4 finite numbers"):
            session.replay(0, gradient, 0.1)
    with pytest.raises(InputError, match="no site 'nowhere'"):
        session.lora_b("nowhere")
    with pytest.raises(InputError, match="no site 'nowhere'"):
        session.program.lora_a("nowhere")
    assert torch.equal(session.state(), before)


def test_inputs_that_are_not_contiguous_are_taken(session: Session) -> None:
    inputs, labels = tiny_batch()
    turned = {name: value.t().contiguous().t() for name, value in inputs.items()}
    torch.testing.assert_close(session.evaluate(turned)["logits"], session.evaluate(inputs)["logits"])
    session.train_step(turned, labels.t().contiguous().t(), seed=0, learning_rate=0.0, eps=0.01)


IDS = torch.zeros(2, 5, dtype=torch.int64)


def compile_tokens(model: nn.Module | None = None, inputs: Any = (IDS,), **options: Any) -> mobizo.Program:
    options.setdefault("lora", LoraConfig(r=2, target_modules=("up",)))
    return mobizo.compile(model or TokenWise().eval(), inputs, backend="eager", **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inputs": ()}, ExampleInputError, "empty"),
        ({"inputs": IDS}, ExampleInputError, "must be a tuple"),
        ({"inputs": (None,)}, ExampleInputError, "no tensor is among them"),
        ({"inputs": (torch.tensor(3),)}, ExampleInputError, "no input has rows"),
        ({"inputs": (IDS[:0],)}, ExampleInputError, "no rows"),
        ({"inputs": (IDS[:1], torch.zeros(3, 5))}, ExampleInputError, "'1' has 3 rows, input '0' has 1"),
        ({"inputs": (IDS, torch.zeros(3, 5))}, ExampleInputError, "'1' has 3 rows, input '0' has 2"),
        ({"inputs": (IDS.float(),)}, CaptureError, "cannot capture TokenWise"),
        ({"model": TokenWise()}, CaptureError, "training mode"),
        ({"model": "smollm2"}, CaptureError, "cannot compile a str"),
        ({"lora": LoraConfig(target_modules=("q_proj",))}, NoMatchingTargetError, "are named head, up"),
        (
            {"lora": LoraConfig(target_modules=("up",), layers_to_transform=3)},
            NoMatchingTargetError,
            r"in layers \(3,\)",
        ),
        ({"lora": {"r": 3}}, ConfigError, "lora must be a LoraConfig"),
        ({"zo": 4}, ConfigError, "zo must be a ZOConfig"),
        ({"loss": print}, ConfigError, "loss"),
        ({"quantization": "8da3w"}, ConfigError, "recipe is '8da3w'"),
        ({"dynamic_shapes": 3}, ExampleInputError, "must be a dict or a tuple"),
    ],
)
def test_bad_compilations(options: dict[str, Any], error: type[MobizoError], message: str) -> None:
    with pytest.raises(error, match=message):
        compile_tokens(**options)


def test_choices_are_checked() -> None:
    with pytest.raises(LossError, match="choice 11 is outside of the model's vocabulary of 11"):
        compile_tokens(loss=ChoiceLoss((1, 11)))
    session = Session(compile_tokens(loss=ChoiceLoss((1, 7))))
    labels = torch.full((2, 5), -100)
    labels[:, 4] = torch.tensor([7, 3])
    with pytest.raises(TokenRangeError, match=r"the value 3 at \[1, 4\], outside \[1, 7\] \(or -100\)"):
        session.train_step(IDS, labels, seed=0, learning_rate=0.1, eps=0.01)
    labels[1, 4] = 1
    assert session.train_step(IDS, labels, seed=0, learning_rate=0.1, eps=0.01).loss > 0


def test_a_loss_that_does_not_fit_is_refused() -> None:
    class Pooled(TokenWise):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens).mean(1)

    with pytest.raises(LossError, match=r"needs logits of shape \[rows, tokens, vocabulary\]"):
        compile_tokens(Pooled().eval())


def test_a_model_that_changes_its_buffers_is_refused() -> None:
    class Counting(TokenWise):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, tokens: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(tokens) + self.calls

    with pytest.raises(UnsupportedGraphError, match="calls"):
        compile_tokens(Counting().eval())


def test_outputs_of_any_class_come_back_as_that_class(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Inner:
        mean: Tensor

    @dataclasses.dataclass
    class Outputs:
        logits: Tensor
        inner: Inner
        count: int

    class Structured(TokenWise):
        def forward(self, tokens: Tensor) -> Outputs:  # type: ignore[override]
            logits = super().forward(tokens)
            return Outputs(logits, Inner(logits.mean(-1)), 3)

    program = mobizo.compile(Structured().eval(), (IDS,), LoraConfig(r=2), backend="portable")
    outputs = Session(mobizo.load(program.save(tmp_path / "structured.pte"))).evaluate(IDS)
    assert isinstance(outputs, Outputs) and isinstance(outputs.inner, Inner) and outputs.count == 3
    assert outputs.inner.mean.shape == (2, 5)


def test_fixed_inputs_may_be_left_out_but_not_differ() -> None:
    class Optional(TokenWise):
        def forward(self, tokens: Tensor, scale: Tensor, parts: dict[str, Any], negate: bool = False) -> Tensor:  # type: ignore[override]
            logits = super().forward(tokens + parts["shift"]) * scale
            return -logits if negate else logits

    shift = torch.ones(2, 5, dtype=torch.int64)
    example = {"tokens": IDS, "scale": torch.tensor(2.0), "parts": {"shift": shift, "unused": None}, "negate": True}
    model = Optional().eval()
    session = Session(mobizo.compile(model, example, LoraConfig(r=2), backend="eager"))
    assert [spec.name for spec in session.program.manifest.inputs] == ["tokens", "scale", "parts.shift"]
    with torch.no_grad():
        wanted = model(**example)
    torch.testing.assert_close(session.evaluate(example), wanted)
    torch.testing.assert_close(
        session.evaluate({"tokens": IDS, "scale": torch.tensor(2.0), "parts.shift": shift}), wanted
    )
    with pytest.raises(InputError, match="'negate' is False; the program was compiled with True"):
        session.evaluate({**example, "negate": False})
    with pytest.raises(InputError, match=r"'parts.shift' is missing"):
        session.evaluate({**example, "parts": {}})


@pytest.mark.parametrize(
    ("row_axes", "message"),
    [({"y": 0}, "names input 'y'"), ({0: 2}, "the input has 2 axes"), ({0: None}, "no input has rows")],
)
def test_bad_row_axes(row_axes: Any, message: str) -> None:
    with pytest.raises(ExampleInputError, match=message):
        compile_tokens(row_axes=row_axes)


class Difference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.first(x) - self.second(y)


def test_one_example_for_two_inputs_leaves_them_two_inputs() -> None:
    model, x, y = Difference().eval(), torch.randn(3, 6), torch.randn(3, 6)
    session = Session(mobizo.compile(model, (x, x), loss=mobizo.MSELoss(), backend="eager"))
    torch.testing.assert_close(session.evaluate((x, y)), model(x, y))


def test_positional_inputs_are_counted() -> None:
    session = Session(compile_tokens())
    with pytest.raises(InputError, match="takes 1 inputs, 2 were given"):
        session.evaluate((IDS, IDS))
    assert session.evaluate(IDS).shape == session.evaluate((IDS,)).shape == (2, 5, 11)


def test_every_error_has_a_code_of_its_own_and_a_docstring() -> None:
    codes = [error.code for error in raised_errors()]
    assert len(codes) == len(set(codes))
    assert all(error.__doc__ for error in raised_errors())
    error = InputError("wrong", where="here", hint="that")
    assert str(error) == "[MBZ601] wrong\n  at: here\n  try: that"
    assert isinstance(error, ValueError)
