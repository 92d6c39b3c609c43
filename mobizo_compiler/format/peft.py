"""Adapters that travel: peft's files, and the base model with the adapter merged into its weights.

peft stores `lora_A.weight` [r, in_features] and `lora_B.weight` [out_features, r] of every layer in
`adapter_model.safetensors`, and the options in `adapter_config.json`. Our B is [r, out_features], the rest is equal.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mobizo_compiler.config import LoraConfig
from mobizo_compiler.errors import AdapterError, MobizoError
from mobizo_compiler.format import checksum
from mobizo_compiler.format.files import whole_file
from mobizo_compiler.format.probe import Probe
from mobizo_compiler.format.program import Program
from mobizo_compiler.step.sites import Site, initial_state

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# The name of the adapter stands in the names that peft has in memory, and not in those of its files.
_PART = re.compile(rf"{re.escape(PREFIX)}(?P<layer>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.weight")
MADE_BY = "mobizo_compiler"
# Options of peft that an adapter may have, because they do not change what it computes once it is trained: where its
# layers are is read from the tensors, and a dropout is for training alone.
_SAYS_NOTHING = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# Those that do, and the values that this compiler can do. Whatever is in neither must be off.
_UNDERSTOOD: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # The others ("pissa", "olora", "corda", "loftq", "lora_ga", ...) also change the weights of the base model.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "use_rslora": (True, False),
}
_CONVERTIBLE = ("pissa", "corda", "olora")  # peft can turn them into a plain LoRA of twice the rank


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """An adapter as peft stores it.

    Args:
        lora: Rank, alpha, and the paths of the layers.
        a: By path, float32 [r, in_features], followed by the window of a convolution.
        b: By path, float32 [r, out_features].
        model: Digest of the model that it was trained on, as in the manifest; None where it is not told.
        saved: Whole weights that come along, by name: those that the base model lacks.
        probe: What it did where it was exported; None where it is not told.
        base: Checksum by name of weights that are said to be the base model's, which peft stores as well where an
            adapter is on an embedding or a head.
    """

    lora: LoraConfig
    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    model: str | None = None
    saved: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    base: Mapping[str, int] = dataclasses.field(default_factory=dict)
    probe: Probe | None = None


def write_peft(program: Program, state: Tensor, folder: Path, base_model: str | None, probe: Probe) -> None:
    """Write both files, each whole or not at all.

    Raises:
        AdapterError: A site is not a module of its own, which peft could not find.
    """
    tensors: dict[str, Tensor] = {}
    whole = {name.rpartition(".")[0]: name for name in program.manifest.saved}
    tensors |= {PREFIX + name: weight.tensor() for name, weight in program.manifest.saved.items()}
    for site in program.sites:
        a, b = lora_a(program, site, state), site.lora_b(state)
        if f"{site.fqn}.weight" in program.manifest.saved:  # peft has either a LoRA or the whole of a layer
            delta = site.scaling * torch.einsum("ri...,ro->oi...", a, b)
            tensors[f"{PREFIX}{site.fqn}.weight"] += delta
            continue
        if not site.fqn:
            raise AdapterError("the model is a single layer without a name, which peft cannot adapt")
        tensors[f"{PREFIX}{site.fqn}.lora_A.weight"] = a.contiguous()
        window = [1] * len(site.kernel)
        tensors[f"{PREFIX}{site.fqn}.lora_B.weight"] = b.t().reshape(site.out_features, site.r, *window).contiguous()
    lora = program.manifest.lora
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "bias": "none",
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(site.fqn for site in program.sites if site.fqn not in whole),
        "modules_to_save": sorted(whole) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "task_type": None,
    }
    described = {"format": "pt", "made_by": MADE_BY, "model": program.manifest.model, "probe": probe.to_json()}
    described["sha256"] = _checksum(config, described, tensors)
    begun = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / WEIGHTS) as file:
            file.write(save(tensors, metadata=described))
        with whole_file(folder / CONFIG) as file:
            file.write(json.dumps(config, indent=2, sort_keys=True).encode())
    except OSError:
        if not begun:  # half of an adapter is none
            shutil.rmtree(folder, ignore_errors=True)
        raise


def read_peft(folder: Path) -> PeftAdapter:
    """Read what `peft.PeftModel.save_pretrained` or `write_peft` wrote.

    Raises:
        AdapterError: A file is missing or damaged, or the adapter is not a plain LoRA of one rank: an option of peft
            that is not known here is refused by its name, unless it is off.
    """
    if not (folder / WEIGHTS).exists():
        pickled = (folder / "adapter_model.bin").exists()
        raise AdapterError(
            f"there is no {WEIGHTS} in this folder" + (", only a pickle, which is never loaded" if pickled else ""),
            where=str(folder),
            hint="save it again with peft's save_pretrained(..., safe_serialization=True)" if pickled else None,
        )
    try:
        config = json.loads((folder / CONFIG).read_text())
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            stored, described = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        r, alpha = config["r"], config["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise AdapterError(f"the adapter cannot be read: {error!r}", where=str(folder)) from None
    ours = "sha256" in described or "made_by" in described  # what peft saves has neither
    if ours and described.get("sha256") != _checksum(config, described, stored):
        raise AdapterError(
            "the adapter is damaged: its checksum is not that of its two files",
            where=str(folder),
            hint="export it again; an adapter that was changed on purpose is to be saved with peft",
        )
    tensors = {name: tensor.to(torch.float32) for name, tensor in stored.items()}
    named = [f"{PREFIX}{module}." for module in (config.get("modules_to_save") or ()) if ours]
    brought = [name for name in tensors if name.startswith(tuple(named)) and ".lora_" not in name] if named else []
    saved = {name.removeprefix(PREFIX): tensors.pop(name) for name in brought}
    _check_plain(config | ({"modules_to_save": None} if saved else {}), str(folder))
    a, b = _pairs(tensors, str(folder))
    base = {
        name.removeprefix(PREFIX).replace(".base_layer.", "."): checksum.of_values(tensor)
        for name, tensor in tensors.items()
        if not _PART.fullmatch(name)
    }
    for fqn in sorted(set(a) | set(b)):
        if any(fqn not in side or side[fqn].shape[0] != r for side in (a, b)):
            raise AdapterError(f"layer {fqn} has no A and B of rank {r}", where=str(folder))
    try:
        # A rank-stabilized LoRA is scaled by alpha / sqrt(r), which a plain one of another alpha does.
        scaled = LoraConfig(r=r, lora_alpha=alpha).lora_alpha * (math.sqrt(r) if config.get("use_rslora") else 1)
        lora = LoraConfig(r=r, lora_alpha=scaled, target_modules=tuple(sorted(a)))
        probe = Probe.from_json(described["probe"], str(folder)) if "probe" in described else None
        return PeftAdapter(lora, a, b, described.get("model"), saved, base, probe)
    except MobizoError as error:
        raise AdapterError(f"the adapter cannot be used: {error.problem}", where=str(folder)) from None


def state_of(program: Program, adapter: PeftAdapter, where: str) -> Tensor:
    """The flat state [S] of an adapter whose A the program has, or trains.

    Raises:
        AdapterError: Sites, shapes, scaling or A differ.
    """
    lora = program.manifest.lora
    if adapter.model not in (None, program.manifest.model):
        raise AdapterError(
            "the adapter was trained on another model: same layers, other weights",
            where=where,
            hint="compile(..., adapter=folder) takes it over to this model, where that is meant",
        )
    check_base(adapter, program.manifest.weights, where)
    kept = program.manifest.saved
    if adapter.saved.keys() != kept.keys() or any(not torch.equal(adapter.saved[n], kept[n].tensor()) for n in kept):
        raise AdapterError(
            f"the adapter brings the weights {sorted(adapter.saved)}, the program has {sorted(kept)} with other values",
            where=where,
            hint="a layer that was both new and adapted is exported as a whole, which cannot be taken apart again"
            if adapter.saved
            else None,
        )
    names = {site.fqn for site in program.sites}
    if names != set(adapter.a):
        missing, unknown = sorted(names - set(adapter.a)), sorted(set(adapter.a) - names)
        raise AdapterError(
            f"the adapter is for other layers: it lacks {missing[:3]} and has {unknown[:3]} besides"
            if missing and unknown
            else f"the adapter lacks layers {missing[:3]}"
            if missing
            else f"the adapter has layers that the program has not: {unknown[:3]}",
            where=where,
        )
    if (lora.r, lora.scaling) != (adapter.lora.r, adapter.lora.scaling):
        raise AdapterError(
            f"the adapter has r={adapter.lora.r}, lora_alpha={adapter.lora.lora_alpha}; the program has r={lora.r}, "
            f"lora_alpha={lora.lora_alpha}",
            where=where,
        )
    trained = []
    for site in program.sites:
        a, b = adapter.a[site.fqn], adapter.b[site.fqn]
        if tuple(a.shape) != site.a_shape or tuple(b.shape) != (site.r, site.out_features):
            raise AdapterError(f"layer {site.fqn} has A {list(a.shape)} and B {list(b.shape)}", where=where)
        if site.a_offset is None and not torch.equal(a, program.lora_a_by_fqn[site.fqn]):
            raise AdapterError(
                f"A of layer {site.fqn} is not the program's, which has its own and does not train it",
                where=where,
                hint="compile(..., adapter=folder) makes a program with this A",
            )
        if site.outputs:
            others = torch.ones(site.out_features, dtype=torch.bool)
            others[list(site.outputs)] = False
            if bool(b[:, others].any()):
                raise AdapterError(
                    f"the adapter changes outputs of layer {site.fqn} that the program does not adapt",
                    where=where,
                    hint="the program was compiled for a loss that reads few outputs; compile(..., adapter=folder) "
                    "makes one that adapts all of them",
                )
            b = b[:, list(site.outputs)]
        trained.append(b.flatten())
    b = torch.cat(trained)
    begin = initial_state(program.sites, adapter.a, program.manifest.initial_memory())
    begin[: b.numel()] = b
    return begin


def lora_a(program: Program, site: Site, state: Tensor) -> Tensor:
    """A of a site, [r, in_features], frozen or as the state has it."""
    return program.lora_a_by_fqn[site.fqn] if site.a_offset is None else site.lora_a(state)


def merge_into(program: Program, state: Tensor, model: nn.Module) -> None:
    """Add the adapter to the weights of the model it was compiled from, in place.

    Raises:
        AdapterError: A layer is missing, or its weight has another shape or is quantized, or a weight of the model,
            adapted or not, has other values than when it was compiled; then nothing was changed.
    """
    sums: list[tuple[Tensor, Tensor]] = []
    for site in program.sites:
        try:
            weight = model.get_submodule(site.fqn).weight
        except AttributeError:
            raise AdapterError(f"the model has no layer {site.fqn} with a weight") from None
        if sum(weight is other for _, other in model.named_parameters(remove_duplicate=False)) > 1:
            raise AdapterError(
                f"layer {site.fqn} shares its weight with another layer, which would be changed as well",
                hint="give it a weight of its own first: layer.weight = torch.nn.Parameter(layer.weight.clone())",
            )
        a, b = lora_a(program, site, state), site.lora_b(state)
        delta = site.scaling * torch.einsum("ri...,ro->oi...", a, b)
        turned = not site.kernel and type(model.get_submodule(site.fqn)).__name__ == "Conv1D"
        delta = delta.t() if turned else delta
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.shape != delta.shape:
            raise AdapterError(
                f"layer {site.fqn} cannot take the adapter: its weight is {type(weight).__name__} "
                f"{list(getattr(weight, 'shape', []))}, the adapter's product {list(delta.shape)}"
            )
        sums.append((weight, delta.to(weight.dtype)))
    _check_weights(program, model)
    with torch.no_grad():
        for weight, delta in sums:
            weight += delta


def _checksum(config: Mapping[str, Any], described: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Of both files; the name of the base model may be changed."""
    left_out = ("base_model_name_or_path", "sha256")
    said = [*((CONFIG, *item) for item in config.items()), *((WEIGHTS, *item) for item in described.items())]
    options = {
        f"{file} {name}": json.dumps(value, sort_keys=True) for file, name, value in said if name not in left_out
    }
    return checksum.of_tensors(options, tensors)


def _check_weights(program: Program, model: nn.Module) -> None:
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    for name, digest in program.manifest.weights.items():
        if name not in named or checksum.of_values(named[name]) != digest:
            raise AdapterError(
                f"the model is another one than was compiled: {name} "
                + ("has other values" if name in named else "is missing"),
                hint="load the model again as it was compiled: an adapter fits no other weights, and is merged once",
            )


def _check_plain(config: Mapping[str, Any], where: str) -> None:
    """Refuse an adapter that computes something else than a plain LoRA, by the name of the option."""
    for option, value in config.items():
        if option in _SAYS_NOTHING or option in ("r", "lora_alpha") or value is None:
            continue
        known = _UNDERSTOOD.get(option)
        if value in known if known is not None else not value:
            continue
        hint = "merge it into the model with peft (merge_and_unload), and compile that"
        if option == "init_lora_weights" and str(value).lower().startswith(_CONVERTIBLE):
            hint = "save it as a plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...) of peft"
        raise AdapterError(f"the adapter has {option} = {value!r}, which is not a plain LoRA", where=where, hint=hint)


def _pairs(tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A and B by layer; what is neither may be a weight of the base model."""
    found: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    adapters = set()
    for name, tensor in tensors.items():
        part = _PART.fullmatch(name)
        if part is None and (not name.startswith(PREFIX) or ".lora_" in name):
            raise AdapterError(f"{name} is not A or B of a LoRA on a layer", where=where, hint=_way_out(name))
        if part is not None:
            if tensor.dim() < 2 or not bool(tensor.isfinite().all()):
                raise AdapterError(f"{name} is not a finite A or B of a LoRA", where=where)
            adapters.add(part["adapter"])
            found[part["side"]][part["layer"]] = tensor
    if len(adapters) > 1:
        names = sorted(name or "one without a name" for name in adapters)
        raise AdapterError(
            f"the file has several adapters: {', '.join(names)}",
            where=where,
            hint="save one with save_pretrained of peft",
        )
    a, b = found.values()
    if not a:
        raise AdapterError("the adapter has no layers", where=where)
    return a, {fqn: matrix.reshape(matrix.shape[0], -1).t().contiguous() for fqn, matrix in b.items()}


def _way_out(name: str) -> str | None:
    """What to do about a tensor whose name is not understood."""
    if ".lora_embedding_" in name:
        return "embeddings are not adapted: merge it into the model with peft (merge_and_unload), and compile that"
    known = ".lora_A." in name or ".lora_B." in name
    return f"names begin with {PREFIX} in the files of peft: save it with its save_pretrained" if known else None


def check_base(adapter: PeftAdapter, weights: Mapping[str, int], where: str) -> None:
    """Compare the weights of the base model that an adapter brings with those that a manifest has checksums of.

    Raises:
        AdapterError: One is another, as after a vocabulary was made larger. A name may be that of a tied weight.
    """
    for name, digest in adapter.base.items():
        if digest != weights.get(name) and (name in weights or digest not in weights.values()):
            raise AdapterError(
                f"the adapter brings {name}, and it is not the model's",
                where=where,
                hint="load it with peft, merge_and_unload, and compile that model; where the weight was not changed, "
                "save_pretrained(..., save_embedding_layers=False) leaves it out",
            )
