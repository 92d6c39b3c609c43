"""The suites for estimators, update rules and losses: ours keep their contracts, and what breaks one is named."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from mobizo_compiler import CausalLMLoss, ChoiceLoss, LabelSpec, MaskedLMLoss, MSELoss, SequenceClassificationLoss
from mobizo_compiler.errors import ContractError, UnknownExtensionError
from mobizo_compiler.step.estimators import ESTIMATORS, Estimator, OneSided, TwoSided
from mobizo_compiler.step.losses import LOSSES, CallableLoss, Loss
from mobizo_compiler.step.rules import RULES, SGD, Momentum
from mobizo_compiler.testing import check_estimator, check_loss, check_rule

ESTIMATORS_OF_OURS, RULES_OF_OURS = sorted(ESTIMATORS.built_in), sorted(RULES.built_in)


class LeaveOneOut(Estimator):
    """Every lane is compared with the mean of the others: estimates that are right as a mean alone."""

    def lanes(self, queries: int) -> int:
        return queries

    def perturbed(self, trained_P: Tensor, step_QP: Tensor) -> Tensor:
        return trained_P + step_QP

    def projected_gradient(self, loss_G: Tensor, eps_1: Tensor) -> Tensor:
        count = loss_G.shape[0]
        return (loss_G - loss_G.mean(dim=0, keepdim=True)) * (count / (count - 1)) / eps_1

    def fewest_queries(self, normalized: bool) -> int:
        return 2


@pytest.mark.parametrize("estimator", [*ESTIMATORS_OF_OURS, LeaveOneOut()], ids=str)
def test_estimators(estimator: Any) -> None:
    names = ESTIMATORS.names()
    check_estimator(estimator)
    assert ESTIMATORS.names() == names, "one without a name is lent one"


class FromOnes(Momentum):
    """A mean that begins elsewhere than at zero."""

    def init(self, parameters: int) -> dict[str, Tensor]:
        return {"mean": torch.ones(parameters), "unused": torch.full((2,), 2.0)}

    def update(self, direction_P: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        step_P, mean = super().update(direction_P, memory)
        return step_P, {**memory, **mean}


@pytest.mark.parametrize("rule", [*RULES_OF_OURS, Momentum(beta=0.0, weight_decay=0.3), FromOnes()], ids=str)
def test_rules(rule: Any) -> None:
    check_rule(rule)


LOGITS = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(0)) * 3
TOKENS = torch.tensor([[-100, 4, -100, 2, 8], [-100, 1, 0, -100, -100], [-100, -100, 7, 3, 6]])
FEW = torch.tensor([[-100, 2, -100, -100, -100], [-100, -100, -100, 5, -100], [-100, 2, -100, -100, -100]])
FLOATS = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(1))
LOSSES_OF_OURS: list[tuple[Loss, Any, Tensor]] = [
    (CausalLMLoss(), LOGITS, TOKENS),
    (CausalLMLoss(max_labels=3), {"logits": LOGITS}, TOKENS),
    (MaskedLMLoss(), (LOGITS, torch.zeros(3, 2)), TOKENS),
    (MaskedLMLoss(max_labels=1), LOGITS, FEW),
    (ChoiceLoss((2, 5)), LOGITS, FEW),
    (SequenceClassificationLoss(), LOGITS[:, 0], torch.tensor([3, -100, 8])),
    (MSELoss(), LOGITS, FLOATS),
    (MSELoss("hidden"), {"logits": LOGITS, "hidden": FLOATS[:, 0]}, FLOATS[:, 1]),
]


@pytest.mark.parametrize(("loss", "outputs", "labels"), LOSSES_OF_OURS, ids=lambda value: str(value)[:40])
def test_losses(loss: Loss, outputs: Any, labels: Tensor) -> None:
    check_loss(loss, outputs, labels)


def test_every_loss_with_a_name_is_among_them() -> None:
    names = {LOSSES.name_of(type(loss)) for loss, _, _ in LOSSES_OF_OURS}
    assert names == set(LOSSES.built_in) - {"function"}


def two_sided(**members: Any) -> Any:
    return type("Broken", (TwoSided,), members)()


def differences(self: Any, loss_G: Tensor, eps_1: Tensor) -> Tensor:
    return TwoSided().projected_gradient(loss_G, eps_1)


BROKEN_ESTIMATORS = {
    "half of the slope": (
        two_sided(projected_gradient=lambda self, loss, eps: differences(self, loss, eps) * 0.5),
        "standard errors off the gradient",
    ),
    "of one point": (
        type("Broken", (LeaveOneOut,), {"projected_gradient": lambda self, loss, eps: loss / eps})(),
        "a loss that is 3 everywhere has the slopes",
    ),
    "signs alone": (
        two_sided(projected_gradient=lambda self, loss, eps: differences(self, loss, eps).sign()),
        "on a linear loss the estimate depends on the unit of the loss",
    ),
    "eps forgotten": (
        two_sided(projected_gradient=lambda self, loss, eps: differences(self, loss, torch.full_like(eps, 1e-3))),
        "depends on the size of eps",
    ),
    "lanes that are not": (
        two_sided(lanes=lambda self, queries: queries + 1),
        r"returns .*, not torch.float32 \[4, 12\]",
    ),
    "too few directions": (
        two_sided(projected_gradient=lambda self, loss, eps: differences(self, loss, eps)[:1]),
        r"returns torch.float32 \[1\], not torch.float32 \[3\]",
    ),
    "float32 always": (
        two_sided(projected_gradient=lambda self, loss, eps: differences(self, loss, eps).float()),
        "not torch.float64",
    ),
    "in place": (
        two_sided(perturbed=lambda self, point, step: torch.cat((point + step, point - step.mul_(1.5)))),
        "perturbed changes its arguments",
    ),
    "always moved": (
        two_sided(perturbed=lambda self, point, step: torch.cat((point + step, point - step)) + 1.0),
        "by something else than the step",
    ),
    "an if": (
        two_sided(projected_gradient=lambda self, loss, eps: differences(self, loss, eps) * (1 if loss[0] > 0 else 2)),
        "cannot be traced",
    ),
    "no fewest": (two_sided(fewest_queries=lambda self, normalized: 0), r"fewest_queries\(False\) is 0"),
}


@pytest.mark.parametrize("case", BROKEN_ESTIMATORS)
def test_an_estimator_that_is_broken(case: str) -> None:
    estimator, reason = BROKEN_ESTIMATORS[case]
    with pytest.raises(ContractError, match=f"(?s)estimator 'Broken': .*{reason}"):
        check_estimator(estimator)


def momentum(**members: Any) -> Any:
    return type("Broken", (Momentum,), members)()


COUNTS: list[int] = []


def counted(self: Any, direction: Tensor, memory: Any) -> Any:
    COUNTS.append(1)
    return direction * len(COUNTS), memory


BROKEN_RULES = {
    "divides by the norm": (
        momentum(update=lambda self, direction, memory: (direction / direction.norm(), memory)),
        "not finite",
    ),
    "a start that is not finite": (
        momentum(init=lambda self, count: {"mean": torch.full((count,), float("nan"))}),
        "which is not finite",
    ),
    "a matrix": (momentum(init=lambda self, count: {"mean": torch.zeros(1, count)}), "float32 of one axis"),
    "grows": (
        momentum(update=lambda self, direction, memory: (direction, {"mean": torch.cat([memory["mean"], direction])})),
        r"'mean' is torch.float32 \[2\] now",
    ),
    "forgets": (momentum(update=lambda self, direction, memory: (direction, {})), r"it remembers \[\]"),
    "in place": (
        momentum(update=lambda self, direction, memory: (direction, {"mean": memory["mean"].add_(direction)})),
        "changes its arguments",
    ),
    "counts elsewhere": (momentum(update=counted), "returns something else the second time"),
    "an if": (
        momentum(update=lambda self, d, memory: (d if float(d.sum()) > 0 else d * 2, memory)),
        "cannot be traced",
    ),
    "half precision": (momentum(update=lambda self, direction, memory: (direction.half(), memory)), "not float32"),
    "one number": (momentum(update=lambda self, d, memory: (d.sum(dim=0, keepdim=True), memory)), r"not float32 \[7\]"),
    "no tuple": (momentum(update=lambda self, direction, memory: direction), r"not \(step, memory\)"),
}


@pytest.mark.parametrize("case", BROKEN_RULES)
def test_a_rule_that_is_broken(case: str) -> None:
    rule, reason = BROKEN_RULES[case]
    with pytest.raises(ContractError, match=f"(?s)update rule 'Broken': .*{reason}"):
        check_rule(rule)


def mse(**members: Any) -> Any:
    return type("Broken", (MSELoss,), members)(), LOGITS, FLOATS


def sums(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs - labels).square().mean(dim=(1, 2))


def ones(labels: Tensor) -> Tensor:
    return torch.ones(len(labels))


BROKEN_LOSSES = {
    "a mean over the batch": (
        mse(__call__=lambda self, out, y: (sums(out, y) - sums(out, y).mean(), ones(y))),
        "rows beside copies of themselves|in another order|in place of all others",
    ),
    "one number": (mse(__call__=lambda self, out, y: (sums(out, y).mean(), ones(y))), r"not float32 \[3\]"),
    "no numbers of values": (mse(__call__=lambda self, out, y: sums(out, y)), "it returns Tensor, not two tensors"),
    "half precision": (
        mse(__call__=lambda self, out, y: (sums(out.half(), y.half()).float(), ones(y))),
        "coarser than float32",
    ),
    "not finite": (mse(__call__=lambda self, out, y: (sums(out, y) / 0, ones(y))), "sums of losses are"),
    "other labels": (
        mse(label_spec=lambda self, out: LabelSpec((3, 5, 9), torch.int64)),
        "label_spec says torch.int64",
    ),
    "other sizes": (mse(label_spec=lambda self, out: LabelSpec((3, 9, 5), torch.float32)), "label_spec says"),
    "reads values": (
        mse(label_spec=lambda self, out: LabelSpec((3, 5, 9), torch.float32, low=int(out[0, 0, 0]))),
        "DataDependent|item",
    ),
    "counts what does not": (
        (
            type("Broken", (MaskedLMLoss,), {"__call__": lambda self, out, y: MaskedLMLoss()(out, y.clamp(min=0))})(),
            LOGITS,
            TOKENS,
        ),
        "labels that do not count has the loss",
    ),
    "does not shift": (
        (
            type("Broken", (CausalLMLoss,), {"__call__": lambda self, out, y: MaskedLMLoss()(out, y)})(),
            LOGITS,
            torch.tensor([[3, 4, -100, 2, 8], [1, 1, 0, -100, -100], [2, -100, 7, 3, 6]]),
        ),
        "labels before position 1 change the loss",
    ),
    "an infinite gradient": (
        mse(__call__=lambda self, out, y: (sums(out, y) + (out * 0).abs().sqrt().mean(dim=(1, 2)), ones(y))),
        "gradient is not finite",
    ),
    "an if": (
        mse(__call__=lambda self, out, y: (sums(out, y) * (2 if out.sum() > -1e9 else 3), ones(y))),
        "cannot be traced",
    ),
    "rows alike": ((MSELoss(), LOGITS * 0, FLOATS * 0), "all rows have the same loss"),
    "one row": ((MSELoss(), LOGITS[:1], FLOATS[:1]), "two or more"),
    "labels that are none": ((CausalLMLoss(), LOGITS, TOKENS * 2), "the labels have others"),
}


@pytest.mark.parametrize("case", BROKEN_LOSSES)
def test_a_loss_that_is_broken(case: str) -> None:
    (loss, outputs, labels), reason = BROKEN_LOSSES[case]
    with pytest.raises(ContractError, match=f"(?s)loss '{type(loss).__name__}': .*({reason})"):
        check_loss(loss, outputs, labels)


@dataclasses.dataclass(frozen=True)
class Listed(SGD):
    """Options that JSON cannot bring back equal."""

    parts: Any = dataclasses.field(default_factory=lambda: {1: 2})

    def __post_init__(self) -> None:
        pass


def test_what_is_none_of_the_kind() -> None:
    with pytest.raises(ContractError, match=r"OneSided.. is not derived from UpdateRule"):
        check_rule(OneSided())  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="is not derived from Estimator"):
        check_estimator(TwoSided)  # type: ignore[arg-type]
    with pytest.raises(UnknownExtensionError, match="no update rule 'newton'"):
        check_rule("newton")
    with pytest.raises(ContractError, match=r"its JSON .* makes"):
        check_rule(Listed())
    with pytest.raises(ContractError, match="cannot be made from its name"):
        check_loss(CallableLoss(lambda out, y: sums(out, y), (5, 9), torch.float32), LOGITS, FLOATS)


def test_without_assert_statements() -> None:
    """Under python -O the suites find the same."""
    code = """
import torch
from mobizo_compiler import MSELoss
from mobizo_compiler.errors import ContractError
from mobizo_compiler.step.estimators import TwoSided
from mobizo_compiler.step.rules import SGD
from mobizo_compiler.testing import check_estimator, check_loss, check_rule
half = type("Half", (TwoSided,), {"lanes": lambda self, queries: queries})()
worse = type("Worse", (SGD,), {"update": lambda self, direction, memory: (direction / 0, memory)})()
mean = type("Mean", (MSELoss,), {"__call__": lambda self, out, y: ((out - y).square().mean(), torch.ones(2))})()
data = torch.randn(2, 3), torch.randn(2, 3)
for check, arguments in ((check_estimator, (half,)), (check_rule, (worse,)), (check_loss, (mean, *data))):
    try:
        check(*arguments)
    except ContractError as error:
        print(error.problem.split(":")[0])
"""
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["estimator 'Half'", "update rule 'Worse'", "loss 'Mean'"], done.stderr
