"""Adapters as llama.cpp loads them: a LoRA in a GGUF file.

The file has `general.type` = adapter, `adapter.type` = lora, `adapter.lora.alpha`, and for every adapted weight of the
base model, by its name there, `.lora_a` [r, in_features] and `.lora_b` [out_features, r]. llama.cpp adds alpha / r BA
to the weight. Its `convert_hf_to_gguf.py` reorders the outputs of queries and keys of Llama models, for its own form of
rotary embeddings; so are those of B here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

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
    name = ARCHITECTURES.get(config.model_type)
    if name is None:
        raise AdapterError(
            f"how llama.cpp names the weights of a model of type {config.model_type!r} is not known here",
            hint=f"known are {', '.join(ARCHITECTURES)}; convert_lora_to_gguf.py of llama.cpp takes what "
            "mobizo export-adapter writes",
        )
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
        heads = _REORDERED.get(name, {}).get(fqn.rpartition(".")[2])
        if heads is not None:
            b_OR = _reordered(b_OR, getattr(config, heads, None) or config.num_attention_heads)
        writer.add_tensor(f"{found}.lora_a", a_RI.contiguous().numpy())
        writer.add_tensor(f"{found}.lora_b", b_OR.contiguous().numpy())
    with whole_file(path) as file:
        writer.write_header_to_file(Path(file.name))
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _reordered(b_OR: Tensor, heads: int) -> Tensor:
    """The outputs of each head with those of its halves in turns, as llama.cpp rotates neighbours.

    >>> import torch
    >>> _reordered(torch.arange(8.0)[:, None], heads=2).flatten().tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    return b_OR.reshape(heads, 2, -1, b_OR.shape[1]).transpose(1, 2).reshape(b_OR.shape)
