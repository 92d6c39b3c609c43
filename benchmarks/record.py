"""Plots of measurements."""

from __future__ import annotations

from pathlib import Path


def bar_chart(
    path: Path, title: str, unit: str, bars: dict[str, float], ranges: dict[str, tuple[float, float]]
) -> None:
    """A horizontal bar per name with its value, and a whisker from least to most where there is a range."""
    if not bars:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.45 * len(bars)), constrained_layout=True)
    names, values = list(bars), list(bars.values())
    spread = [(v - ranges[n][0], ranges[n][1] - v) if n in ranges else (0.0, 0.0) for n, v in bars.items()]
    axes.barh(names, values, xerr=list(zip(*spread, strict=True)), color="#8fa8d0", ecolor="#1f4e9c", capsize=3)
    for row, (name, value) in enumerate(bars.items()):
        axes.text(ranges.get(name, (0, value))[1], row, f"  {value:.3g}", va="center")
    axes.invert_yaxis()
    axes.set(title=title, xlabel=unit, xlim=(0, 1.15 * max([*values, *(high for _, high in ranges.values())])))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)
