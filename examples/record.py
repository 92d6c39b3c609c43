"""The record that an example leaves of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mobizo_compiler.files import whole_file


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Settings, results and the loss of every step, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "run.json") as file:
        file.write(json.dumps(record, indent=1).encode())
