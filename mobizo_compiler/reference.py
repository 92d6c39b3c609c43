"""The step in plain PyTorch, with no graph machinery: the oracle, and the place to read what a step does.

Shape suffixes: N rows in all lanes, F features, R rank, O out features, G lanes, Q queries, P trained parameters.

A module hook adds the adapter to every targeted linear layer. `train_step` perturbs the flat state as the
estimator says, runs all lanes as one batch, takes the differences of the losses and moves the state (MobiZO,
algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobizo_compiler.config import ZOConfig
from mobizo_compiler.format.program import Program, StepResult
from mobizo_compiler.step.estimators import get_estimator, scaled
from mobizo_compiler.step.losses import CausalLMLoss, Loss, get_loss
from mobizo_compiler.step.noise import noise
from mobizo_compiler.step.rules import PLAIN, UpdateRule, get_rule
from mobizo_compiler.step.sites import Site, initial_state


class ReferenceStep:
    """MobiZO on `model`, which gets hooks and is otherwise left alone; `remove` takes them off.

    Args:
        model: A module whose adapted layers are linear; the state is made on its device.
        sites: As a compiled program says.
        lora_a: A of every site by path.
        zo: The estimator.
        rule: The update rule; what it remembers is in `memory`, what is trained in `state`, [P].
        loss: The loss; causal language modelling if None.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Iterable[Site],
        lora_a: Mapping[str, Tensor],
        *,
        zo: ZOConfig,
        rule: UpdateRule = PLAIN,
        loss: Loss | None = None,
    ) -> None:
        self.model, self.zo, self.rule = model, zo, rule
        self.loss = loss or CausalLMLoss()
        self.sites = tuple(sites)
        some = next(model.parameters())
        self.dtype, self.device = some.dtype, some.device
        self.state = initial_state(self.sites, lora_a).to(self.device, self.dtype)
        self.memory = {
            name: tensor.to(self.device, self.dtype) for name, tensor in rule.init(self.state.numel()).items()
        }
        self._lanes_GP = self.state[None]
        modules = dict(model.named_modules())
        self._hooks = [
            modules[site.fqn].register_forward_hook(self._adapter(site, lora_a[site.fqn].to(self.device, self.dtype)))
            for site in self.sites
        ]

    @classmethod
    def of(cls, model: nn.Module, program: Program) -> ReferenceStep:
        """The step of a program, with the estimator, rule and loss that its manifest names.

        Args:
            model: What was compiled.
            program: A program, also one out of a file.

        Raises:
            ConfigError: Its loss is a function, or one of the three is not installed here.
        """
        manifest = program.manifest
        rule, loss = get_rule(manifest.rule), get_loss(manifest.loss)
        return cls(model, program.sites, program.lora_a_by_fqn, zo=manifest.zo, rule=rule, loss=loss)

    def _adapter(self, site: Site, a_RF: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], y_NTO: Tensor) -> Tensor:
            b_GRO = site.lora_b(self._lanes_GP)
            if site.a_offset is None:
                h_GNR = F.linear(args[0], a_RF).reshape(b_GRO.shape[0], -1, site.r)
            else:
                x_GNF = args[0].reshape(b_GRO.shape[0], -1, site.in_features)
                h_GNR = x_GNF @ site.lora_a(self._lanes_GP).transpose(1, 2)
            return y_NTO + site.scaling * torch.bmm(h_GNR, b_GRO).reshape(y_NTO.shape)

        return hook

    @torch.no_grad()
    def train_step(self, inputs: Any, labels: Tensor, *, seed: int, learning_rate: float, eps: float) -> StepResult:
        """One step; see `Session.train_step`."""
        zo, estimator, lanes = self.zo, get_estimator(self.zo.estimator), self.zo.lanes
        z_QP = noise(seed, zo.queries, self.state.numel(), zo.noise, self.device).to(self.dtype)
        self._lanes_GP = estimator.perturbed(self.state, eps * z_QP)
        repeated = _map(inputs, lambda rows: rows.repeat(lanes, *[1] * (rows.dim() - 1)))
        row_loss_N, row_weight_N = self.loss(
            _call(self.model, repeated), labels.repeat(lanes, *[1] * (labels.dim() - 1))
        )
        loss_G = row_loss_N.reshape(lanes, -1).sum(1) / row_weight_N.reshape(lanes, -1).sum(1)
        eps_1 = torch.tensor([eps], dtype=self.dtype, device=self.device)
        g_Q = scaled(estimator.projected_gradient(loss_G, eps_1), loss_G, eps_1, zo.normalize, zo.clip)
        if learning_rate:
            direction_P = g_Q.to(self.dtype) @ z_QP / zo.queries
            step_P, self.memory = self.rule.update(direction_P, self.memory)
            self.state -= learning_rate * (step_P + self.rule.weight_decay * self.state)
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
