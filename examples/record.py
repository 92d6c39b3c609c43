"""What a run or a measurement leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mobizo_compiler.format.files import whole_file


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1).encode())
