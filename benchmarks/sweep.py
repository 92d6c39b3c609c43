"""How the step's time grows: one quantity of the workload at a time, each value compiled to a program of its own.

    python -m benchmarks.sweep --vary queries 1 2 4 8 [--vary tokens 16 32 64] [--peers f] [--rounds 5] [options]

Quantities: queries, rows, tokens (plotted over 2qbT, the tokens of all lanes), rank, last (plotted as they are). Prints
the line that fits the medians best, and the slope in logarithms: 1 is proportional, less means a fixed part.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.compiled import CACHE
from benchmarks.step import measure
from benchmarks.workload import Workload
from examples.record import write_json

QUANTITIES = ("queries", "rows", "tokens", "rank", "last")


def main() -> None:
    """Measure every point, and leave sweep.json and sweep.png in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vary", nargs="+", action="append", required=True, metavar=("QUANTITY", "VALUE"))
    parser.add_argument("--peers", default="f", help="some of abcdef, see benchmarks.step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--cache", type=Path, default=CACHE)
    Workload.add_arguments(parser)
    options = parser.parse_args()
    for name, *values in options.vary:
        if name not in QUANTITIES or not values or not all(value.isdigit() for value in values):
            parser.error(f"--vary takes one of {QUANTITIES} and numbers, not {[name, *values]}")
    workload, console = Workload.from_arguments(options), Console(width=150)
    record: dict[str, Any] = {"workload": dataclasses.asdict(workload), "sweeps": []}
    for name, *values in options.vary:
        points: list[dict[str, Any]] = []
        for value in map(int, values):
            varied = dataclasses.replace(workload, **{name: value})  # type: ignore[arg-type]
            found = measure(varied, options.peers, options.rounds, options.threads, options.cache)
            points.append({"value": value, "x": abscissa(name, varied), "measured": found})
            gc.collect()
        record["sweeps"].append({"quantity": name, "points": points, "fits": fits(points)})
        write_json(options.out / "sweep.json", record)  # after every sweep: the last may take hours
        show(name, points, record["sweeps"][-1]["fits"], console)
    plot(record["sweeps"], options.out / "sweep.png")
    print(f"in {options.out}: sweep.json, sweep.png")


def abscissa(name: str, workload: Workload) -> int:
    """Tokens of all lanes, 2qbT, where they change; else the quantity."""
    if name in ("queries", "rows", "tokens"):
        return workload.lane_rows * workload.tokens
    return int(getattr(workload, name))


def medians(points: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Abscissae and median seconds of every peer that did not fail."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for point in points:
        for letter, peer in point["measured"]["peers"].items():
            if "median_seconds" in peer:
                xs, ys = found.setdefault(letter, ([], []))
                xs.append(point["x"])
                ys.append(peer["median_seconds"])
    return found


def fits(points: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For every peer the line `seconds = slope * x + intercept`, its r squared, and the slope in logarithms."""
    lines: dict[str, dict[str, float]] = {}
    for letter, (xs, ys) in medians(points).items():
        if len(set(xs)) < 2:
            continue
        slope, intercept = np.polyfit(xs, ys, 1)
        rest = float(np.square(np.asarray(ys) - (slope * np.asarray(xs) + intercept)).sum())
        total = float(np.square(np.asarray(ys) - np.mean(ys)).sum())
        lines[letter] = {
            "slope": float(slope),
            "intercept": float(intercept),
            "r_squared": 1 - rest / total if total else 1.0,
            "log_log_slope": float(np.polyfit(np.log(xs), np.log(ys), 1)[0]),
        }
    return lines


def show(name: str, points: list[dict[str, Any]], lines: dict[str, dict[str, float]], console: Console) -> None:
    """A row per value, and the fit of every peer."""
    letters = list(points[0]["measured"]["peers"])
    x_name = "2qbT" if name in ("queries", "rows", "tokens") else name
    table = Table(name, x_name, *(f"{letter}, s" for letter in letters), "compile s", "MB")
    for point in points:
        peers, files = point["measured"]["peers"], point["measured"]["files"]
        cells = [f"{peers[x]['median_seconds']:.4g}" if "median_seconds" in peers[x] else "failed" for x in letters]
        seconds = " ".join(f"{file['total_seconds']:.0f}" for file in files.values())
        table.add_row(
            str(point["value"]),
            str(point["x"]),
            *cells,
            seconds,
            " ".join(f"{f['file_mb']:.1f}" for f in files.values()),
        )
    console.print(table)
    for letter, line in lines.items():
        console.print(
            f"{letter}: seconds = {line['slope']:.3g} * {x_name} + {line['intercept']:.3g}, "
            f"r2 {line['r_squared']:.4f}, log-log slope {line['log_log_slope']:.3f}",
            highlight=False,
        )


def plot(sweeps: list[dict[str, Any]], path: Path) -> None:
    """A panel per quantity: medians with their range, and the line that fits them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(sweeps), figsize=(5 * len(sweeps), 4), constrained_layout=True, squeeze=False)
    for axes, sweep in zip(panels[0], sweeps, strict=True):
        for colour, (letter, (xs, ys)) in enumerate(medians(sweep["points"]).items()):
            peers = [p["measured"]["peers"][letter] for p in sweep["points"]]
            peers = [peer for peer in peers if "median_seconds" in peer]
            spread = [
                [p["median_seconds"] - p["least_seconds"] for p in peers],
                [p["most_seconds"] - p["median_seconds"] for p in peers],
            ]
            axes.errorbar(xs, ys, yerr=spread, fmt="o", color=f"C{colour}", capsize=3, label=peers[0]["name"])
            if line := sweep["fits"].get(letter):
                ends = np.array([0, max(xs)])
                axes.plot(ends, line["slope"] * ends + line["intercept"], color=f"C{colour}", linewidth=0.8)
        over = sweep["points"][0]["value"] != sweep["points"][0]["x"]
        axes.set(xlabel=f"2qbT, by {sweep['quantity']}" if over else sweep["quantity"], ylabel="seconds per step")
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


if __name__ == "__main__":
    main()
