"""The oracle: a training step in plain PyTorch that shares nothing with the compiler but the noise and the loss.

Lanes run one after the other, each as an ordinary call of the model with the adapter merged into its weights, so there
are no lanes in a batch, no hooks, no graph, and no notion of where rows are. In float64 it says what is right; the
distance of its own float32 run from that says how much rounding a model shows (`rounding`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mobizo_compiler.config import ZOConfig
from mobizo_compiler.format.program import StepResult
from mobizo_compiler.step.estimators import get_estimator, scaled
from mobizo_compiler.step.losses import CausalLMLoss, Loss
from mobizo_compiler.step.noise import noise
from mobizo_compiler.step.sites import Site, initial_state
from mobizo_compiler.upstream import pytree

# Another order of additions gives another rounding error of the same size; eight times it is not rounding any more.
# A single float32 run may hit the exact value by luck, so a loss is never taken to be better than two units in its
# last place.
ROUNDING_FACTOR = 8.0
FLOAT32_ROUNDING = 2.0**-22


class Oracle:
    """Steps of `model` with adapters at `sites`, with plain SGD.

    Args:
        model: The module in eval mode; it is copied.
        sites: As the compiled program says.
        lora_a: A of every site.
        zo: The estimator.
        loss: The loss; causal language modelling if None.
        dtype: float64, or float32 for a model that computes in nothing else.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Iterable[Site],
        lora_a: Mapping[str, Tensor],
        *,
        zo: ZOConfig,
        loss: Loss | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.model = copy.deepcopy(model).to(dtype)
        self.dtype, self.zo = dtype, zo
        self.loss = loss or CausalLMLoss()
        self.sites = tuple(sites)
        self.lora_a = {fqn: a.to(dtype) for fqn, a in lora_a.items()}
        self.state = initial_state(self.sites, lora_a).to(dtype)

    def merged(self, state: Tensor) -> dict[str, Tensor]:
        """Weights with B of this state, by name."""
        modules, parameters = (
            dict(self.model.named_modules()),
            dict(self.model.named_parameters(remove_duplicate=False)),
        )
        weights = {}
        for site in self.sites:
            name = f"{site.fqn}.weight" if f"{site.fqn}.weight" in parameters else site.fqn
            weight = parameters[name].detach()
            b_RO = site.lora_b(state)
            a_RI = self.lora_a[site.fqn] if site.a_offset is None else site.lora_a(state)
            delta_OI = site.scaling * (b_RO.T @ a_RI.reshape(site.r, -1))
            inputs_first = type(modules.get(site.fqn)).__name__ == "Conv1D" or (
                site.fqn not in modules and tuple(weight.shape) == (site.in_features, site.out_features)
            )
            weights[name] = weight + (delta_OI.T if inputs_first else delta_OI.reshape(weight.shape))
        return weights

    def gradient(self, inputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient with respect to the trained numbers, [P], by PyTorch."""
        labels = labels.to(self.dtype) if labels.is_floating_point() else labels
        leaf = self.state.clone().requires_grad_(True)
        row_loss, row_weight = self.loss(self._outputs(inputs, leaf), labels)
        loss = row_loss.sum() / row_weight.sum()
        (found,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), found

    @torch.no_grad()
    def evaluate(self, inputs: Any, state: Tensor | None = None) -> Any:
        """What the model returns with this state, or its own."""
        return self._outputs(inputs, self.state if state is None else state)

    def _outputs(self, inputs: Any, state: Tensor) -> Any:
        given = pytree.tree_map_only(Tensor, lambda t: t.to(self.dtype) if t.is_floating_point() else t, inputs)
        args, kwargs = ((), given) if isinstance(given, Mapping) else (tuple(given), {})
        merged = self.merged(state)
        return torch.func.functional_call(self.model, merged, args, dict(kwargs), tie_weights=False)

    @torch.no_grad()
    def train_step(self, inputs: Any, labels: Tensor, *, seed: int, learning_rate: float, eps: float) -> StepResult:
        """One step; see `Session.train_step`."""
        labels = labels.to(self.dtype) if labels.is_floating_point() else labels
        zo, estimator = self.zo, get_estimator(self.zo.estimator)
        z_QP = noise(seed, zo.queries, self.state.numel(), zo.noise).to(self.dtype)
        losses = []
        for lane_P in estimator.perturbed(self.state, eps * z_QP):
            row_loss, row_weight = self.loss(self.evaluate(inputs, lane_P), labels)
            losses.append(row_loss.sum() / row_weight.sum())
        loss_G = torch.stack(losses)
        eps_1 = torch.tensor([eps], dtype=loss_G.dtype)
        g_Q = scaled(estimator.projected_gradient(loss_G, eps_1), loss_G, eps_1, zo.normalize, zo.clip)
        self.state = self.state - learning_rate / zo.queries * (g_Q @ z_QP.to(g_Q.dtype)).to(self.dtype)
        return StepResult(float(loss_G.mean()), loss_G, g_Q)


def rounding(exact: Tensor, single: Tensor, least: float = 1.0) -> float:
    """How far a float32 engine may be from exact numbers, which count as `least` at least, from what one run showed."""
    shown = float((single.double() - exact.double()).abs().max())
    size = max(least, float(exact.abs().max()))
    return ROUNDING_FACTOR * max(shown, FLOAT32_ROUNDING * size)
