"""The course of a run as a picture, drawn by matplotlib, which is optional."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobizo_compiler.drawing import BLUE, ORANGE, PALE, pyplot, write_figure

_WINDOW = 20


def plot_run(record: Mapping[str, Any], path: Path) -> None:
    """Loss of every step, and validation, from a `run.json`.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    plt = pyplot("a plot")
    losses = [math.nan if loss is None else loss for loss in record["summary"]["losses"]]
    found = record["validations"]
    rates = [name for name in ("accuracy", "auc") if found and found[-1]["score"].get(name) is not None]
    figure, axes = plt.subplots(
        1, 2 if rates else 1, figsize=(10 if rates else 6, 4), layout="constrained", squeeze=False
    )
    left = axes[0][0]
    steps = range(1, len(losses) + 1)
    if not all(map(math.isnan, losses)):  # a private run tells none
        left.plot(steps, losses, color=PALE, linewidth=0.8, label="each step")
        means = [math.fsum(part) / len(part) for i in steps if (part := losses[max(0, i - _WINDOW) : i])]
        left.plot(steps, means, color=BLUE, linewidth=1.8, label=f"mean of {_WINDOW}")
    if found:
        left.plot(
            [v["step"] for v in found],
            [v["objective"] for v in found],
            "o-",
            color=ORANGE,
            markersize=4,
            label="validation",
        )
    left.set(xlabel="step", ylabel="loss (nats)", title="Loss")
    left.legend(frameon=False)
    for name, colour in zip(rates, (BLUE, ORANGE), strict=False):
        points = [(v["step"], v["score"][name]) for v in found if v["score"][name] is not None]
        label = {"accuracy": "accuracy", "auc": "AUC"}[name]
        axes[0][1].plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=label)
    if rates:
        axes[0][1].set(xlabel="step", title=f"Validation, {found[-1]['score']['rows']} samples", ylim=(0, 1.02))
        axes[0][1].legend(frameon=False, loc="lower right")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    write_figure(figure, path, dpi=130)
    plt.close(figure)
