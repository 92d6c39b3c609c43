"""Recipes that quantize the frozen base weights, and what a quantized weight is made of.

The weights are quantized by torchao, so that a weight is what torchao's `quantize_` would have made of the layer; the
adapters, the noise, the loss and the state stay float32.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobizo_compiler.errors import ConfigError, QuantizationError
from mobizo_compiler.options import JsonConfig
from mobizo_compiler.quantization.grids import BLOCK, Grid, find_grid

Recipe = Literal["fp16", "8da8w", "8da4w", "int8", "int4", "nf4"]
RECIPES: tuple[Recipe, ...] = ("fp16", "8da8w", "8da4w", "int8", "int4", "nf4")
GROUP_SUMS = "group_sums"  # the part of a stored weight that sums inputs in groups; it depends on the shape alone
ROUND_ACTIVATIONS = ("8da8w", "8da4w")
TABLE_RECIPES = ("fp16", "int8", "int4")
_TABLE_OF = {"fp16": "fp16", "8da8w": "int8", "8da4w": "int8", "int8": "int8", "int4": "int8", "nf4": "int8"}
_HEAD_OF = {"8da4w": "8da8w"}
# A larger step drowns less in rounding and sees more curvature; chosen by benchmarks/quantization.py, see
# docs/quantization.md.
DEFAULT_EPS = {None: 1e-2, "fp16": 1e-2, "8da8w": 1e-1, "8da4w": 1e-1, "int8": 1e-2, "int4": 1e-2, "nf4": 1e-2}
NF4_BLOCK, NF4_SCALERS = 64, 256  # QLoRA, appendix A: blocks of 64 weights, their scales in blocks of 256


@dataclasses.dataclass(frozen=True)
class QuantizationConfig(JsonConfig):
    """How the frozen base weights are stored and multiplied.

    Args:
        recipe: Of the linear layers. "fp16": half-precision weights. "8da8w", "8da4w": activations rounded to 8 bits
            per token while the program runs, weights of 8 bits per channel or 4 bits per group. "int8", "int4": the
            same weights without rounding of activations. "nf4": 4 bits in the normal-float code of QLoRA (Dettmers
            et al. 2023, arXiv 2305.14314).
        group_size: Weights of 4 bits that share a scale.
        embedding: Storage of embedding tables: "fp16", "int8" (a scale per row), "int4" (a scale per group), or "none"
            for float32. "auto" is "int8", and "fp16" for "fp16".
        head: Recipe of the output layer, or "none" for float32; "auto" takes `recipe`, but "8da8w" for "8da4w".
        skip: Names of layers that stay float32, matched at the end of a module's path.
        smoothing: How much of the spread of a layer's input channels its weights take over before the input is
            rounded, 0 to 1 (SmoothQuant, Xiao et al. 2023, arXiv 2211.10438); measured on the example inputs, which
            should be real ones. "auto" chooses for each input, where activations are rounded.
        asymmetric: Give groups of 4-bit weights an offset besides their scale, as in the GGUF type Q4_1 and torchao's
            tinygemm layout; it costs a small product per layer.

    Raises:
        ConfigError: A field is out of range.

    >>> QuantizationConfig("8da4w").table_recipe
    'int8'
    >>> QuantizationConfig.from_json(QuantizationConfig("int8").to_json()) == QuantizationConfig("int8")
    True
    """

    recipe: Recipe
    group_size: int = 32
    embedding: str = "auto"
    head: str = "auto"
    skip: tuple[str, ...] = ()
    smoothing: float | str = "auto"
    asymmetric: bool = True

    def __post_init__(self) -> None:
        _one_of("recipe", self.recipe, RECIPES)
        _one_of("embedding", self.embedding, ("auto", "none", *TABLE_RECIPES))
        _one_of("head", self.head, ("auto", "none", *RECIPES))
        if isinstance(self.group_size, bool) or self.group_size not in (16, 32, 64, 128, 256):
            raise ConfigError(
                f"QuantizationConfig.group_size is {self.group_size!r}", hint="use 16, 32, 64, 128 or 256"
            )
        if isinstance(self.skip, str) or not all(isinstance(name, str) for name in self.skip):
            raise ConfigError(f"QuantizationConfig.skip must be a sequence of names, not {self.skip!r}")
        object.__setattr__(self, "skip", tuple(self.skip))
        if not isinstance(self.asymmetric, bool):
            raise ConfigError(f"QuantizationConfig.asymmetric is {self.asymmetric!r}", hint="use True or False")
        number = isinstance(self.smoothing, (int, float)) and not isinstance(self.smoothing, bool)
        if self.smoothing != "auto" and not (number and 0 <= float(self.smoothing) <= 1):
            raise ConfigError(
                f"QuantizationConfig.smoothing is {self.smoothing!r}", hint='use a number from 0 to 1, or "auto"'
            )

    @property
    def table_recipe(self) -> str:
        """Storage of embedding tables, with "auto" resolved."""
        return _TABLE_OF[self.recipe] if self.embedding == "auto" else self.embedding

    def smooths(self, fqn: str, is_head: bool) -> bool:
        """Whether the inputs of the layer at a path are smoothed."""
        return self.smoothing != 0 and self.recipe_of(fqn, is_head) in ROUND_ACTIVATIONS

    @property
    def by_row(self) -> bool:
        """Whether each row of a weight is stored by itself, so that some rows alone are what they are in the whole."""
        return "nf4" not in (self.recipe, self.head)  # it has scales of scales, over many rows

    def recipe_of(self, fqn: str, is_head: bool) -> str:
        """Recipe of the layer at a path; "none" if it stays float32."""
        if any(fqn == name or fqn.endswith("." + name) for name in self.skip):
            return "none"
        if not is_head:
            return self.recipe
        return _HEAD_OF.get(self.recipe, self.recipe) if self.head == "auto" else self.head


def _one_of(field: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"QuantizationConfig.{field} is {value!r}", hint=f"use one of {', '.join(allowed)}")


def default_eps(config: Any) -> float:
    """Size of the perturbation that suits a quantization option; a configuration of torchao may round activations."""
    recipe = config.recipe if isinstance(config, QuantizationConfig) else config and "8da4w"
    return DEFAULT_EPS[recipe]


def described(config: Any) -> str | None:
    """A quantization option as JSON text with sorted keys."""
    if config is None:
        return None
    if isinstance(config, QuantizationConfig):
        return json.dumps(config.to_json(), sort_keys=True)
    from torchao.core.config import config_to_dict

    return json.dumps({"torchao": config_to_dict(config)}, sort_keys=True, default=str)


def torchao_config(recipe: str, group_size: int, on_grid: bool = False) -> Any:
    """The torchao configuration of a recipe; None for those that torchao has none for.

    Scales of groups are bfloat16, because that is what XNNPACK's 4-bit kernels hold: with it, the eager layer and the
    delegate have the same weights. Those of GGUF's blocks (`on_grid`) are float16, where inputs are not rounded.
    """
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup

    per_group, per_channel = PerGroup(group_size), PerAxis(0)
    int4: torch.dtype = getattr(torch, "int4")  # noqa: B009  (not in torch's stubs)
    if recipe == "8da4w":
        return Int8DynamicActivationIntxWeightConfig(int4, per_group, weight_scale_dtype=torch.bfloat16)
    if recipe == "8da8w":
        return Int8DynamicActivationIntxWeightConfig(torch.int8, per_channel)
    if on_grid:
        return IntxWeightOnlyConfig(int4 if recipe == "int4" else torch.int8, per_group, scale_dtype=torch.float16)
    if recipe == "int4":
        return IntxWeightOnlyConfig(int4, per_group, scale_dtype=torch.bfloat16)
    if recipe == "int8":
        return IntxWeightOnlyConfig(torch.int8, per_channel)
    return None


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A weight as it is stored: plain tensors, and the layer as a function of them.

    Args:
        parts: The tensors, by a short name each.
        linear: The layer, from input, bias (or None) and the tensors in order.
        rows: Rows of the weight by index, from indices and the tensors; None where a table cannot be stored so.
        decoded: The weight, float32 [out_features, in_features], from the tensors; None for a table.
        alike: What two layers have in common that are the same function of tensors of the same shapes; None if no other
            is known to be.
    """

    parts: dict[str, Tensor]
    linear: Callable[..., Tensor]
    rows: Callable[..., Tensor] | None = None
    decoded: Callable[..., Tensor] | None = None
    alike: Hashable = None


def store_weight(weight: Tensor, recipe: Any, group_size: int, fqn: str, asymmetric: bool = False) -> StoredWeight:
    """Quantize one weight; of GGUF's blocks, the codes and scales are kept where the recipe has them.

    Args:
        weight: float32 [out_features, in_features].
        recipe: A recipe, or a torchao configuration.
        group_size: See `QuantizationConfig`.
        fqn: Path of the layer, for messages and for configurations that choose by path.
        asymmetric: See `QuantizationConfig`.

    Raises:
        QuantizationError: The weight does not have the shape that the recipe needs, or torchao refuses it.
    """
    if recipe == "fp16":
        if float(weight.abs().max()) > torch.finfo(torch.float16).max:
            raise QuantizationError(f"layer {fqn} has weights that float16 cannot hold", hint="skip this layer")
        return StoredWeight(
            {"half": weight.half()},
            lambda x, bias, w: F.linear(x, w.to(torch.float32), bias),
            decoded=lambda w: w.to(torch.float32),
            alike=recipe,
        )
    if recipe == "nf4":
        return _nf4(weight, fqn)
    bits = {"int8": 8, "int4": 4}.get(recipe) if isinstance(recipe, str) else None
    grid = find_grid(weight, bits, group_size) if bits else None
    if grid is not None and (asymmetric or grid.offset is None):
        config = torchao_config(cast(str, recipe), group_size, on_grid=True)
        return _with_codes(grid, _by_torchao(weight[:1], config, fqn))
    config = torchao_config(recipe, group_size) if isinstance(recipe, str) else recipe
    in_groups = isinstance(recipe, str) and recipe in ("int4", "8da4w")
    if in_groups and weight.shape[1] % group_size:
        raise QuantizationError(
            f"layer {fqn} has {weight.shape[1]} inputs, which groups of {group_size} do not divide",
            hint=f"QuantizationConfig({recipe!r}, group_size=...) with another size, or skip=({fqn!r},)",
        )
    if in_groups and asymmetric:
        return _with_codes(_asymmetric(weight, group_size), _by_torchao(weight[:1], config, fqn))
    return _by_torchao(weight, config, fqn)


def _asymmetric(weight: Tensor, group_size: int) -> Grid:
    """The nearest weights of 4 bits in groups with offsets."""
    from torchao.quantization import MappingType

    from mobizo_compiler.upstream import choose_qparams_tinygemm, quantize_tinygemm  # torchao, which is slow to import

    out_features, in_features = weight.shape
    block = (1, group_size)
    scale, offset = choose_qparams_tinygemm(
        weight, MappingType.ASYMMETRIC, block, torch.uint8, 0, 15, scale_dtype=torch.bfloat16
    )
    codes = quantize_tinygemm(weight, block, scale.to(weight.dtype), offset, 0, 15) - 8
    in_groups = (out_features, in_features // group_size)
    return Grid(codes.to(torch.int8), scale.reshape(in_groups), offset.reshape(in_groups))


def _with_codes(grid: Grid, one_row: StoredWeight) -> StoredWeight:
    """The symmetric layer with other codes and scales, plus the groups' offsets times the sums of their inputs.

    Engines have kernels for symmetric groups only. What is added has as many inputs as groups, and is float32.
    """
    (out_features, in_features), groups = grid.codes.shape, grid.scale.shape[1]
    group_size = in_features // groups
    made = {"qdata": grid.codes, "scale": grid.scale}
    parts = {n: made[n] if n in made else part.repeat_interleave(out_features, 0) for n, part in one_row.parts.items()}
    if grid.offset is None:
        return dataclasses.replace(one_row, parts=parts)
    parts |= {"offset": grid.offset, GROUP_SUMS: _group_sums(groups, group_size)}

    def linear(x: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
        *symmetric, offset, sums = tensors
        return one_row.linear(x, bias, *symmetric) + F.linear(F.linear(x, sums), offset)

    def decoded(*tensors: Tensor) -> Tensor:
        *symmetric, offset, _ = tensors
        assert one_row.decoded is not None
        in_groups = (out_features, groups, group_size)
        offsets = offset.to(torch.float32).unsqueeze(-1)
        return (one_row.decoded(*symmetric).reshape(in_groups) + offsets).reshape(out_features, in_features)

    alike = one_row.alike and (one_row.alike, "offsets")
    return StoredWeight(parts, linear, decoded=decoded, alike=alike)


@functools.lru_cache(maxsize=8)
def _group_sums(groups: int, group_size: int) -> Tensor:
    """What sums inputs in groups, [groups, groups * group_size]: one tensor for all layers of a width."""
    return torch.eye(groups).repeat_interleave(group_size, dim=1)


def _by_torchao(weight: Tensor, config: Any, fqn: str) -> StoredWeight:
    from torchao.quantization import quantize_

    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    root = holder = nn.Module()
    *path, leaf = fqn.split(".")
    for name in path:
        holder.add_module(name, nn.Module())
        holder = cast(nn.Module, getattr(holder, name))
    holder.add_module(leaf, layer)
    try:
        quantize_(root, config)
    except Exception as error:
        raise QuantizationError(f"torchao cannot quantize layer {fqn} {list(weight.shape)}: {error}") from error
    parts, spec = _flatten(layer.weight)
    if spec is None and torch.equal(parts["weight"], weight):
        return StoredWeight({}, F.linear)  # the configuration leaves this layer alone
    return StoredWeight(
        parts,
        lambda x, bias, *tensors: F.linear(x, _unflatten(list(tensors), spec), bias),
        decoded=lambda *tensors: cast(Any, _unflatten(list(tensors), spec)).dequantize().to(torch.float32),
        alike=repr(spec),
    )


def _flatten(weight: Tensor, name: str = "weight") -> tuple[dict[str, Tensor], Any]:
    """The plain tensors of a tensor subclass, which may nest, and how to make it of them again."""
    if type(weight) in (Tensor, nn.Parameter):
        return {name: weight.detach()}, None
    names, context = cast(Any, weight).__tensor_flatten__()
    parts: dict[str, Tensor] = {}
    specs = []
    for inner in names:
        more, spec = _flatten(getattr(weight, inner), inner)
        specs.append((inner, len(more), spec))
        parts |= more
    return parts, (type(weight), context, specs)


def _unflatten(tensors: list[Tensor], spec: Any) -> Tensor:
    if spec is None:
        return tensors[0]
    kind, context, specs = spec
    inner = {}
    for name, count, deeper in specs:
        inner[name] = _unflatten(tensors[:count], deeper)
        tensors = tensors[count:]
    return cast(Tensor, kind.__tensor_unflatten__(inner, context, None, None))


def store_table(table: Tensor, recipe: str, group_size: int, fqn: str) -> StoredWeight:
    """Quantize an embedding table; rows are decoded after they were looked up.

    A table of GGUF's blocks keeps its codes and scales, in 8 or in 4 bits each.

    Args:
        table: float32 [entries, width].
        recipe: "fp16", "int8" or "int4".
        group_size: Weights of 4 bits that share a scale.
        fqn: Path of the table, for messages.

    Raises:
        QuantizationError: Groups do not divide the width.
    """
    if recipe == "fp16":
        return StoredWeight(
            {"half": table.half()}, F.linear, lambda ids, half: F.embedding(ids, half).to(torch.float32)
        )
    for bits in (8, 4) if recipe == "int8" else (4,):
        grid = find_grid(table, bits, BLOCK if bits == 8 else group_size)
        if grid is not None:
            return _table_of(grid, bits)
    width = int(table.shape[1])
    if recipe == "int4" and (width % group_size or width % 2):
        raise QuantizationError(
            f"embedding {fqn} has a width of {width}, which groups of {group_size} do not divide",
            hint='QuantizationConfig(..., embedding="int8"), or another group_size',
        )
    parts = _by_torchao(table, torchao_config(recipe, group_size), fqn).parts
    codes, scale = parts["qdata"], parts["scale"]
    if recipe == "int8":
        return StoredWeight({"codes": codes, "scale": scale}, F.linear, _rows_of_bytes)
    return _table_of(Grid(codes, scale), bits=4)


def _table_of(grid: Grid, bits: int) -> StoredWeight:
    """A table with a scale, and perhaps an offset, for each group of a row."""
    group_size = grid.codes.shape[1] // grid.scale.shape[1]
    parts = {"codes": grid.codes if bits == 8 else pack_nibbles(grid.codes), "scale": grid.scale}
    if grid.offset is not None:
        parts["offset"] = grid.offset

    def rows(ids: Tensor, codes: Tensor, scale: Tensor, *offset: Tensor) -> Tensor:
        found = F.embedding(ids, codes)
        values = found.to(torch.float32) if bits == 8 else unpack_nibbles(found)
        in_groups = values.reshape(*values.shape[:-1], -1, group_size)
        in_groups = in_groups * F.embedding(ids, scale).to(torch.float32).unsqueeze(-1)
        if offset:
            in_groups = in_groups + F.embedding(ids, offset[0]).unsqueeze(-1)
        return in_groups.reshape(values.shape)

    return StoredWeight(parts, F.linear, rows)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Integers -8..7 [..., n] as bytes [..., n/2]: the first half of the last axis is in the low bits.

    >>> codes = torch.tensor([[-8, 7, 0, 3]], dtype=torch.int8)
    >>> bool((unpack_nibbles(pack_nibbles(codes)) == codes).all())
    True
    """
    low, high = (codes.to(torch.int16) + 8).chunk(2, dim=-1)
    return (low | (high << 4)).to(torch.uint8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`, as float32, in operators that every kernel library has."""
    low = torch.bitwise_and(packed, 15).to(torch.float32)
    high = torch.bitwise_right_shift(packed, 4).to(torch.float32)
    return torch.cat((low, high), dim=-1) - 8.0


def _rows_of_bytes(ids: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return F.embedding(ids, codes).to(torch.float32) * F.embedding(ids, scale).to(torch.float32)


def _nf4(weight: Tensor, fqn: str) -> StoredWeight:
    from torchao.quantization import to_nf4

    out_features, in_features = (int(size) for size in weight.shape)
    if weight.numel() % NF4_BLOCK:
        raise QuantizationError(
            f"layer {fqn} has {weight.numel()} weights, which blocks of {NF4_BLOCK} do not divide",
            hint=f"skip=({fqn!r},)",
        )
    scalers = weight.numel() // NF4_BLOCK
    block = next(size for size in range(min(NF4_SCALERS, scalers), 0, -1) if scalers % size == 0)
    stored = to_nf4(weight.contiguous(), NF4_BLOCK, block)
    parts = {
        "codes": stored.quantized_data,
        "scalers": stored.quantized_scalers,
        "factor": stored.quantization_factor,
        "mean": stored.scaler_mean.reshape(1).clone(),
        "table": stored.nf4,
    }

    def decoded(codes: Tensor, scalers: Tensor, factor: Tensor, mean: Tensor, table: Tensor) -> Tensor:
        # NF4Tensor.get_original_weight, with operators that have kernels. The first of two codes is in the high bits.
        scales = scalers.to(torch.float32).reshape(-1, block) / factor.reshape(-1, 1) + mean
        high, low = torch.bitwise_right_shift(codes, 4), torch.bitwise_and(codes, 15)
        both = torch.stack((high.to(torch.int32), low.to(torch.int32)), dim=-1).reshape(-1)
        values = torch.index_select(table, 0, both).reshape(-1, NF4_BLOCK) * scales.reshape(-1, 1)
        return values.reshape(out_features, in_features)

    return StoredWeight(
        parts,
        lambda x, bias, *tensors: F.linear(x, decoded(*tensors), bias),
        decoded=decoded,
        alike=("nf4", out_features, in_features),
    )
