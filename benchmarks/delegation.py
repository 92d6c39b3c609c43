"""Compile a workload for a backend and print what of each method runs inside delegates.

python -m benchmarks.delegation [--backend vulkan] [--quantization int4] [options of a workload]
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from benchmarks.workload import Workload


def main() -> None:
    """Compile, and print a row per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="vulkan")
    Workload.add_arguments(parser)
    options = parser.parse_args()
    workload = Workload.from_arguments(options)
    program, seconds = workload.compile(options.backend)
    print(seconds)
    weights = workload.quantization or "float32"
    table = Table("method", "delegates", "calls outside", title=f"{workload.model} on {options.backend}, {weights}")
    for method, found in program.artifact.delegation.items():  # type: ignore[attr-defined]
        outside = ", ".join(f"{count} {name}" for name, count in found.outside.items())
        table.add_row(method, str(found.delegates), outside)
    Console(width=120).print(table)
    path = getattr(program.artifact, "path", None)
    if path is not None:
        print(f"file: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
