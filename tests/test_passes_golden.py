"""What each pass does to a small program, as text that a person has read."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mobizo_compiler import CausalLMLoss, LoraConfig, ZOConfig, passes
from mobizo_compiler.backends.shared_passes.core_aten import CoreAten
from mobizo_compiler.backends.shared_passes.decompose_attention import DecomposeAttention
from mobizo_compiler.backends.xnnpack.mean_as_linear import MeanAsLinear
from mobizo_compiler.backends.xnnpack.repeat_as_product import RepeatAsProduct
from mobizo_compiler.backends.xnnpack.spell_out_gelu import SpellOutGelu
from mobizo_compiler.graph.example import bind_example
from mobizo_compiler.graph.pipeline import Pass, Pipeline
from mobizo_compiler.graph.printer import program_text
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.testing import TinyCausalLM, TokenWise, tiny_batch

LORA = LoraConfig(r=4, lora_alpha=6, target_modules=("up",))
ZO = ZOConfig(queries=2, noise="rademacher")
CHAIN: list[tuple[str, Pass]] = [
    ("attach_loss", passes.AttachLoss(CausalLMLoss(max_labels=2))),
    ("canonicalize", passes.Canonicalize()),
    ("slice_labels", passes.SliceLabels()),
    ("insert_mp_lora", passes.InsertMPLoRA(LORA)),
    ("duplicate_lanes", passes.DuplicateLanes(4)),
    ("perturb", passes.Perturb(ZO)),
    ("difference_losses", passes.DifferenceLosses(ZO)),
    ("update_state", passes.UpdateState()),
]


def change(before: GraphProgram, after: GraphProgram, program: Callable[[GraphProgram], str] = program_text) -> str:
    """The difference of two programs, without context and without line numbers."""
    lines = difflib.unified_diff(program(before).splitlines(), program(after).splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@"))) + "\n"


@pytest.fixture(scope="module")
def captured() -> GraphProgram:
    torch.manual_seed(0)
    return passes.capture(TokenWise().eval(), bind_example(None, (torch.zeros(3, 5, dtype=torch.int64),)))


def test_capture(captured: GraphProgram, golden: Callable[[str, str], None]) -> None:
    golden("capture.txt", program_text(captured))


@pytest.mark.parametrize("position", range(len(CHAIN)), ids=[name for name, _ in CHAIN])
def test_chain(position: int, captured: GraphProgram, golden: Callable[[str, str], None]) -> None:
    name, step = CHAIN[position]
    assert step.name == name
    before = Pipeline([p for _, p in CHAIN[:position]]).run(captured)
    after = step(before)
    if name == "perturb":
        # The generator is some hundred integer operators on the seed; what matters here is around them.
        def hide(program: GraphProgram) -> str:
            lines = program_text(program).splitlines()
            return "\n".join(line for line in lines if ": i32[" not in line or line.startswith("input"))

        golden(f"{name}.txt", change(before, after, hide))
    elif name == "duplicate_lanes":
        golden(f"{name}.txt", program_text(after))  # every shape changes
    else:
        golden(f"{name}.txt", change(before, after))


def test_specialize(captured: GraphProgram, golden: Callable[[str, str], None]) -> None:
    before = Pipeline([passes.Canonicalize(), passes.InsertMPLoRA(LORA), passes.DuplicateLanes(4)]).run(captured)
    golden("specialize.txt", program_text(passes.Specialize(3)(before)))


def test_replay(golden: Callable[[str, str], None], captured: GraphProgram) -> None:
    sites = passes.InsertMPLoRA(LORA)(captured).sites
    after = passes.Replay(sites, ZO)(passes.empty_program())
    lines = program_text(after).splitlines()
    golden("replay.txt", "\n".join(line for line in lines if ": i32[" not in line or line.startswith("input")) + "\n")


def test_canonicalize_removes_what_does_nothing(golden: Callable[[str, str], None]) -> None:
    class Idle(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.dropout(x.detach(), 0.5, training=False)
            x = x.to(torch.float32)[:, :].expand(-1, 7).reshape(-1, 7) * 1.0 + 0
            return x.clone().t().contiguous() + 1

    program = passes.capture(Idle().eval(), bind_example(None, (torch.zeros(3, 7),)))
    golden("canonicalize_idle.txt", program_text(passes.Canonicalize()(program)))


def static_attention() -> GraphProgram:
    torch.manual_seed(0)
    inputs, _ = tiny_batch()
    program = passes.capture(TinyCausalLM(layers=1).eval(), bind_example(None, inputs))
    return Pipeline([passes.Specialize(3), passes.Canonicalize()]).run(program)


def test_decompose_attention(golden: Callable[[str, str], None]) -> None:
    before = static_attention()
    golden("decompose_attention.txt", change(before, DecomposeAttention()(before)))


def test_spell_out_gelu(golden: Callable[[str, str], None]) -> None:
    class Gelus(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.gelu(nn.functional.gelu(x), approximate="tanh")

    before = passes.capture(Gelus().eval(), bind_example(None, (torch.zeros(3, 7),)))
    golden("spell_out_gelu.txt", program_text(SpellOutGelu()(before)))


def test_mean_as_linear(golden: Callable[[str, str], None]) -> None:
    before = static_attention()
    golden("mean_as_linear.txt", change(before, MeanAsLinear()(before)))


def with_labels(layers: int = 1) -> GraphProgram:
    """A tiny language model with its loss on one label of a row, and nothing moved yet."""
    torch.manual_seed(0)
    inputs, _ = tiny_batch()
    program = passes.capture(TinyCausalLM(layers=layers).eval(), bind_example(None, inputs))
    return Pipeline([passes.AttachLoss(CausalLMLoss(max_labels=1)), passes.Canonicalize()]).run(program)


def test_slice_labels_into_the_last_attention(golden: Callable[[str, str], None]) -> None:
    lines = program_text(passes.SliceLabels()(with_labels())).splitlines()
    shown = ("gather(", "= linear(", "topk(", "scaled_dot_product_attention(", "softmax")
    golden("slice_labels_attention.txt", "\n".join(line for line in lines if any(s in line for s in shown)) + "\n")


def test_slice_labels_moves_a_selection_of_the_first_token(golden: Callable[[str, str], None]) -> None:
    class FirstToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.head = nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.norm(torch.relu(self.up(x)))[:, 0])
            return logits

    program = passes.Canonicalize()(passes.capture(FirstToken().eval(), bind_example(None, (torch.zeros(3, 7, 6),))))
    golden("slice_labels_first_token.txt", program_text(passes.SliceLabels()(program)))


def test_slice_outputs(golden: Callable[[str, str], None]) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 23)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = 3 * torch.tanh(self.head(x) / 3)
            return torch.cat([logits[..., 7:8], logits[..., -4:-2]], dim=-1)

    torch.manual_seed(0)
    x = torch.randn(3, 7, 6)
    model = Head().eval()
    program = passes.Canonicalize()(passes.capture(model, bind_example(None, (x,))))
    few = passes.SliceOutputs()(program)
    golden("slice_outputs.txt", program_text(few))
    torch.testing.assert_close(few.exported.module()(x)[0], model(x), rtol=1e-6, atol=1e-6)


def test_an_adapter_on_few_outputs(golden: Callable[[str, str], None]) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 23)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.head(x)
            return torch.cat([logits[..., 7:8], logits[..., 3:4]], dim=-1)

    torch.manual_seed(0)
    program = passes.capture(Head().eval(), bind_example(None, (torch.randn(3, 7, 6),)))
    lora = LoraConfig(r=2, target_modules=("head",), train_a=True)
    adapted = Pipeline([passes.Canonicalize(), passes.InsertMPLoRA(lora)]).run(program)
    assert adapted.sites[0].outputs == (3, 7)
    golden("adapter_on_few_outputs.txt", program_text(passes.SliceOutputs()(adapted)))


def test_outputs_that_are_read_whole_are_made_whole() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 23)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.head(x)
            return logits[..., 7:8], logits.sum()

    program = passes.Canonicalize()(passes.capture(Both().eval(), bind_example(None, (torch.zeros(3, 7, 6),))))
    assert program_text(passes.SliceOutputs()(program)) == program_text(program)


def test_late_duplication(golden: Callable[[str, str], None]) -> None:
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=("q_proj", "v_proj"), layers_to_transform=(1,))
    before = Pipeline([passes.SliceLabels(), passes.InsertMPLoRA(lora)]).run(with_labels(layers=2))
    lines = program_text(passes.DuplicateLanes(4)(before)).splitlines()
    golden("late_duplication.txt", "\n".join(line for line in lines if "repeat(" in line or "= linear(" in line) + "\n")


def test_merge_siblings(golden: Callable[[str, str], None]) -> None:
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=("q_proj", "k_proj", "v_proj"))
    before = Pipeline([passes.InsertMPLoRA(lora)]).run(with_labels())
    golden("merge_siblings.txt", change(before, passes.MergeSiblings()(before)))


def test_repeat_as_product(golden: Callable[[str, str], None]) -> None:
    before = Pipeline(
        [passes.Canonicalize(), passes.InsertMPLoRA(LORA), passes.DuplicateLanes(4), passes.Specialize(3)]
    ).run(passes.capture(TokenWise().eval(), bind_example(None, (torch.zeros(3, 5, dtype=torch.int64),))))
    golden("repeat_as_product.txt", change(before, RepeatAsProduct()(before)))


def test_core_aten(golden: Callable[[str, str], None]) -> None:
    before = Pipeline([DecomposeAttention(), passes.Canonicalize()]).run(static_attention())
    golden("core_aten.txt", change(before, CoreAten()(before)))
