"""Deliberate faults in passes, backends and engines: `compile` must catch every one, on its own.

A fault is put behind a pass (its graph is changed after the pass made it) or in place of one of its functions. Faults
of a backend's passes are looked at in a dry run: then the graphs that would be lowered are compared with the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import mobizo_compiler as mobizo
from mobizo_compiler import CausalLMLoss, LoraConfig, SequenceClassificationLoss, ZOConfig, passes
from mobizo_compiler.backends import get_backend
from mobizo_compiler.backends.eager import EagerBackend
from mobizo_compiler.backends.vulkan.spell_out import SpellOut
from mobizo_compiler.backends.xnnpack import spell_out_gelu
from mobizo_compiler.backends.xnnpack.mean_as_linear import MeanAsLinear
from mobizo_compiler.backends.xnnpack.repeat_as_product import RepeatAsProduct
from mobizo_compiler.compiling.dry_run import DryRun
from mobizo_compiler.errors import LoweringError, PassContractError
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.passes import decompose_attention, difference_losses, perturb, replay, update_state
from mobizo_compiler.passes.decompose_attention import DecomposeAttention
from mobizo_compiler.passes.insert_mp_lora import LORA_A
from mobizo_compiler.step.estimators import TwoSided
from mobizo_compiler.testing import TinyCausalLM, TinyEncoder, check_backend, tiny_batch
from mobizo_compiler.testing.backend import _widened

pytestmark = pytest.mark.slow
aten = torch.ops.aten
Change = Callable[[Editor], None]


def decoder(backend: Any = "eager", **options: Any) -> mobizo.Program:
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=("q_proj", "k_proj", "v_proj", "down_proj"))
    model, inputs = _widened(TinyCausalLM(layers=1)), tiny_batch()[0]
    loss = CausalLMLoss(max_labels=2)
    return mobizo.compile(model, inputs, lora, ZOConfig(queries=2), loss, backend=backend, **options)


def encoder(backend: Any = "eager") -> mobizo.Program:
    features = torch.randn(3, 6, 12, generator=torch.Generator().manual_seed(0))
    lora, loss = LoraConfig(r=3, lora_alpha=6), SequenceClassificationLoss()
    return mobizo.compile(_widened(TinyEncoder()), (features,), lora, ZOConfig(queries=2), loss, backend=backend)


def dry(name: str) -> DryRun:
    return DryRun(get_backend(name))


def behind(step: type[Pass], change: Change, patch: pytest.MonkeyPatch) -> None:
    rewrite = step.rewrite

    def faulty(self: Pass, edit: Editor) -> None:
        rewrite(self, edit)
        change(edit)

    patch.setattr(step, "rewrite", faulty)


def lora_a(change: Callable[[Tensor], Tensor]) -> Change:
    def fault(edit: Editor) -> None:
        edit._tensors[f"{LORA_A}0"] = change(edit._tensors[f"{LORA_A}0"])

    return fault


def shifted_state(edit: Editor) -> None:
    """The last adapter reads its B one number too early."""
    slices = [node for node in edit.calls(aten.slice.Tensor) if operand(node) is edit.values["lanes"]]
    last = max(slices, key=lambda node: node.args[2])  # type: ignore[arg-type, return-value]
    source, axis, start, end = last.args
    last.args = (source, axis, start - 1, end - 1)  # type: ignore[operator]


def one_branch_dropped(edit: Editor) -> None:
    total = next(node for node in edit.calls(aten.add.Tensor) if operand(node).target is aten.linear.default)
    edit.replace(total, operand(total))


def lanes_swapped(edit: Editor) -> None:
    lanes = edit.values["lanes"]
    with edit.graph.inserting_after(lanes):
        swapped = edit.call(aten.flip.default, lanes, [0])
    edit.replace(lanes, swapped, keep=swapped)


def siblings_swapped(edit: Editor) -> None:
    merged = [n for n in edit.calls(aten.slice.Tensor) if operand(n).target is aten.linear.default]
    first, second = merged[:2]
    first.args, second.args = second.args, first.args


def other_position(edit: Editor) -> None:
    """The picked position is the one behind."""
    gather = edit.calls(aten.gather.default)[0]
    with edit.graph.inserting_before(gather):
        index = edit.call(aten.remainder.Scalar, edit.call(aten.add.Tensor, operand(gather, 2), 1), 6)
    gather.args = (gather.args[0], gather.args[1], index)


def mask_lost(edit: Editor) -> None:
    for node in edit.calls(aten.scaled_dot_product_attention.default):
        node.args = node.args[:3]


def scaled_result(target: Any, factor: float) -> Change:
    def fault(edit: Editor) -> None:
        node = edit.calls(target)[-1]
        with edit.graph.inserting_after(node):
            scaled = edit.call(aten.mul.Tensor, node, factor)
        edit.replace(node, scaled, keep=scaled)

    return fault


def bias_dropped(edit: Editor) -> None:
    node = next(n for n in edit.calls(aten.linear.default) if len(n.args) > 2)
    node.args = node.args[:2]


def constant_scaled(prefix: str) -> Change:
    def fault(edit: Editor) -> None:
        for name in [name for name in edit._tensors if name.startswith(prefix)]:
            edit._tensors[name] = edit._tensors[name] * 1.01

    return fault


def without_bias(made: Any) -> Any:
    def faulty(mask: Tensor) -> tuple[Tensor, Tensor]:
        bias, anything = made(mask)
        return torch.zeros_like(bias), anything

    return faulty


def another_gelu(made: Any) -> Any:
    return lambda x: x * 0.5 * (torch.tanh((x * x * x * 0.06 + x) * 0.797885) + 1.0)


class OneSlopeTooLarge(TwoSided):
    def projected_gradient(self, loss_G: Tensor, eps_1: Tensor) -> Tensor:
        return super().projected_gradient(loss_G, eps_1) * 2


class OneDirection(TwoSided):
    def perturbed(self, trained_P: Tensor, step_QP: Tensor) -> Tensor:
        return super().perturbed(trained_P, step_QP[:1].expand_as(step_QP))


def of_pass(step: type[Pass], change: Change) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: behind(step, change, patch)


def in_place_of(module: Any, name: str, function: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(module, name, function(getattr(module, name)))


def another_update(change: Callable[..., Tensor]) -> Callable[[Any], Any]:
    def made(original: Any) -> Any:
        return lambda queries, rule: (
            lambda state, noise, gradient, rate: change(original(queries, rule), state, noise, gradient, rate)
        )

    return made


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], Any]]] = {
    "A is 1 % too large": (of_pass(passes.InsertMPLoRA, lora_a(lambda a: a * 1.01)), decoder),
    "A is transposed": (of_pass(passes.InsertMPLoRA, lora_a(lambda a: a.T.reshape(a.shape))), decoder),
    "B is read at another offset": (of_pass(passes.InsertMPLoRA, shifted_state), decoder),
    "an adapter is left out": (of_pass(passes.InsertMPLoRA, one_branch_dropped), decoder),
    "siblings take each other's part": (of_pass(passes.MergeSiblings, siblings_swapped), decoder),
    "lanes + and - are swapped": (of_pass(passes.Perturb, lanes_swapped), decoder),
    "noise is 1 % too large": (
        in_place_of(perturb, "directions", lambda made: lambda *a: made(*a) * 1.01),
        decoder,
    ),
    "all queries look in one direction": (
        in_place_of(perturb, "get_estimator", lambda made: lambda name: OneDirection()),
        decoder,
    ),
    "differences are divided by eps, not by 2 eps": (
        in_place_of(difference_losses, "get_estimator", lambda made: lambda name: OneSlopeTooLarge()),
        decoder,
    ),
    "the mean over queries is a sum": (
        in_place_of(
            update_state, "updated_state", another_update(lambda update, s, rate, g, z: update(s, rate, 2.0 * g, z))
        ),
        decoder,
    ),
    "the step goes uphill": (
        in_place_of(
            update_state, "updated_state", another_update(lambda update, s, rate, g, z: update(s, rate, -g, z))
        ),
        decoder,
    ),
    "replay draws other noise": (
        in_place_of(replay, "noise_values", lambda made: lambda seed, *a: made(seed + 1, *a)),
        decoder,
    ),
    "another position is picked": (of_pass(passes.HoistPicks, other_position), decoder),
    "picking loses the mask": (of_pass(passes.HoistPicks, mask_lost), decoder),
    "canonical form drops a bias": (of_pass(passes.Canonicalize, bias_dropped), encoder),
    "attention is scaled 1 % too much": (
        of_pass(DecomposeAttention, scaled_result(aten.bmm.default, 1.01)),
        lambda: decoder(dry("xnnpack")),
    ),
    "attention loses its mask": (
        in_place_of(decompose_attention, "_bias_and_any", without_bias),
        lambda: decoder(dry("xnnpack")),
    ),
    "a mean divides by another number": (
        of_pass(MeanAsLinear, constant_scaled("mobizo_mean")),
        lambda: decoder(dry("xnnpack")),
    ),
    "repeated rows are 1 % too large": (
        of_pass(RepeatAsProduct, constant_scaled("mobizo_ones")),
        lambda: decoder(dry("xnnpack")),
    ),
    "GELU by tanh has another coefficient": (
        in_place_of(spell_out_gelu, "_gelu", another_gelu),
        lambda: encoder(dry("xnnpack")),
    ),
    "a spelled-out norm is 1 % too large": (
        of_pass(SpellOut, scaled_result(aten.rsqrt.default, 1.01)),
        lambda: encoder(dry("vulkan")),
    ),
    "SiLU is 1 % too large": (lambda patch: None, lambda: decoder(LouderSiLU())),
    "rows of the prefix are in another order": (
        of_pass(passes.Prefix, lambda edit: edit.set_outputs(dict(_rolled(edit)))),
        lambda: prefixed(),
    ),
}


def _rolled(edit: Editor) -> list[tuple[str, fx.Node]]:
    with edit.graph.inserting_before(edit.graph.output_node()):
        return [(name, edit.call(aten.roll.default, node, [1], [0])) for name, node in edit.outputs.items()]


def prefixed() -> mobizo.Program:
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=("v_proj",), layers_to_transform=(1,))
    model, inputs = _widened(TinyCausalLM(layers=2)), tiny_batch()[0]
    return mobizo.compile(model, inputs, lora, ZOConfig(queries=2), backend="eager", split_prefix=True)


@dataclasses.dataclass(frozen=True)
class Louder(Pass):
    """Writes SiLU as x * sigmoid(x) * 1.01, and says that this is the same up to rounding."""

    numbers = "rounding"

    def rewrite(self, edit: Editor) -> None:
        for node in edit.calls(aten.silu.default):
            with edit.graph.inserting_before(node):
                edit.replace(node, edit.inline(lambda x: x * torch.sigmoid(x) * 1.01, operand(node)))


class LouderSiLU(EagerBackend):
    name = "louder"

    def passes(self) -> Sequence[Pass]:
        return (Louder(),)


@pytest.mark.parametrize("fault", FAULTS)
def test_compile_catches(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put, compiled = FAULTS[fault]
    put(monkeypatch)
    with pytest.raises((LoweringError, PassContractError)) as caught:
        compiled()
    assert "differ by" in str(caught.value) or isinstance(caught.value, PassContractError), caught.value


def test_without_a_fault_nothing_is_caught() -> None:
    decoder()
    decoder(dry("xnnpack"))
    encoder(dry("xnnpack"))
    encoder(dry("vulkan"))
    prefixed()


def test_the_contract_catches_a_faulty_pass() -> None:
    with pytest.raises(AssertionError, match=r"backend 'louder'(.|\n)*other numbers than the model"):
        check_backend(LouderSiLU())
