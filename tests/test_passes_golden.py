"""What each pass does to a small program, as text that a person has read, and that its numbers are what it says."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao.quantization  # noqa: F401  (brings the operators of texts with quantized weights)
from torch import Tensor

from mobizo_compiler import (
    CausalLMLoss,
    LoraConfig,
    MSELoss,
    QuantizationConfig,
    SequenceClassificationLoss,
    ZOConfig,
    passes,
)
from mobizo_compiler import backends as backend_package
from mobizo_compiler.backends.aot_inductor.noise_in_parts import NoiseInParts
from mobizo_compiler.backends.aot_inductor.round_products import RoundProducts
from mobizo_compiler.backends.aot_inductor.sums_in_order import SumsInOrder
from mobizo_compiler.backends.shared_passes.core_aten import CoreAten
from mobizo_compiler.backends.shared_passes.spell_out_quantization import SpellOutQuantization
from mobizo_compiler.backends.vulkan.at_most_four_axes import AtMostFourAxes
from mobizo_compiler.backends.vulkan.flatten_tokens import FlattenTokens
from mobizo_compiler.backends.vulkan.float32_scales import Float32Scales
from mobizo_compiler.backends.vulkan.separate_views import SeparateViews
from mobizo_compiler.backends.vulkan.spell_out import SpellOut
from mobizo_compiler.backends.vulkan.vectors_for_scalars import VectorsForScalars
from mobizo_compiler.backends.xnnpack.decoded_weights import DecodedWeights
from mobizo_compiler.backends.xnnpack.float_exit import FloatExit
from mobizo_compiler.backends.xnnpack.mean_as_linear import MeanAsLinear
from mobizo_compiler.backends.xnnpack.one_unknown_size import OneUnknownSize
from mobizo_compiler.backends.xnnpack.repeat_as_product import RepeatAsProduct
from mobizo_compiler.backends.xnnpack.rotation_as_product import RotationAsProduct
from mobizo_compiler.backends.xnnpack.round_group_scales import RoundGroupScales
from mobizo_compiler.backends.xnnpack.separate_readers import SeparateReaders
from mobizo_compiler.backends.xnnpack.spell_out_gelu import SpellOutGelu
from mobizo_compiler.graph import GraphProgram, Pass, Pipeline, facts, parse, program_text
from mobizo_compiler.graph.example import bind_example
from mobizo_compiler.passes.decompose_attention import DecomposeAttention
from mobizo_compiler.testing import TinyCausalLM, TokenWise, check_pass, tiny_batch
from mobizo_compiler.testing.passes import difference, sides

GOLDEN = Path(__file__).parent / "golden"
LORA = LoraConfig(r=2, lora_alpha=3, target_modules=("up",))
ZO = ZOConfig(queries=2, noise="rademacher")


def after(text: str, *steps: Pass, **options: Any) -> GraphProgram:
    """The program of a text after some passes."""
    return Pipeline(steps).run(parse(text, **options))


# Programs that several passes start from.

DECODER = """
tensor %p_embedding_weight: f32[11, 12]
tensor %p_up_weight: f32[20, 12]
tensor %p_up_bias: f32[20]
tensor %p_head_weight: f32[11, 20]
input  %tokens: i64[rows, 5]
  %embedding = embedding(%p_embedding_weight, %tokens)
  %linear = linear(%embedding, %p_up_weight, %p_up_bias)
  %tanh = tanh(%linear)
  %linear_1 = linear(%tanh, %p_head_weight)
return output_0 = %linear_1
"""
CLASSIFIER = """
tensor %p_table_weight: f32[7, 6]
tensor %p_up_weight: f32[3, 6]
input  %ids: i64[rows]
  %embedding = embedding(%p_table_weight, %ids)
  %tanh = tanh(%embedding)
  %linear = linear(%tanh, %p_up_weight)
return output_0 = %linear
"""
DEEP = """
tensor %p_up_weight: f32[5, 6]
tensor %p_out_weight: f32[3, 5]
input  %x: f32[rows, 6]
  %linear = linear(%x, %p_up_weight)
  %exp = exp(%linear)
  %linear_1 = linear(%exp, %p_out_weight)
return output_0 = %linear_1
"""
IN_BLOCKS = LoraConfig(r=2, lora_alpha=3, target_modules=("layers_0", "layers_1"))
BLOCKS = DEEP.replace("p_up_", "p_layers_0_").replace("p_out_", "p_layers_1_")
HYBRID = ZOConfig(queries=2, estimator={"name": "hybrid", "exact_from": 1})
FIXED = CLASSIFIER.replace("rows", "4")
WITH_LOSS = (passes.AttachLoss(SequenceClassificationLoss()), passes.Canonicalize(), passes.InsertMPLoRA(LORA))
WITH_LANES = (*WITH_LOSS, passes.DuplicateLanes(4))
STEP = """
tensor %b_mobizo_lora_b: f32[6]
input  %mobizo_labels: i64[2]
input  %mobizo_eps: f32[1]
  %reshape = reshape(%b_mobizo_lora_b, [1, 6])
  %lanes = expand(%reshape, [4, 6])
  %tanh = tanh(%lanes)
  %row_loss = reshape(%tanh, [24])
  %row_weight = exp(%row_loss)
return row_loss = %row_loss
return row_weight = %row_weight
"""
DIFFERENCED = """
tensor %b_mobizo_lora_b: f32[6]
tensor %b_noise: f32[2, 6]
input  %mobizo_eps: f32[1]
  %noise = tanh(%b_noise)
  %mul = mul.Tensor(%noise, %mobizo_eps)
  %add = add.Tensor(%b_mobizo_lora_b, %mul)
  %lane_losses = sum.dim_IntList(%add, [1])
  %loss = mean.dim(%lane_losses, [0], True)
  %gradient = div.Tensor(%lane_losses, %mobizo_eps)
return loss = %loss
return lane_losses = %lane_losses
return projected_gradient = %gradient
"""
GRADIENT = """
tensor %b_mobizo_lora_b: f32[8]
  %sin = sin(%b_mobizo_lora_b)
  %tanh = tanh(%sin)
  %tanh_1 = tanh(%tanh)
  %tanh_2 = tanh(%tanh_1)
  %tanh_3 = tanh(%tanh_2)
  %loss = mean.dim(%tanh_3, [0], True)
  %lane_losses = clone(%loss)
  %full = expand(%loss, [8])
  %mul_3 = mul.Tensor(%full, %tanh_3)
  %mul_2 = mul.Tensor(%mul_3, %tanh_2)
  %mul_1 = mul.Tensor(%mul_2, %tanh_1)
  %mul = mul.Tensor(%mul_1, %tanh)
  %gradient = mul.Tensor(%mul, %sin)
  %norm = mean.dim(%gradient, [0], True)
return loss = %loss
return lane_losses = %lane_losses
return projected_gradient = %norm
return gradient = %gradient
"""
FOUR_BITS = """
tensor %b_codes: i8[8, 32]
tensor %b_scale: {scale}[8, {groups}]
tensor %b_zero: i8[8, {groups}]
tensor %p_bias: f32[8]
input  %x: f32[2, 3, 32]
  %weight = torchao.dequantize_affine(%b_codes, [1, {size}], %b_scale, %b_zero, i8, -8, 7)
"""
DYNAMIC_INPUT = """
  %choose = torchao.choose_qparams_affine(%x, ASYMMETRIC, [1, 1, 32], i8, -128, 127, None, f32, i8)
  %step = getitem(%choose, 0)
  %offset = getitem(%choose, 1)
  %rounded = torchao.quantize_affine(%x, [1, 1, 32], %step, %offset, i8, -128, 127)
  %y = torchao.dequantize_affine(%rounded, [1, 1, 32], %step, %offset, i8, -128, 127)
"""
IN_GROUPS = FOUR_BITS.format(scale="f32", groups=2, size=16)
PER_CHANNEL = FOUR_BITS.format(scale="f32", groups=1, size=32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A pass with a program that it changes.

    Args:
        step: The pass.
        program: The program, or its text.
        inputs: Values of inputs, where random ones do not do.
        shown: Which lines of the programs are in the golden text.
    """

    step: Pass
    program: Callable[[], GraphProgram]
    inputs: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    shown: Callable[[str], bool] | None = None


def of(step: Pass, text: str, *before: Pass, inputs: Mapping[str, Tensor] | None = None, **options: Any) -> Case:
    return Case(step, lambda: after(text, *before, **options), inputs or {})


def without_generator(line: str) -> bool:
    """The generator of the noise is some hundred integer operators on the seed; what matters is around them."""
    return ": i32[" not in line or line.startswith("input")


IDS = {"ids": torch.tensor([3, 0, 6, 3]), "mobizo_labels": torch.tensor([0, 2, 1, 1])}
CASES: dict[str, Case] = {
    # -- from a model to a step
    "attach_loss": of(passes.AttachLoss(CausalLMLoss(max_labels=2)), DECODER),
    "canonicalize": of(
        passes.Canonicalize(),
        """
        input  %x: f32[rows, 7]
          %detach = detach(%x)
          %dropout = dropout(%detach, 0.5, False)
          %to = to.dtype(%dropout, f32)
          %slice_1 = slice.Tensor(%to, 1, 0, end)
          %expand = expand(%slice_1, [-1, 7])
          %view = view(%expand, [-1, 7])
          %mul = mul.Tensor(%view, 1.0)
          %add = add.Tensor(%mul, 0)
          %clone = clone(%add)
          %t = t(%clone)
          %contiguous = contiguous(%t)
          %view_1 = view(%contiguous, [-1])
        return output_0 = %view_1
        """,
    ),
    "hoist_picks": of(
        passes.HoistPicks(), DECODER, passes.AttachLoss(CausalLMLoss(max_labels=2)), passes.Canonicalize()
    ),
    "last_token": of(passes.LastToken(), DECODER, passes.Canonicalize()),
    "slice_outputs": of(
        passes.SliceOutputs(),
        """
        tensor %p_head_weight: f32[23, 6]
        tensor %p_head_bias: f32[23]
        input  %x: f32[rows, 7, 6]
          %linear = linear(%x, %p_head_weight, %p_head_bias)
          %div = div.Tensor(%linear, 3)
          %tanh = tanh(%div)
          %slice_1 = slice.Tensor(%tanh, 2, 7, 8)
          %slice_2 = slice.Tensor(%tanh, -1, -4, -2)
          %cat = cat([%slice_1, %slice_2], -1)
        return output_0 = %cat
        """,
    ),
    "free_rows": of(
        passes.FreeRows(),
        """
        tensor %b_token: f32[3, 1, 6]
        input  %x: f32[3, 4, 6]
          %reshape = reshape(%x, [12, 6])
          %tanh = tanh(%reshape)
          %view = view(%tanh, [3, 4, 6])
          %cat = cat([%b_token, %view], 1)
        return output_0 = %cat
        """,
        rows={"x": 0},
        tensors={"b_token": torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(0)).expand(3, 1, 6)},
    ),
    "insert_mp_lora": of(passes.InsertMPLoRA(LORA), DECODER),
    "merge_siblings": of(
        passes.MergeSiblings(),
        """
        tensor %p_q_weight: f32[8, 6]
        tensor %p_k_weight: f32[4, 6]
        input  %x: f32[rows, 6]
          %q = linear(%x, %p_q_weight)
          %k = linear(%x, %p_k_weight)
        return q = %q
        return k = %k
        """,
        passes.InsertMPLoRA(LoraConfig(r=2, target_modules=("q", "k"))),
    ),
    "add_clean_lane": of(
        passes.AddCleanLane(HYBRID),
        BLOCKS,
        passes.AttachLoss(MSELoss()),
        passes.Canonicalize(),
        passes.InsertMPLoRA(IN_BLOCKS),
    ),
    "differentiate_clean_lane": Case(
        passes.DifferentiateCleanLane(),
        lambda: after(
            BLOCKS,
            passes.AttachLoss(MSELoss()),
            passes.Canonicalize(),
            passes.InsertMPLoRA(IN_BLOCKS),
            passes.AddCleanLane(HYBRID),
            passes.Specialize(4),
        ),
        shown=lambda line: " = reshape(" not in line,
    ),
    "duplicate_lanes": of(passes.DuplicateLanes(4), CLASSIFIER, *WITH_LOSS, inputs={n: v[:3] for n, v in IDS.items()}),
    "perturb": Case(
        passes.Perturb(ZOConfig(queries=2)), lambda: after(CLASSIFIER, *WITH_LANES), shown=without_generator
    ),
    "difference_losses": of(passes.DifferenceLosses(ZO), STEP, values={"lanes": "lanes"}, also={facts.PERTURBED}),
    "difference_losses_of_rows": of(
        passes.DifferenceLosses(dataclasses.replace(ZO, row_losses=True)),
        STEP,
        values={"lanes": "lanes"},
        also={facts.PERTURBED},
    ),
    "update_state": of(passes.UpdateState(), DIFFERENCED, values={"noise": "noise"}),
    "replay": Case(
        passes.Replay(passes.InsertMPLoRA(LORA)(parse(CLASSIFIER)).sites, ZO),
        passes.empty_program,
        shown=without_generator,
    ),
    "differentiate": of(
        passes.Differentiate(),
        DEEP,
        passes.AttachLoss(MSELoss()),
        passes.Canonicalize(),
        passes.InsertMPLoRA(LORA),
        passes.Specialize(4),
    ),
    "recompute": of(passes.Recompute(232), GRADIENT, also={facts.GRADIENT}),
    "tidy": of(
        passes.Tidy(),
        """
        tensor %p_w: f32[28, 20]
        input  %x: f32[3, 7, 20]
        input  %m: f32[3, 7, 1]
          %t = t(%p_w)
          %t_1 = t(%t)
          %view = reshape(%x, [21, 20])
          %unsqueeze = unsqueeze(%view, 0)
          %expand = expand(%m, [3, 7, 20])
          %mul = mul.Tensor(%expand, 0.5)
          %mul_1 = mul.Tensor(%mul, %x)
          %zeros = zeros_like(%x)
          %add = add.Tensor(%mul_1, %zeros)
          %sigmoid = sigmoid(%x)
          %sigmoid_1 = sigmoid(%x)
          %sub = sub.Tensor(%sigmoid, %sigmoid_1)
          %add_1 = add.Tensor(%sub, %add)
          %linear = linear(%add_1, %t_1)
        return output_0 = %unsqueeze
        return output_1 = %linear
        """,
    ),
    "after_prefix": of(passes.AfterPrefix(), CLASSIFIER, *WITH_LANES),
    "prefix": of(passes.Prefix(), CLASSIFIER, *WITH_LANES),
    "specialize": of(
        passes.Specialize(4),
        """
        tensor %p_up_weight: f32[8, 6]
        input  %x: f32[rows, 5, 6]
          %linear = linear(%x, %p_up_weight)
          %count = sym_size.int(%x, 0)
          %twice = mul(%count, 2)
          %view = view(%linear, [%count, 5, 2, 4])
          %zeros = zeros([%twice, 5, 2, 4])
          %cat = cat([%view, %zeros])
        return output_0 = %cat
        """,
    ),
    "pass_state": of(
        passes.PassState(),
        """
        state  %b_mobizo_lora_b: f32[6]
        input  %x: f32[6]
          %sub = sub.Tensor(%b_mobizo_lora_b, %x)
          %sum_1 = sum(%sub)
        update %b_mobizo_lora_b <- %sub
        return loss = %sum_1
        """,
    ),
    "quantize": of(
        passes.Quantize(QuantizationConfig("8da8w")),
        """
        tensor %p_table_weight: f32[7, 32]
        tensor %p_up_weight: f32[8, 32]
        tensor %p_up_bias: f32[8]
        input  %ids: i64[4, 3]
          %embedding = embedding(%p_table_weight, %ids)
          %linear = linear(%embedding, %p_up_weight, %p_up_bias)
        return output_0 = %linear
        """,
    ),
    # -- for AOTInductor
    "noise_in_parts": of(
        NoiseInParts(part_bytes=16),
        """
        tensor %b_mobizo_lora_b: f32[6]
        tensor %b_mobizo_normal_table: f32[4096, 1]
        input  %mobizo_seed: i32[1]
          %arange = arange(3, dtype=i32, device=cpu, pin_memory=False)
          %bitwise_xor = bitwise_xor.Tensor(%arange, %mobizo_seed)
          %words = reshape(%bitwise_xor, [1, 3])
          %reshape = reshape(%words, [1, 3, 1])
          %arange_4 = arange(2, dtype=i32, device=cpu, pin_memory=False)
          %mul = mul.Tensor(%reshape, %arange_4)
          %reshape_5 = reshape(%mul, [1, 6])
          %entry = bitwise_and.Scalar(%reshape_5, 4095)
          %embedding = embedding(%b_mobizo_normal_table, %entry)
          %noise = reshape(%embedding, [1, 6])
          %add = add.Tensor(%b_mobizo_lora_b, %noise)
          %sub = sub.Tensor(%b_mobizo_lora_b, %noise)
          %lanes = cat([%add, %sub])
          %slice_1 = slice.Tensor(%lanes, 1, 0, 3)
          %slice_2 = slice.Tensor(%lanes, 1, 3, 6)
        return output_0 = %slice_1
        return output_1 = %slice_2
        """,
        values={"lanes": "lanes"},
        also={facts.STATIC},
    ),
    "sums_in_order": of(
        SumsInOrder(),
        """
        tensor %b_noise: f32[5, 6]
        state  %b_mobizo_lora_b: f32[6]
        input  %gradient: f32[5, 1]
          %mul = mul.Tensor(%b_noise, %gradient)
          %sum_1 = sum.dim_IntList(%mul, [0])
          %mean = mean.dim(%sum_1, [0], True)
          %div = div.Tensor(%sum_1, %mean)
          %sub = sub.Tensor(%b_mobizo_lora_b, %div)
        update %b_mobizo_lora_b <- %sub
        """,
        also={facts.STATIC},
    ),
    "round_computed_products": of(
        RoundProducts(),
        """
        tensor %p_weight: f32[4, 4]
        tensor %b_frequencies: f32[1, 2, 1]
        input  %x: f32[1, 3, 4]
        input  %positions: f32[1, 1, 3]
        input  %mask: f32[1, 1, 3, 3]
          %angles = bmm(%b_frequencies, %positions)
          %linear = linear(%x, %p_weight)
          %reshape = reshape(%linear, [1, 3, 2, 2])
          %transpose = transpose.int(%reshape, 1, 2)
          %mul = mul.Tensor(%transpose, 2.0)
          %transpose_of_linear = transpose.int(%linear, 1, 2)
          %attention = scaled_dot_product_attention(%mul, %transpose, %transpose, %mask)
          %bmm = bmm(%linear, %transpose_of_linear)
          %frozen = unsqueeze(%p_weight, 0)
          %back = bmm(%linear, %frozen)
        return output_0 = %attention
        return output_1 = %angles
        return output_2 = %bmm
        return output_3 = %back
        """,
        inputs={"mask": torch.zeros(1, 1, 3, 3)},
        also={facts.STATIC},
    ),
    "round_products": of(
        RoundProducts(),
        """
        tensor %p_table_weight: f32[7, 6]
        tensor %p_up_weight: f32[8, 6]
        tensor %p_up_bias: f32[8]
        tensor %p_gate_weight: f32[8, 6]
        tensor %p_down_weight: f32[8, 3]
        tensor %p_down_bias: f32[3]
        tensor %b_mobizo_normal_table: f32[4096, 1]
        input  %ids: i64[4]
          %embedding = embedding(%p_table_weight, %ids)
          %linear = linear(%embedding, %p_up_weight, %p_up_bias)
          %linear_1 = linear(%embedding, %p_gate_weight)
          %mul = mul.Tensor(%linear, %linear_1)
          %addmm = addmm(%p_down_bias, %mul, %p_down_weight)
          %noise = embedding(%b_mobizo_normal_table, %ids)
        return output_0 = %addmm
        return output_1 = %noise
        """,
        inputs={"ids": torch.tensor([3, 0, 6, 3])},
        also={facts.STATIC, facts.CANONICAL},
    ),
    # -- for several backends
    "core_aten": of(
        CoreAten(),
        """
        input  %x: f32[2, 3, 4]
          %transpose = transpose.int(%x, 1, 2)
          %reshape = reshape(%transpose, [2, 12])
          %silu = silu(%reshape)
          %softmax = softmax.int(%silu, -1)
          %rsub = rsub.Scalar(%softmax, 1.0)
          %zeros = zeros([2, 12], device=cpu, pin_memory=False)
          %stack = stack([%rsub, %zeros], 1)
          %gt = gt.Scalar(%silu, 0)
          %lt = lt.Scalar(%silu, 1)
          %and_1 = __and__.Tensor(%gt, %lt)
          %zeros_like = zeros_like(%transpose, pin_memory=False)
          %min_1 = min.other(%transpose, %zeros_like)
          %flatten = flatten.using_ints(%min_1, 1)
          %to = to.dtype(%flatten, i64)
        return output_0 = %stack
        return output_1 = %and_1
        return output_2 = %to
        """,
    ),
    "decompose_attention": of(
        DecomposeAttention(),
        """
        input  %q: f32[2, 4, 5, 6]
        input  %k: f32[2, 2, 5, 6]
        input  %v: f32[2, 2, 5, 6]
        input  %mask: bool[2, 1, 5, 5]
          %unsqueeze = unsqueeze(%k, 2)
          %expand = expand(%unsqueeze, [-1, -1, 2, -1, -1])
          %reshape = reshape(%expand, [2, 4, 5, 6])
          %unsqueeze_1 = unsqueeze(%v, 2)
          %expand_1 = expand(%unsqueeze_1, [-1, -1, 2, -1, -1])
          %reshape_1 = reshape(%expand_1, [2, 4, 5, 6])
          %attention = scaled_dot_product_attention(%q, %reshape, %reshape_1, %mask)
        return output_0 = %attention
        """,
        inputs={"mask": torch.ones(2, 1, 5, 5).tril().bool()},
    ),
    "spell_out_quantization": of(
        SpellOutQuantization(),
        f"{IN_GROUPS}{DYNAMIC_INPUT}\n%linear = linear(%y, %weight, %p_bias)\nreturn y = %linear",
    ),
    # -- for XNNPACK
    "decoded_weights": of(
        DecodedWeights(),
        """
        tensor %b_codes: i8[8, 6]
        tensor %b_scale: f32[8, 1]
        tensor %p_bias: f32[8]
        input  %x: f32[2, 3, 6]
          %to = to.dtype(%b_codes, f32)
          %weight = mul.Tensor(%to, %b_scale)
          %linear = linear(%x, %weight, %p_bias)
        return output_0 = %linear
        """,
    ),
    "float_exit": of(
        FloatExit(),
        f"{PER_CHANNEL}{DYNAMIC_INPUT}\n%linear = linear(%y, %weight, %p_bias)\n"
        "%log_softmax = _log_softmax(%linear, -1, False)\nreturn y = %log_softmax",
    ),
    "mean_as_linear": of(
        MeanAsLinear(),
        """
        input  %x: f32[2, 5, 12]
          %pow_1 = pow.Tensor_Scalar(%x, 2)
          %mean = mean.dim(%pow_1, [-1], True)
          %mean_1 = mean.dim(%pow_1, [2], True)
          %mean_2 = mean.dim(%pow_1, [1], True)
          %add = add.Tensor(%mean, %mean_1)
          %add_1 = add.Tensor(%add, %mean_2)
        return output_0 = %add_1
        """,
    ),
    "repeat_as_product": of(
        RepeatAsProduct(),
        """
        input  %x: f32[2, 5, 12]
          %tanh = tanh(%x)
          %repeat = repeat(%tanh, [4, 1, 1])
          %repeat_1 = repeat(%tanh, [4, 1, 2])
          %repeat_2 = repeat(%x, [4, 1, 1])
          %add = add.Tensor(%repeat, %repeat_2)
        return output_0 = %add
        return output_1 = %repeat_1
        """,
    ),
    "rotation_as_product": of(
        RotationAsProduct(),
        """
        input  %x: f32[2, 3, tokens, 8]
          %slice_1 = slice.Tensor(%x, 3, 0, 4)
          %slice_2 = slice.Tensor(%x, 3, 4, end)
          %neg = neg(%slice_2)
          %cat = cat([%neg, %slice_1], -1)
          %cat_1 = cat([%slice_1, %neg], -1)
          %add = add.Tensor(%cat, %cat_1)
        return output_0 = %add
        """,
    ),
    "one_unknown_size": of(
        OneUnknownSize(),
        """
        input  %x: f32[2, tokens, 12]
          %n = sym_size.int(%x, 1)
          %reshape = reshape(%x, [2, %n, -1, 4])
          %transpose = transpose.int(%reshape, 1, 2)
          %reshape_1 = reshape(%transpose, [6, %n, 4])
          %unsqueeze = unsqueeze(%reshape_1, 1)
          %reshape_2 = reshape(%unsqueeze, [-1, 1])
        return output_0 = %unsqueeze
        return output_1 = %reshape_2
        """,
    ),
    "separate_readers": of(
        SeparateReaders(),
        """
        tensor %p_w: f32[20, 28]
        input  %x: f32[3, 28]
        input  %gy: f32[1, 3, 20]
          %linear = linear(%x, %p_w)
          %unsqueeze = unsqueeze(%p_w, 0)
          %bmm = bmm(%gy, %unsqueeze)
        return output_0 = %linear
        return output_1 = %bmm
        """,
    ),
    "round_group_scales": of(
        RoundGroupScales(), f"{IN_GROUPS}{DYNAMIC_INPUT}\n%linear = linear(%y, %weight, %p_bias)\nreturn y = %linear"
    ),
    "spell_out_gelu": of(
        SpellOutGelu(),
        """
        input  %x: f32[rows, 7]
          %gelu = gelu(%x)
          %gelu_1 = gelu(%gelu, approximate=tanh)
        return output_0 = %gelu_1
        """,
    ),
    # -- for Vulkan
    "at_most_four_axes": of(
        AtMostFourAxes(),
        """
        input  %k: f32[2, 2, 5, 6]
          %unsqueeze = unsqueeze(%k, 2)
          %expand = expand(%unsqueeze, [-1, -1, 3, -1, -1])
          %reshape = reshape(%expand, [2, 6, 5, 6])
        return output_0 = %reshape
        """,
    ),
    "flatten_tokens": of(
        FlattenTokens(),
        """
        tensor %p_table_weight: f32[7, 6]
        tensor %p_position: f32[5, 6]
        tensor %p_up_weight: f32[8, 6]
        input  %ids: i64[2, 5]
          %embedding = embedding(%p_table_weight, %ids)
          %add = add.Tensor(%embedding, %p_position)
          %linear = linear(%add, %p_up_weight)
          %tanh = tanh(%linear)
          %transpose = transpose.int(%tanh, 1, 2)
        return output_0 = %transpose
        """,
    ),
    "float32_scales": of(
        Float32Scales(),
        FOUR_BITS.format(scale="bf16", groups=2, size=16)
        + "%linear = linear(%x, %weight, %p_bias)\nreturn y = %linear",
    ),
    "separate_views": of(
        SeparateViews(),
        f"{IN_GROUPS}\n%reshape = reshape(%x, [6, 32])\n%linear = linear(%reshape, %weight, %p_bias)\n"
        "%view = reshape(%linear, [2, 3, 2, 4])\nreturn y = %view",
    ),
    "spell_out": of(
        SpellOut(),
        """
        tensor %p_weight: f32[8]
        input  %x: f32[2, 3, 8]
        input  %index: i64[2, 3, 4]
          %rms_norm = rms_norm(%x, [8], %p_weight, 1e-05)
          %gelu = gelu(%rms_norm)
          %gather = gather(%gelu, -1, %index)
          %pow_1 = pow.Tensor_Scalar(%gather, 2)
          %add = add.Scalar(%pow_1, 1.0)
          %log = log(%add)
          %sum_1 = sum.dim_IntList(%log, [1])
        return output_0 = %sum_1
        """,
    ),
    "vectors_for_scalars": of(
        VectorsForScalars(),
        """
        tensor %p_scale: f32[]
        input  %x: f32[2, 3]
          %exp = exp(%p_scale)
          %mul = mul.Tensor(%x, %exp)
          %full = full([], 0.5, dtype=f32)
          %add = add.Tensor(%mul, %full)
        return output_0 = %add
        """,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_pass(name: str, request: pytest.FixtureRequest, golden: Callable[[str, str], None]) -> None:
    """The contract, and the golden text."""
    case, accept = CASES[name], request.config.getoption("--accept")
    before = case.program()
    file = None if case.shown else GOLDEN / f"{name}.txt"
    changed = check_pass(case.step, before, golden=file, accept=accept, inputs=case.inputs)
    assert changed is not before, "the program must be one that the pass changes"
    texts = [program_text(program) for program in (before, changed)]
    if case.shown:
        golden(f"{name}.txt", difference(*("".join(filter(case.shown, t.splitlines(True))) for t in texts)))


def subclasses() -> set[type[Pass]]:
    """Every pass of the package, wherever it is."""
    found = set()
    for package in (passes, backend_package):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            members = vars(importlib.import_module(module.name)).values()
            found |= {item for item in members if inspect.isclass(item) and issubclass(item, Pass) and item is not Pass}
    return found


def test_every_pass_has_a_golden_text() -> None:
    missing = subclasses() - {type(case.step) for case in CASES.values()}
    assert not missing, f"no case for {', '.join(sorted(step.__name__ for step in missing))}"
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {*CASES, *MORE}, "a golden text without a test"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.shown])
def test_golden_texts_can_be_read(name: str) -> None:
    """Both sides, as they were printed."""
    for text in sides((GOLDEN / f"{name}.txt").read_text()):
        assert program_text(parse(text)) == text


# -- more of single passes ---------------------------------------------------------------------------------------------

MORE = ("adapter_on_few_outputs", "capture", "late_duplication", "hoist_picks_attention", "hoist_picks_first_token")


def test_capture(golden: Callable[[str, str], None]) -> None:
    torch.manual_seed(0)
    captured = passes.capture(TokenWise().eval(), bind_example(None, (torch.zeros(3, 5, dtype=torch.int64),)))
    golden("capture.txt", program_text(captured))
    assert program_text(captured) == program_text(parse(DECODER))


def with_labels(layers: int = 1) -> GraphProgram:
    """A tiny language model with its loss on one label of a row, and nothing moved yet."""
    torch.manual_seed(0)
    inputs, _ = tiny_batch()
    program = passes.capture(TinyCausalLM(layers=layers).eval(), bind_example(None, inputs))
    return Pipeline([passes.AttachLoss(CausalLMLoss(max_labels=1)), passes.Canonicalize()]).run(program)


def test_hoist_picks_into_the_last_attention(golden: Callable[[str, str], None]) -> None:
    lines = program_text(passes.HoistPicks()(with_labels())).splitlines()
    shown = ("gather(", "= linear(", "topk(", "scaled_dot_product_attention(", "softmax")
    golden("hoist_picks_attention.txt", "\n".join(line for line in lines if any(s in line for s in shown)) + "\n")


def test_hoist_picks_moves_a_selection_of_the_first_token(request: pytest.FixtureRequest) -> None:
    check_pass(
        passes.HoistPicks(),
        """
        tensor %p_up_weight: f32[10, 6]
        tensor %p_norm_weight: f32[10]
        tensor %p_head_weight: f32[3, 10]
        input  %x: f32[rows, 7, 6]
          %linear = linear(%x, %p_up_weight)
          %relu = relu(%linear)
          %layer_norm = layer_norm(%relu, [10], %p_norm_weight)
          %select = select.int(%layer_norm, 1, 0)
          %linear_1 = linear(%select, %p_head_weight)
        return output_0 = %linear_1
        """,
        golden=GOLDEN / "hoist_picks_first_token.txt",
        accept=request.config.getoption("--accept"),
    )


def test_an_adapter_on_few_outputs(request: pytest.FixtureRequest) -> None:
    adapted = after(
        """
        tensor %p_head_weight: f32[23, 6]
        tensor %p_head_bias: f32[23]
        input  %x: f32[rows, 7, 6]
          %linear = linear(%x, %p_head_weight, %p_head_bias)
          %slice_1 = slice.Tensor(%linear, 2, 7, 8)
          %slice_2 = slice.Tensor(%linear, 2, 3, 4)
          %cat = cat([%slice_1, %slice_2], -1)
        return output_0 = %cat
        """,
        passes.InsertMPLoRA(LoraConfig(r=2, target_modules=("head",), train_a=True)),
    )
    assert adapted.sites[0].outputs == (3, 7)
    file, accept = GOLDEN / "adapter_on_few_outputs.txt", request.config.getoption("--accept")
    check_pass(passes.SliceOutputs(), adapted, golden=file, accept=accept)


def test_outputs_that_are_read_whole_are_made_whole() -> None:
    program = parse(
        """
        tensor %p_head_weight: f32[23, 6]
        input  %x: f32[rows, 7, 6]
          %linear = linear(%x, %p_head_weight)
          %slice_1 = slice.Tensor(%linear, 2, 7, 8)
          %sum_1 = sum(%linear)
        return output_0 = %slice_1
        return output_1 = %sum_1
        """
    )
    assert passes.SliceOutputs()(program) is program


def test_late_duplication(golden: Callable[[str, str], None]) -> None:
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=("q_proj", "v_proj"), layers_to_transform=(1,))
    before = Pipeline([passes.HoistPicks(), passes.InsertMPLoRA(lora)]).run(with_labels(layers=2))
    lines = program_text(passes.DuplicateLanes(4)(before)).splitlines()
    golden("late_duplication.txt", "\n".join(line for line in lines if "repeat(" in line or "= linear(" in line) + "\n")
