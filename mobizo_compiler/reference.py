"""The step in plain PyTorch, with no graph machinery: the oracle, and the place to read what a step does.

Shape suffixes: N rows in all lanes, T tokens, F features, R rank, O out features, G lanes, Q queries, P parameters.

A module hook adds the adapter to every targeted linear layer. `train_step` perturbs the flat state in 2q directions,
runs all of them as one batch, takes the differences of the losses and moves the state (MobiZO, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobizo_compiler.artifact import StepResult
from mobizo_compiler.losses import CausalLMLoss, Loss
from mobizo_compiler.noise import noise
from mobizo_compiler.program import Site


class ReferenceStep:
    """MobiZO on `model`, which gets hooks and is otherwise left alone; `remove` takes them off."""

    def __init__(
        self,
        model: nn.Module,
        sites: Iterable[Site],
        lora_a: Mapping[str, Tensor],
        *,
        queries: int,
        distribution: str = "gaussian",
        loss: Loss | None = None,
    ) -> None:
        self.model, self.queries, self.distribution = model, queries, distribution
        self.loss = loss or CausalLMLoss()
        self.sites = tuple(sites)
        self.dtype = next(model.parameters()).dtype
        self.state = torch.zeros(sum(site.size for site in self.sites), dtype=self.dtype)
        self._lanes_GP = self.state[None]
        modules = dict(model.named_modules())
        self._hooks = [
            modules[site.fqn].register_forward_hook(self._adapter(site, lora_a[site.fqn].to(self.dtype)))
            for site in self.sites
        ]

    def _adapter(self, site: Site, a_RF: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], y_NTO: Tensor) -> Tensor:
            b_GRO = site.lora_b(self._lanes_GP)
            h_GNR = F.linear(args[0], a_RF).reshape(b_GRO.shape[0], -1, site.r)
            return y_NTO + site.scaling * torch.bmm(h_GNR, b_GRO).reshape(y_NTO.shape)

        return hook

    @torch.no_grad()
    def train_step(self, inputs: Any, labels: Tensor, *, seed: int, learning_rate: float, eps: float) -> StepResult:
        """One step; see `Session.train_step`."""
        q, lanes = self.queries, 2 * self.queries
        z_QP = noise(seed, q, self.state.numel(), self.distribution).to(self.dtype)
        self._lanes_GP = torch.cat((self.state + eps * z_QP, self.state - eps * z_QP))
        repeated = _map(inputs, lambda rows: rows.repeat(lanes, *[1] * (rows.dim() - 1)))
        row_loss_N, row_weight_N = self.loss(
            _call(self.model, repeated), labels.repeat(lanes, *[1] * (labels.dim() - 1))
        )
        loss_G = row_loss_N.reshape(lanes, -1).sum(1) / row_weight_N.reshape(lanes, -1).sum(1)
        g_Q = (loss_G[:q] - loss_G[q:]) / (2 * eps)
        self.state -= learning_rate / q * (g_Q @ z_QP)
        return StepResult(float(loss_G.mean()), loss_G, g_Q)

    @torch.no_grad()
    def evaluate(self, inputs: Any) -> Any:
        """What the model returns, with the adapter on and nothing perturbed."""
        self._lanes_GP = self.state[None]
        return _call(self.model, inputs)

    def remove(self) -> None:
        """Take the adapters off the model."""
        for handle in self._hooks:
            handle.remove()


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _map(inputs: Any, function: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: function(value) for name, value in inputs.items()}
    return tuple(function(value) for value in inputs)
