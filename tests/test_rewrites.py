"""Rewrites for speed, each switched off: the program stays right, so that none of them hides another's error."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from mobizo_compiler import LoraConfig, passes
from mobizo_compiler.backends.shared_passes.core_aten import CoreAten
from mobizo_compiler.backends.xnnpack.mean_as_linear import MeanAsLinear
from mobizo_compiler.backends.xnnpack.repeat_as_product import RepeatAsProduct
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.passes.decompose_attention import DecomposeAttention
from mobizo_compiler.testing import check_against_oracle, zoo

ZOO = zoo()


def nothing(self: Pass, edit: Editor) -> None:
    """A pass that is switched off."""


def early(rewrite: Callable[[passes.DuplicateLanes, Editor], None], self: passes.DuplicateLanes, edit: Editor) -> None:
    rewrite(passes.DuplicateLanes(self.lanes, late=False), edit)


QUICK = {("hoist_picks", "llama"), ("late_duplication", "t5"), ("merge_siblings", "bert")}
CELLS = [
    pytest.param(off, name, marks=() if (off, name) in QUICK else pytest.mark.slow)
    for off in ("hoist_picks", "late_duplication", "merge_siblings")
    for name in ("llama", "bert", "t5")
]


@pytest.mark.parametrize(("off", "name"), CELLS)
def test_without_one_rewrite(off: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if off == "late_duplication":
        rewrite = functools.partial(early, passes.DuplicateLanes.rewrite)
        monkeypatch.setattr(passes.DuplicateLanes, "rewrite", lambda self, edit: rewrite(self, edit))
    else:
        step = {"hoist_picks": passes.HoistPicks, "merge_siblings": passes.MergeSiblings}[off]
        monkeypatch.setattr(step, "rewrite", nothing)
    run(name, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@pytest.mark.parametrize("step", [DecomposeAttention, MeanAsLinear, RepeatAsProduct, CoreAten])
def test_without_one_rewrite_of_xnnpack(step: type[Pass], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "rewrite", nothing)
    run(name, "xnnpack")


def run(name: str, backend: str) -> None:
    case = ZOO[name]
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=case.target_modules)
    check_against_oracle(case.model(), case.inputs(), backend=backend, lora=lora, loss=case.loss, **case.options)
