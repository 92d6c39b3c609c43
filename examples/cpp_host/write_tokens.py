"""Write the token file of the C++ host; the format is described in `tokens.h`.

from examples.cpp_host.write_tokens import write_tokens

write_tokens("train.tokens", program.manifest, batches)   # batches: a sequence of (inputs, labels)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from mobizo_compiler.format.manifest import Manifest


def write_tokens(
    path: str | PathLike[str],
    manifest: Manifest,
    batches: Sequence[tuple[Sequence[Tensor] | Mapping[str, Any], Tensor]],
) -> None:
    """Write batches, each as `Session.train_step` takes it, one row a line.

    Args:
        path: The file.
        manifest: Of the program that the batches are for.
        batches: Inputs (a dict by name, or a sequence in the program's order) and labels, rows first.
    """
    names = [spec.name for spec in manifest.inputs]
    lines = ["\t".join([*names, manifest.labels.name])]
    for inputs, labels in batches:
        columns = [inputs[name] for name in names] if isinstance(inputs, Mapping) else list(inputs)
        for row in zip(*columns, labels, strict=True):
            lines.append("\t".join(" ".join(map(_number, value.flatten().tolist())) for value in row))
    Path(path).write_text("\n".join(lines) + "\n")


def _number(value: float | bool) -> str:
    return str(int(value)) if isinstance(value, (bool, int)) else repr(value)
