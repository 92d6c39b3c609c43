"""The record that an example leaves of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Settings, results and the loss of every step, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".run.json.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / "run.json")
