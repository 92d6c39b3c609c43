"""A product of 16 bits by ExecuTorch's XNNPACK delegate, beside the same product in float32.

    python -m benchmarks.half_precision [--width 1024] [--rows 128] [--rounds 50]

Float32, float16 and bfloat16 (`enable_bf16`) take turns. A product alone has input and result in 16 bits; "converted"
is with the conversions that a network of float32 around it needs. Printed are the median time beside float32's, the
error against float64, and how many calls are left outside the delegate. Weights and inputs are random.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.machine import describe, set_threads
from examples.record import write_json

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def main() -> None:
    """Measure, print, and leave the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/half_precision"))
    options = parser.parse_args()
    set_threads(options.threads)
    found = products(options.width, options.rows, options.rounds)
    table = Table("product", "time beside float32", "error", "calls outside")
    for name, values in found.items():
        table.add_row(name, f"{values['ratio']:.2f}", f"{values['error']:.1e}", str(len(values["outside"])))
    Console(width=100).print(table)
    record = {"machine": describe() | {"threads": options.threads}, "products": found}
    write_json(options.out / "products.json", record | {"width": options.width, "rows": options.rows})


class Product(nn.Module):
    """A linear layer in some precision, between conversions or alone."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, converts: bool) -> None:
        super().__init__()
        self.linear = copy.deepcopy(linear).to(dtype)
        self._dtype, self._converts = dtype, converts

    def forward(self, x: Tensor) -> Tensor:
        """From and to float32 where it converts."""
        return self.linear(x.to(self._dtype)).to(torch.float32) if self._converts else self.linear(x)


def products(width: int, rows: int, rounds: int) -> dict[str, dict[str, Any]]:
    """By precision: seconds of every round, their median beside float32's, the error, and the calls outside."""
    torch.manual_seed(0)
    linear = nn.Linear(width, width, bias=False).eval()
    x = torch.randn(rows, width)
    exact = x.double() @ linear.weight.detach().double().t()
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    for dtype in DTYPES:
        for converts in (False, True) if dtype != torch.float32 else (False,):
            name = str(dtype).removeprefix("torch.") + (", converted" if converts else "")
            given = x if converts else x.to(dtype)
            calls[name], outside = _lowered(Product(linear, dtype, converts).eval(), given)
            error = float((calls[name]().double() - exact).norm() / exact.norm())
            found[name] = {"outside": outside, "error": error, "seconds": []}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name]["seconds"].append(time.perf_counter() - start)
    of_float32 = statistics.median(found["float32"]["seconds"])
    for values in found.values():
        values["ratio"] = statistics.median(values["seconds"]) / of_float32
    return found


def _lowered(module: nn.Module, x: Tensor) -> tuple[Callable[[], Tensor], list[str]]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    exported = torch.export.export(module, (x,), strict=True)
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner(enable_bf16=True)])
    names = [str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function"]
    outside = [name for name in names if "delegate" not in name and "getitem" not in name]
    buffer = edge.to_executorch().buffer
    program = Runtime.get().load_program(buffer)
    method = program.load_method("forward")
    alive = (buffer, program)  # a method does not keep them

    def call() -> Tensor:
        assert alive
        return method.execute([x])[0].clone()

    return call, outside


if __name__ == "__main__":
    main()
