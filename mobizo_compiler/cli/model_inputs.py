"""What `mobizo compile` makes of a loaded model before it is compiled: example inputs, and whether there is room."""

from __future__ import annotations

import inspect
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobizo_compiler.cli.app import megabytes
from mobizo_compiler.errors import ConfigError
from mobizo_compiler.quantization.weights import QuantizationConfig
from mobizo_compiler.text.prompts import Piece
from mobizo_compiler.text.speller import Speller

# Bytes that a weight takes at least; a recipe that is not here is taken for the smallest.
_BYTES = {"fp16": 2.0, "8da8w": 1.0, "int8": 1.0}
_SMALLEST = 0.5


def example_inputs(
    model: Any, task: str, speller: Speller | None, texts: Sequence[Sequence[Piece]], rows: int, tokens: int
) -> dict[str, Tensor]:
    """Real text over and over again, or tokens drawn with a fixed seed; token types where pairs are classified."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    if not texts or speller is None:
        ids = torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
    else:
        padding = speller.padding or 0
        ids = torch.full((rows, tokens), padding if padding < vocabulary else 0)  # it is masked
        mask = torch.zeros_like(ids)
        for row in range(rows):
            # A row is filled with texts, so that few rows see much of the language.
            found = list(speller.front)
            for text in texts[row::rows] or texts:
                found += speller.spell(text)
            whole = torch.tensor(found[:tokens])
            ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    kinds = getattr(model.config, "type_vocab_size", None) or 0
    typed = kinds > 1 and "token_type_ids" in inspect.signature(model.forward).parameters
    if task == "sequence-classification" and typed:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def check_room(output: Path, model: Any, quantization: QuantizationConfig | None) -> None:
    """Raise `ConfigError` where a disk cannot hold the weights alone, before the work that would end there.

    A program is written to the folder for temporary files first, and copied then.
    """
    weights = {tensor.data_ptr(): tensor.numel() for tensor in model.parameters()}
    each = 4.0 if quantization is None else _BYTES.get(quantization.recipe, _SMALLEST)
    needed = each * sum(weights.values())
    for folder in (output.parent, Path(tempfile.gettempdir())):
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ConfigError(
                f"the program needs {megabytes(needed)} or more, and {megabytes(free)} are free",
                where=str(folder.resolve()),
                hint="make room, or name another folder (--output, and TMPDIR for temporary files)",
            )
