"""Where the time of one method goes, by operator, from an ETDump of the stock runtime.

    python -m benchmarks.profile [--method train_step] [--runs 5] [--out runs/profile] [options of a workload]
    python -m benchmarks.profile --stock

Inside delegates, time is grouped by XNNPACK's kind of operator; outside, by the name of the kernel. What is left of a
delegate's call after its operators (crossing into it and out of it) and of the method after its calls (the interpreter)
is listed too, and all times are of one run, the median one, so shares add up to the whole. Tracing costs time itself:
shares are what to quote.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.compiled import CACHE, compiled
from benchmarks.machine import describe, set_threads
from benchmarks.record import bar_chart
from benchmarks.workload import Workload
from examples.record import write_json

WHOLE, DELEGATE, KERNEL = "Method::execute", "DELEGATE_CALL", "OPERATOR_CALL"
CROSSING, INTERPRETER = "delegate call, around operators", "interpreter, between calls"


@dataclasses.dataclass
class Group:
    """Calls of one kind of operator in one run."""

    place: str
    name: str
    calls: int = 0
    milliseconds: float = 0.0


def main() -> None:
    """Profile one method, and leave a JSON and a PNG in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("train_step", "evaluate", "replay"), default="train_step")
    parser.add_argument("--stock", action="store_true", help="the stock inference program of the rows of all lanes")
    parser.add_argument("--runs", type=int, default=5, help="after a first one that does not count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/profile"))
    parser.add_argument("--cache", type=Path, default=CACHE)
    Workload.add_arguments(parser)
    options = parser.parse_args()
    workload = Workload.from_arguments(options)
    method = "forward" if options.stock else options.method
    file = compiled("stock" if options.stock else "program", workload, options.cache)
    threads = set_threads(options.threads)
    total, groups = profile(file.path, method, workload, options.runs)
    plan = file.record["methods"][method]
    record = {
        "machine": describe() | {"threads": threads},
        "workload": dataclasses.asdict(workload),
        "method": method,
        "runs": options.runs,
        "milliseconds": total,
        "groups": [dataclasses.asdict(group) | {"share": group.milliseconds / total} for group in groups],
        "file": file.record,
    }
    stem = "stock" if options.stock else method
    write_json(options.out / f"{stem}.json", record)
    largest = [group for group in groups if group.milliseconds > 0.005 * total]
    bars = {f"{group.place}: {group.name}": 100 * group.milliseconds / total for group in largest}
    bar_chart(options.out / f"{stem}.png", f"{workload.model}, {stem}", "percent of the time", bars, {})
    show(total, groups, plan, Console(width=150))
    print(f"in {options.out}: {stem}.json, {stem}.png")


def profile(path: Path, method: str, workload: Workload, runs: int) -> tuple[float, list[Group]]:
    """Milliseconds of the method and of every group, largest first."""
    from executorch.devtools import Inspector
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path, enable_etdump=True, debug_buffer_size=0)
    loaded = program.load_method(method)
    assert loaded is not None
    arguments = workload.call_arguments(method)
    for _ in range(runs + 1):
        loaded.execute(arguments)
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "run.etdp"
        program.write_etdump_result_to_file(str(dump), str(Path(folder) / "debug.bin"))
        blocks = Inspector(etdump_path=str(dump)).event_blocks
    events = next(block.events for block in blocks if block.name == "Execute")
    return group_events(events)


def group_events(events: list[Any]) -> tuple[float, list[Group]]:
    """The method's time and its parts. A call outside of delegates is traced twice: as a call, and as its kernel."""
    groups: dict[tuple[str, str], Group] = {}
    runs = next(event.perf_data.raw for event in events if event.name == WHOLE)
    chosen = runs.index(statistics.median_low(runs[1:] or runs))
    delegates = inside = kernels = 0.0

    def add(place: str, name: str, milliseconds: float) -> None:
        group = groups.setdefault((place, name), Group(place, name))
        group.calls += 1
        group.milliseconds += milliseconds

    for event in events:
        if event.perf_data is None or event.name in (WHOLE, KERNEL):
            continue
        raw = event.perf_data.raw
        milliseconds = raw[chosen] if len(raw) == len(runs) else sum(raw) / len(runs)
        if event.name == DELEGATE:
            delegates += milliseconds
        elif event.is_delegated_op:
            inside += milliseconds
            add("inside", operator_kind(event.name), milliseconds)
        else:
            kernels += milliseconds
            add("outside", event.name.removeprefix("native_call_").split(".")[0], milliseconds)
    add("inside", CROSSING, delegates - inside)
    add("outside", INTERPRETER, runs[chosen] - delegates - kernels)
    return runs[chosen], sorted(groups.values(), key=lambda group: -group.milliseconds)


def operator_kind(name: str) -> str:
    """An XNNPACK operator without its layout, type and number.

    >>> operator_kind("Fully Connected (NC, F32) GEMM #12")
    'Fully Connected'
    """
    return re.sub(r"\s*(\(.*|#\d+.*)$", "", name)


def show(total: float, groups: list[Group], plan: dict[str, Any], console: Console) -> None:
    """Groups with their shares, the sums of both places, and the multiply-adds."""
    table = Table("", "operator", "calls", "ms", "share")
    for group in groups:
        if group.milliseconds > 0.0005 * total:
            share = group.milliseconds / total
            table.add_row(group.place, group.name, str(group.calls), f"{group.milliseconds:.3f}", f"{share:.1%}")
    console.print(table)
    for place in ("inside", "outside"):
        share = sum(group.milliseconds for group in groups if group.place == place) / total
        console.print(f"{place} of delegates: {share:.1%} of {total:.2f} ms", highlight=False)
    products, share = plan["multiply_adds"], plan["share_of_multiply_adds_inside"]
    if share is not None:
        console.print(f"multiply-adds: {products:,}, {share:.2%} of them inside of delegates", highlight=False)
    kernels = sum(plan["outside"].values())
    console.print(f"calls: {plan['delegates']} of delegates, {kernels} of other kernels", highlight=False)


if __name__ == "__main__":
    main()
