"""Write out what Vulkan's kernels take in one form only, or compute as something else.

Given:    %g = gather(%x, -1, %i)      %s = sum(%x, [1])                        %p = pow(%x, 2)
          %l = log(%x)                 %y = gelu(%x)                    %n = rms_norm(%x, [8], %w, 1e-5)
Result:   %g = gather(%x, 2, %i)       %s = reshape(sum(%x, [1], True), ...)    %p = mul(%x, %x)
          %l = mul(log10(%x), 2.3026)  %y = mul(add(%x, mul(abs(%x), %erf)), 0.5)
          %n = mul(mul(%x, rsqrt(add(mean(mul(%x, %x), [-1], True), 1e-5))), %w)
Numbers: same up to rounding; for GELU 1.5e-7 of |x|.

The kernel of gather reads a negative axis as another axis. Reductions run without the reduced axis only over the last
one. Powers are exponentials of logarithms. RMSNorm is fused from this form; ExecuTorch's own has a sum with a number
that has no kernel. The only GELU is the tanh form, whatever is asked for; erf is
approximated here as in Abramowitz and Stegun, 7.1.26, by a polynomial and an exponential.

The noise and the update of the state are left as they are: `replay` must repeat them bit by bit in other kernels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_compiler.backends.vulkan.operators import REDUCTIONS, name_of
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import ancestors
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import STATE_INPUT

aten = torch.ops.aten
Rule = Callable[..., fx.Node | None]
_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
_ERF_SCALE = 0.3275911


@dataclasses.dataclass(frozen=True)
class SpellOut(Pass):
    """Replace the calls that have a rule."""

    needs = frozenset({facts.STATIC})
    numbers = "rounding"

    def rewrite(self, edit: Editor) -> None:
        """Every call on its own."""
        network = ancestors(node for name, node in edit.outputs.items() if name != STATE_INPUT)
        if "noise" in edit.values:
            network -= ancestors([edit.values["noise"]])
        for node in list(edit.graph.nodes):
            if node not in network or node.op != "call_function":
                continue
            rule = _keep_axis if name_of(node) in REDUCTIONS else _RULES.get(node.target)
            if rule is None:
                continue
            with edit.graph.inserting_before(node):
                replacement = rule(edit, node, *node.args, **node.kwargs)
            if replacement is not None:
                edit.replace(node, replacement)


def _keep_axis(edit: Editor, node: fx.Node, x: fx.Node, axes: Any = None, keep: bool = False, **kw: Any) -> Any:
    """A reduction that keeps the axes it reduces, and a reshape."""
    value, shape = x.meta["val"], node.meta["val"].shape
    if not value.dtype.is_floating_point or not value.dim() or kw.get("dtype") not in (None, value.dtype):
        return None
    target = _OVER_AXES[name_of(node)]
    rank = value.dim()
    wanted = sorted(axis % rank for axis in ([axes] if isinstance(axes, int) else axes or range(rank)))
    written = [-1] if wanted == [rank - 1] else wanted
    if keep:
        return edit.call(target, x, written, True) if written != axes else None
    if any(not isinstance(size, int) for size in (*value.shape, *shape)):
        return None
    if wanted == list(range(rank)) and rank > 2:  # kernels reduce two axes at most
        x, written = edit.call(aten.reshape.default, x, [1, value.numel()]), [-1]
    return edit.call(aten.reshape.default, edit.call(target, x, written, True), list(shape))


def _gather(edit: Editor, node: fx.Node, x: fx.Node, axis: int, index: fx.Node, **kw: Any) -> fx.Node | None:
    rank = x.meta["val"].dim()
    return edit.call(aten.gather.default, x, axis % rank, index, **kw) if axis < 0 and rank else None


def _power(edit: Editor, node: fx.Node, x: fx.Node, exponent: float) -> fx.Node | None:
    return edit.call(aten.mul.Tensor, x, x) if exponent == 2 and x.meta["val"].dtype.is_floating_point else None


def _square(edit: Editor, node: fx.Node, x: fx.Node) -> fx.Node | None:
    return _power(edit, node, x, 2)


def _log(edit: Editor, node: fx.Node, x: fx.Node) -> fx.Node | None:
    if x.meta["val"].dtype != torch.float32:
        return None
    return edit.call(aten.mul.Tensor, edit.call(aten.log10.default, x), math.log(10.0))


def _gelu(edit: Editor, node: fx.Node, x: fx.Node, approximate: str = "none") -> fx.Node | None:
    inlined: fx.Node | None = edit.inline(_exact_gelu, x) if approximate == "none" else None
    return inlined


def _exact_gelu(x: Tensor) -> Tensor:
    """GELU with erf: x / 2 * (1 + erf(x / sqrt 2)), and sign(x) erf(|x|) for erf(x)."""
    size = torch.abs(x)
    u = size * math.sqrt(0.5)
    denominator = u * _ERF_SCALE + 1.0
    t = torch.rsqrt(denominator * denominator)  # 1 / denominator, which is above 0
    polynomial = t * _ERF[4] + _ERF[3]
    for coefficient in _ERF[2::-1]:
        polynomial = polynomial * t + coefficient
    erf = torch.exp(u * u * -1.0) * (polynomial * t) * -1.0 + 1.0
    return (x + size * erf) * 0.5


def _rms_norm(
    edit: Editor, node: fx.Node, x: fx.Node, shape: Any, weight: fx.Node | None = None, eps: float | None = None
) -> fx.Node | None:
    if len(shape) != 1 or x.meta["val"].dtype != torch.float32:
        return None
    square = edit.call(aten.mul.Tensor, x, x)
    mean = edit.call(aten.mean.dim, square, [-1], True)
    size = edit.call(aten.add.Tensor, mean, torch.finfo(torch.float32).eps if eps is None else eps)
    normed = edit.call(aten.mul.Tensor, x, edit.call(aten.rsqrt.default, size))
    return normed if weight is None else edit.call(aten.mul.Tensor, normed, weight)


def _with_tensor(target: Any) -> Rule:
    def rule(edit: Editor, node: fx.Node, x: fx.Node, number: float, *rest: Any) -> fx.Node | None:
        same = not rest and node.meta["val"].dtype == torch.float32
        return edit.call(target, x, number) if same else None

    return rule


_OVER_AXES = {"mean": aten.mean.dim, "sum": aten.sum.dim_IntList, "amax": aten.amax.default, "amin": aten.amin.default}
_RULES: dict[Any, Rule] = {
    aten.gather.default: _gather,
    aten.pow.Tensor_Scalar: _power,
    aten.square.default: _square,
    aten.log.default: _log,
    aten.gelu.default: _gelu,
    aten.rms_norm.default: _rms_norm,
    aten.add.Scalar: _with_tensor(aten.add.Tensor),
    aten.sub.Scalar: _with_tensor(aten.sub.Tensor),
    aten.mul.Scalar: _with_tensor(aten.mul.Tensor),
    aten.div.Scalar: _with_tensor(aten.div.Tensor),
}
