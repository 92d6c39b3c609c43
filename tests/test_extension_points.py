"""What losses, estimators and update rules of others return is looked at, and numbers that float32 cannot hold."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mobizo_compiler as mobizo
from mobizo_compiler import CausalLMLoss, LoraConfig, Session, ZOConfig
from mobizo_compiler.device.schedules import schedule
from mobizo_compiler.errors import ConfigError, InputError, LossError
from mobizo_compiler.reference import ReferenceStep
from mobizo_compiler.step.estimators import ESTIMATORS, TwoSided, register_estimator
from mobizo_compiler.step.losses import LOSSES, LabelSpec, Loss, register_loss
from mobizo_compiler.step.rules import RULES, Adam, Memory, Momentum, UpdateRule, register_rule
from mobizo_compiler.testing import TokenWise

TOKENS = (torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0)),)
LORA = LoraConfig(r=2, target_modules=("up",))


def compiled(backend: str = "eager", **options: Any) -> mobizo.Program:
    torch.manual_seed(0)
    zo = options.pop("zo", ZOConfig(queries=3))
    return mobizo.compile(TokenWise().eval(), TOKENS, LORA, zo, backend=backend, **options)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone afterwards."""
    for registry in (ESTIMATORS, RULES, LOSSES):
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))


class OneSlope(TwoSided):
    def projected_gradient(self, loss_G: Tensor, eps_1: Tensor) -> Tensor:
        return (loss_G[:1] - loss_G[1:2]) / eps_1


class OneLane(TwoSided):
    def perturbed(self, trained_P: Tensor, step_QP: Tensor) -> Tensor:
        return trained_P + step_QP


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (
            OneSlope(),
            r"OneSlope.projected_gradient must return .* \[queries\], here \[3\]; .* torch.float32\[1\]",
        ),
        (OneLane(), r"OneLane.perturbed must return .* \[lanes, parameters\], here \[6, 40\]; .*float32\[3, 40\]"),
    ],
)
def test_estimators_of_another_shape(estimator: TwoSided, message: str, names: None) -> None:
    register_estimator("mine", estimator)
    with pytest.raises(ConfigError, match=message):
        compiled(zo=ZOConfig(queries=3, estimator="mine"))


@dataclasses.dataclass(frozen=True)
class Warm(UpdateRule):
    """Remembers a scale that begins at 2, and how often it was used."""

    nesterov: bool = False

    def init(self, parameters: int) -> Memory:
        return {"scale": torch.full((1,), 2.0), "uses": torch.zeros(1)}

    def update(self, direction_P: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        return direction_P * memory["scale"], {"scale": memory["scale"] * 0.5, "uses": memory["uses"] + 1}


@pytest.mark.parametrize(
    ("backend", "state"),
    [("eager", "shared"), *(pytest.param("portable", s, marks=pytest.mark.slow) for s in ("shared", "io"))],
)
def test_a_memory_that_does_not_begin_at_zero(backend: str, state: str, names: None, tmp_path: Path) -> None:
    register_rule("warm", Warm)
    program = compiled(backend, rule="warm", state=state)
    if backend == "portable":
        program = mobizo.load(program.save(tmp_path / "program.pte"))
    session = Session(program)
    assert session.state()[-2:].tolist() == [2.0, 0.0] == program.initial_state()[-2:].tolist()
    torch.manual_seed(0)
    model = TokenWise().eval()
    reference = ReferenceStep(model, program.sites, program.lora_a_by_fqn, zo=program.manifest.zo, rule=Warm())
    for step in range(2):
        for one in (session, reference):
            one.train_step(TOKENS, TOKENS[0], seed=step, learning_rate=0.1, eps=0.05)
    torch.testing.assert_close(session.state()[:-2], reference.state, rtol=0, atol=1e-4)
    assert session.state()[-2:].tolist() == [0.5, 2.0]
    assert session.state()[:-2].any()


def _rule(init: Any = None, update: Any = None) -> UpdateRule:
    @dataclasses.dataclass(frozen=True)
    class Mine(UpdateRule):
        def init(self, parameters: int) -> Memory:
            return {} if init is None else init(parameters)

        def update(self, direction_P: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
            return (direction_P, memory) if update is None else update(direction_P, memory)

    register_rule("mine", Mine)
    return Mine()


@pytest.mark.parametrize(
    ("init", "update", "message"),
    [
        (lambda p: torch.zeros(p), None, "init must return a dict of tensors"),
        (lambda p: {"m": torch.zeros(2, p)}, None, r"tensors of one axis; 'm' is torch.float32\[2, 40\]"),
        (lambda p: {"m": torch.zeros(p).double()}, None, r"'m' is torch.float64\[40\]"),
        (lambda p: {"m": torch.full((1,), torch.inf)}, None, "numbers in 'm' that are not finite"),
        (lambda p: {"m": torch.rand(2000)}, None, "2000 runs of equal numbers"),
        (None, lambda d, m: d, r"update must return the step and the memory, not torch.float32\[40\]"),
        (None, lambda d, m: (d[:1], m), r"a step of shape \[40\], not torch.float32\[1\]"),
        (lambda p: {"m": torch.zeros(1)}, lambda d, m: (d, {}), r"returns the memory \[\], init makes \['m'\]"),
        (lambda p: {"m": torch.zeros(1)}, lambda d, m: (d, {"m": d}), r"\[40\] as 'm', init makes \[1\]"),
    ],
)
def test_rules_of_another_shape(init: Any, update: Any, message: str, names: None) -> None:
    with pytest.raises(ConfigError, match=message):
        compiled(rule=_rule(init, update))


def test_classes_in_place_of_instances() -> None:
    with pytest.raises(ConfigError, match=r"the loss is the class CausalLMLoss(.|\n)*CausalLMLoss\(\)"):
        compiled(loss=CausalLMLoss)
    with pytest.raises(ConfigError, match=r"the update rule is the class Momentum(.|\n)*Momentum\(\)"):
        compiled(rule=Momentum)
    for options in ({"zo": ZOConfig}, {"quantization": mobizo.QuantizationConfig}):
        with pytest.raises(ConfigError):
            compiled(**options)


def own_loss(result: Any) -> Loss:
    """As `CausalLMLoss`, and then something else."""

    @dataclasses.dataclass(frozen=True)
    class OwnLoss(Loss):
        def label_spec(self, outputs: Any) -> LabelSpec:
            return CausalLMLoss().label_spec(outputs)

        def __call__(self, outputs: Any, labels: Tensor) -> Any:
            return result(*CausalLMLoss()(outputs, labels))

    register_loss("own", OwnLoss)
    return OwnLoss()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda loss, weight: loss, "must return two tensors"),
        (lambda loss, weight: (loss, weight, loss), "must return two tensors"),
        (lambda loss, weight: (loss, 3.0), "must return two tensors"),
        (lambda loss, weight: (loss, weight.sum()), r"the weight .* not \[rows\]"),
        (lambda loss, weight: (loss, weight.long()), "the weight .* is torch.int64; it must be float32"),
    ],
)
def test_losses_of_another_shape(result: Any, message: str, names: None) -> None:
    with pytest.raises(LossError, match=message):
        compiled(loss=own_loss(result))


def test_numbers_that_float32_cannot_hold() -> None:
    """1e39 is a number in Python and infinite in a graph; 1e-50 is above 0 and then 0."""
    session = Session(compiled())
    before = session.state()
    for name in ("learning_rate", "eps"):
        for value in (1e39, 1e-50):
            options: dict[str, Any] = {"seed": 1, "learning_rate": 0.1, "eps": 0.1, name: value}
            with pytest.raises(InputError, match=rf"{name} is {re.escape(str(value))}; in float32"):
                session.train_step(TOKENS, TOKENS[0], **options)
    with pytest.raises(InputError, match="float32"):
        session.replay(1, [0.1, 0.1, 0.1], -1e39)
    with pytest.raises(InputError, match="float32"), session.lane(0, seed=1, eps=1e-50):
        pass
    assert torch.equal(session.state(), before)
    for make in (
        lambda: schedule("constant", 1e39, 10),
        lambda: LoraConfig(lora_alpha=float("inf")),
        lambda: LoraConfig(lora_alpha=1e39),
        lambda: LoraConfig(lora_alpha=1e-44, r=64),
        lambda: ZOConfig(clip=1e39),
        lambda: ZOConfig(clip=1e-50),
        lambda: Adam(delta=1e-50),
        lambda: Adam(weight_decay=1e39),
        lambda: Momentum(beta=1 - 1e-12),
    ):
        with pytest.raises(ConfigError, match=r"float32|above 0|finite"):
            make()
    assert schedule("cosine", 1e-30, 10)(9) >= 0.0


@pytest.mark.parametrize(
    ("backend", "rule"),
    [
        ("eager", "sgd"),
        ("eager", "adam"),
        pytest.param("portable", "sgd", marks=pytest.mark.slow),
        pytest.param("portable", "adam", marks=pytest.mark.slow),
    ],
)
def test_a_graph_keeps_its_state_from_rates_that_are_not_finite(backend: str, rule: str) -> None:
    """Hosts without Python hand a graph whatever they have."""
    program = compiled(backend, rule=rule)
    runner = program.artifact.runner()
    start = torch.randn(runner.state().shape, generator=torch.Generator().manual_seed(1)).abs()
    gradients = torch.tensor([1.0, 0.5, -0.2]), torch.full((3,), 3e38)
    for gradient, rate in ((gradients[0], torch.inf), (gradients[0], torch.nan), (gradients[1], 0.0)):
        runner.state().copy_(start)
        runner.call("replay", [torch.tensor([1], dtype=torch.int32), gradient, torch.tensor([rate])])
        assert torch.equal(runner.state(), start)
