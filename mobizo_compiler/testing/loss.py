"""The contract of a loss, as a check that authors of losses run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mobizo_compiler.step.losses import LOSSES, LabelSpec, Loss
from mobizo_compiler.testing.oracle import FLOAT32_ROUNDING, ROUNDING_FACTOR
from mobizo_compiler.testing.require import pure, require, suite, traceable
from mobizo_compiler.upstream import FakeTensorMode, pytree

SMALL = 1e-4  # a move of the outputs that float32 resolves and half precision does not


def check_loss(loss: Loss, outputs: Any, labels: Tensor) -> None:
    """Hold a loss to what it is: a frozen dataclass that gives each row its loss, from that row alone.

    Checks that `label_spec` knows these labels, from outputs without values as well; that there are a sum of losses and
    a number of values for each row, float32 and finite, no number below zero; that they are those in float64, up to
    rounding; that rows in another order, and beside copies of themselves, have the losses they had; that labels that do
    not count say nothing; that it is pure and can be traced; that its gradient, where it has one, is finite, and
    that a small move along it is seen; and that
    its JSON makes it again.

    Args:
        loss: The loss.
        outputs: What a model returns, with two rows or more, all different: a tensor, or tensors in a dict, tuple, or
            output of transformers. Rows are the first axis.
        labels: The labels, as `Session.train_step` gets them. Some should count, and some not, where that can be.

    Raises:
        ContractError: It does not keep the contract; the message says how.

    >>> check_loss(LOSSES.get("mse"), torch.randn(3, 4), torch.randn(3, 4))
    """
    with suite(LOSSES, loss) as (found, _):
        rows = labels.shape[0] if labels.dim() else 0
        require(rows >= 2, f"the labels have {rows} rows; with two or more it shows whether rows are kept apart")
        spec = _check_spec(found, outputs, labels)
        total, weight = _check_values(found, outputs, labels)
        _check_rows(found, outputs, labels, total, weight)
        _check_what_does_not_count(found, outputs, labels, spec)
        order = torch.arange(rows).flip(0)
        traceable("the loss", found, (outputs, labels), (_rows(outputs, order), labels[order]))
        _check_gradient(found, outputs, labels, total)


def _check_spec(loss: Loss, outputs: Any, labels: Tensor) -> LabelSpec:
    with FakeTensorMode() as mode:
        fake = pytree.tree_map_only(Tensor, mode.from_tensor, outputs)
        spec = loss.label_spec(fake)
    require(isinstance(spec, LabelSpec), f"label_spec returns {spec!r}, not a LabelSpec")
    shape = (labels.shape[0] if spec.shape[0] is None else spec.shape[0], *spec.shape[1:])
    require(
        tuple(map(int, shape)) == tuple(labels.shape) and spec.dtype == labels.dtype,
        f"label_spec says {spec.dtype} {list(shape)}, the labels are {labels.dtype} {list(labels.shape)}",
    )
    if spec.low is not None and spec.high is not None:
        allowed = (labels >= spec.low) & (labels <= spec.high)
        if spec.choices is not None:
            allowed = torch.isin(labels, torch.tensor(spec.choices))
        allowed |= labels == spec.ignore_index if spec.ignore_index is not None else False
        require(bool(allowed.all()), f"label_spec allows {spec.low}..{spec.high}, and the labels have others")
    return spec


def _check_values(loss: Loss, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    result = pure("the loss", loss, outputs, labels)
    require(isinstance(result, tuple) and len(result) == 2, f"it returns {type(result).__name__}, not two tensors")
    for name, value in zip(("sums of losses", "numbers of values"), result, strict=True):
        if not isinstance(value, Tensor):
            require(False, f"the {name} are {value!r}, not a tensor")
            continue
        require(
            value.shape == labels.shape[:1] and value.dtype == torch.float32,
            f"the {name} are {value.dtype} {list(value.shape)}, not float32 [{labels.shape[0]}]",
        )
        require(bool(value.isfinite().all()), f"the {name} are {value.tolist()}")
    total, weight = result
    require(bool((weight >= 0).all()), f"the numbers of values are {weight.tolist()}")
    require(bool(weight.any()), "no label counts, so that there is nothing to check: label something")
    require(float(total.max() - total.min()) > 0, "all rows have the same loss: check it with rows that differ")
    exact = loss(_floats(outputs, torch.float64), labels.double() if labels.is_floating_point() else labels)
    for one, other in zip(result, exact, strict=True):
        apart = float((one.double() - other.double()).abs().max())
        require(apart <= _rounding(outputs, one), f"in float64 it is {other.tolist()}, in float32 {one.tolist()}")
    return total, weight


def _rounding(outputs: Any, values: Tensor) -> float:
    """What float32 may do to a sum over a row's outputs."""
    count = max(math.prod(leaf.shape[1:]) for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))
    return ROUNDING_FACTOR * FLOAT32_ROUNDING * math.sqrt(count) * max(1.0, float(values.abs().max()))


def _check_rows(loss: Loss, outputs: Any, labels: Tensor, total: Tensor, weight: Tensor) -> None:
    rows = labels.shape[0]
    for what, index in (
        ("in another order", torch.arange(rows).flip(0)),
        ("beside copies of themselves", torch.arange(rows).repeat(3)),
        ("with a row in place of all others", torch.zeros(rows, dtype=torch.int64)),
    ):
        found = loss(_rows(outputs, index), labels[index])
        apart = max(float((a - b[index]).abs().max()) for a, b in zip(found, (total, weight), strict=True))
        require(
            apart <= _rounding(outputs, total),
            f"rows {what} have other losses: {found[0].tolist()}, not {total[index].tolist()}; the loss of a row may "
            "depend on that row alone",
        )


def _check_what_does_not_count(loss: Loss, outputs: Any, labels: Tensor, spec: LabelSpec) -> None:
    if spec.first and spec.low is not None:
        other = labels.clone()
        other[:, : spec.first] = spec.low
        same = all(torch.equal(a, b) for a, b in zip(loss(outputs, other), loss(outputs, labels), strict=True))
        require(same, f"labels before position {spec.first} change the loss, and label_spec says that they never count")
    if spec.ignore_index is None:
        return
    ignored = labels.clone()
    ignored[0] = spec.ignore_index
    total, weight = loss(outputs, ignored)
    require(
        float(total[0]) == 0 and float(weight[0]) == 0,
        f"a row of labels that do not count has the loss {float(total[0])} of {float(weight[0])} values, not 0 of 0",
    )


def _check_gradient(loss: Loss, outputs: Any, labels: Tensor, before: Tensor) -> None:
    """It is finite, and a small move along it moves the losses: half precision would not see it."""
    leaves, form = pytree.tree_flatten(outputs)
    moving = [
        leaf.detach().clone().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for leaf in leaves
    ]
    total, _ = loss(pytree.tree_unflatten(moving, form), labels)
    if not total.requires_grad:
        return  # its values are all that an estimate needs
    wanted = [leaf for leaf in moving if isinstance(leaf, Tensor) and leaf.requires_grad]
    gradients = torch.autograd.grad(total.sum(), wanted, allow_unused=True)
    for gradient in gradients:
        require(gradient is None or bool(gradient.isfinite().all()), "its gradient is not finite on these outputs")
    by_leaf = dict(zip(map(id, wanted), gradients, strict=True))
    moved, expected = [], torch.zeros_like(before)
    for leaf in moving:
        slope = by_leaf.get(id(leaf))
        if slope is None:
            moved.append(leaf)
        else:
            moved.append(leaf.detach() + SMALL * slope.sign())
            expected += SMALL * slope.abs().reshape(len(before), -1).sum(dim=1)
    after, _ = loss(pytree.tree_unflatten(moved, form), labels)
    apart = float((after.detach() - before - expected).abs().max())
    require(
        apart <= 0.25 * float(expected.max()) + 2 * _rounding(outputs, before),
        f"a move that makes the losses {expected.tolist()} larger, as the gradient says, makes them "
        f"{(after.detach() - before).tolist()} larger: they are coarser than float32",
    )


def _rows(outputs: Any, index: Tensor) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[index], outputs)


def _floats(outputs: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, outputs)
