"""Adapters as llama.cpp loads them: a LoRA in a GGUF file.

The file has `general.type` = adapter, `adapter.type` = lora, `adapter.lora.alpha`, and for every adapted weight of the
base model, by its name there, `.lora_a` [r, in_features] and `.lora_b` [out_features, r]. llama.cpp adds alpha / r BA
to the weight. Its `convert_hf_to_gguf.py` reorders the outputs of queries and keys of Llama models, for its own form of
rotary embeddings; so are those of B here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobizo_compiler.config import LoraConfig
from mobizo_compiler.errors import AdapterError
from mobizo_compiler.format.files import whole_file
from mobizo_compiler.format.peft import PeftAdapter
from mobizo_compiler.optional import optional

# Model types of transformers, and the architecture that llama.cpp runs them as.
ARCHITECTURES = {
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "phi3": "PHI3",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
}
_REORDERED = {"LLAMA": {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}}


def write_gguf(adapter: PeftAdapter, config: Any, path: Path) -> None:
    """Write an adapter to a GGUF file, which appears whole or not at all.

    Args:
        adapter: The adapter.
        config: Configuration of its base model, of transformers.
        path: The file.

    Raises:
        AdapterError: llama.cpp has no such model, or no weight where a layer is adapted.
        MissingPackageError: The package gguf is not installed.
    """
    gguf = optional("gguf", "writing a GGUF file")
    name = _architecture(config)
    if adapter.saved:
        raise AdapterError(
            f"the adapter brings the weights {sorted(adapter.saved)}, for which a GGUF LoRA has no place"
        )
    architecture = gguf.MODEL_ARCH[name]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.lora.lora_alpha))
    for fqn, a_RI in adapter.a.items():
        tied = fqn == "lm_head" and getattr(config, "tie_word_embeddings", False)
        found = names.get_name(f"{fqn}.weight", try_suffixes=(".weight",))
        if found is None or found == "token_embd.weight" or tied or a_RI.dim() != 2:
            raise AdapterError(
                f"the layer {fqn} has no weight of its own in llama.cpp"
                + (": the model reads and writes words with the same one" if tied else ""),
                hint="adapt layers of the blocks: --lora-target-modules q_proj,v_proj",
            )
        b_OR = adapter.b[fqn].t()
        if heads := _heads(name, fqn, config):
            b_OR = _reordered(b_OR, heads)
        writer.add_tensor(f"{found}.lora_a", a_RI.contiguous().numpy())
        writer.add_tensor(f"{found}.lora_b", b_OR.contiguous().numpy())
    with whole_file(path) as file:
        writer.write_header_to_file(Path(file.name))
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_gguf(path: Path, config: Any, layers: Iterable[str]) -> PeftAdapter:
    """Read an adapter that `write_gguf` or llama.cpp's `convert_lora_to_gguf.py` wrote.

    Args:
        path: The file.
        config: Configuration of the base model, of transformers.
        layers: Paths of the layers that may be adapted, as those of all linear layers of the model.

    Raises:
        AdapterError: It is no LoRA in a GGUF file, or that of another kind of model, or adapts something else.
        MissingPackageError: The package gguf is not installed.
    """
    gguf = optional("gguf", "reading a GGUF file")
    where, name = str(path), _architecture(config)
    if not path.is_file():
        raise AdapterError("there is no such file", where=where)
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        kind, architecture = fields.get(gguf.Keys.Adapter.TYPE), fields[gguf.Keys.General.ARCHITECTURE]
        stored = {tensor.name: _values(gguf, tensor) for tensor in reader.tensors}
        alpha = float(fields.get(gguf.Keys.Adapter.LORA_ALPHA, 0.0))
    except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        raise AdapterError(f"the file cannot be read as GGUF: {error!r}", where=where) from None
    if kind != "lora":
        raise AdapterError("the file has no LoRA in it", where=where, hint="a whole model is no adapter")
    wanted = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[name]]
    if architecture != wanted:
        raise AdapterError(
            f"the adapter is for the architecture {architecture!r}, the model is {wanted!r}", where=where
        )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name], config.num_hidden_layers)
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    for fqn in layers:
        found = names.get_name(f"{fqn}.weight", try_suffixes=(".weight",))
        sides = [stored.pop(f"{found}.lora_{side}", None) for side in "ab"]
        if sides[0] is None and sides[1] is None:
            continue
        if sides[0] is None or sides[1] is None or sides[0].dim() != 2 or sides[1].dim() != 2:
            raise AdapterError(f"the layer {fqn} has no A and B that are matrices", where=where)
        heads = _heads(name, fqn, config)
        a[fqn] = sides[0]
        b[fqn] = (_in_halves(sides[1], heads) if heads else sides[1]).t().contiguous()
    ranks = {len(side) for side in (*a.values(), *b.values())}
    if stored or len(ranks) != 1:
        raise AdapterError(
            f"the adapter has weights for no layer of the model: {', '.join(sorted(stored)[:3])}"
            if stored
            else "the layers of the adapter do not have one rank"
            if a
            else "the adapter has no layer",
            where=where,
        )
    rank = ranks.pop()
    lora = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=tuple(sorted(a)))
    return PeftAdapter(lora, a, b)


def _values(gguf: Any, tensor: Any) -> Tensor:
    """The numbers of a stored tensor, float32, in the order of torch."""
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(values.copy()).to(torch.float32).reshape([int(n) for n in reversed(tensor.shape)])


def _architecture(config: Any) -> str:
    name = ARCHITECTURES.get(config.model_type)
    if name is None:
        raise AdapterError(
            f"how llama.cpp names the weights of a model of type {config.model_type!r} is not known here",
            hint=f"known are {', '.join(ARCHITECTURES)}; llama.cpp's convert_lora_to_gguf.py takes what "
            "mobizo export-adapter writes",
        )
    return name


def _heads(architecture: str, fqn: str, config: Any) -> int:
    """How many heads the outputs of a layer are of, where llama.cpp has them in another order; else 0."""
    heads = _REORDERED.get(architecture, {}).get(fqn.rpartition(".")[2])
    return int(getattr(config, heads, None) or config.num_attention_heads) if heads else 0


def _in_halves(b_OR: Tensor, heads: int) -> Tensor:
    """Inverse of `_reordered`."""
    return b_OR.reshape(heads, -1, 2, b_OR.shape[1]).transpose(1, 2).reshape(b_OR.shape)


def _reordered(b_OR: Tensor, heads: int) -> Tensor:
    """The outputs of each head with those of its halves in turns, as llama.cpp rotates neighbours.

    >>> import torch
    >>> _reordered(torch.arange(8.0)[:, None], heads=2).flatten().tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    return b_OR.reshape(heads, 2, -1, b_OR.shape[1]).transpose(1, 2).reshape(b_OR.shape)
