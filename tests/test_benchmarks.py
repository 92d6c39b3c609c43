"""The benchmarks run, on a small part of the model; what they measure there is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mobizo_compiler as mobizo
from benchmarks import accuracy, zeroth_order
from benchmarks.profile import group_events, operator_kind
from benchmarks.sweep import fits
from benchmarks.tasks import TASKS, Choice, Options
from benchmarks.workload import Workload
from examples.rotten_tomatoes import balanced
from examples.topics import TOPICS, load_topics

SMALL = ("--layers", "1", "--tokens", "8", "--rows", "1", "--queries", "1")
ROOT = Path(__file__).parent.parent


def run(module: str, *options: str) -> None:
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}", *SMALL, *options], check=True, cwd=ROOT
    )


@pytest.mark.slow
def test_gpu_is_rehearsed_without_a_card(tmp_path: Path) -> None:
    """What a machine without a GPU prepares is compiled and measured, on its CPU in place of the card."""
    gpu = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--cases", "smollm2"]
    subprocess.run([*gpu, "--prepare", str(tmp_path), "--layers", "1"], check=True, cwd=ROOT)
    assert {file.stem for file in tmp_path.iterdir()} == {
        f"smollm2.{kind}.{dtype}" for kind in ("ours", "exact", "forward", "small") for dtype in ("float32", "bfloat16")
    }
    run = ["--run", str(tmp_path), "--device", "cpu", "--out", str(tmp_path / "out"), "--jobs", "1"]
    subprocess.run([*gpu, *run, "--most-seconds", "1500"], check=True, cwd=ROOT)
    record = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert record["failed"] == {}
    for precision, found in record["cases"]["smollm2"].items():
        assert all(found[letter]["ms"] > 0 for letter in "abcdef"), precision
        assert found["replay_differs_in"] == 0, precision
    exact, rounded = (record["cases"]["smollm2"][precision] for precision in ("float32", "bfloat16"))
    assert exact["largest_difference_of_lane_losses"] < 1e-4, "the peers have the same weights as our program"
    assert rounded["cosine_with_float32"] > 0.97


@pytest.mark.slow
def test_step_profile_and_memory(tmp_path: Path) -> None:
    cache = ("--cache", str(tmp_path / "cache"))
    run("step", "--rounds", "1", "--peers", "abdef", "--out", str(tmp_path), *cache)
    record = json.loads((tmp_path / "step.json").read_text())
    assert set(record["peers"]) == {"a", "b", "d", "e", "e-checkpointed", "f"}
    for letter, peer in record["peers"].items():
        assert "failed" not in peer, peer
        assert peer["median_seconds"] > 0
        assert letter not in "bd" or peer["largest_difference_of_lane_losses"] < 1e-3
    assert record["files"]["program"]["methods"]["train_step"]["share_of_multiply_adds_inside"] > 0.95
    assert record["ratios"]["file, program/stock"] < 1
    run("profile", "--runs", "1", "--out", str(tmp_path), *cache)
    groups = json.loads((tmp_path / "train_step.json").read_text())["groups"]
    assert sum(group["share"] for group in groups) == pytest.approx(1, abs=1e-6)
    run("memory", "--out", str(tmp_path), *cache)
    children = json.loads((tmp_path / "memory.json").read_text())["children"]
    assert not [name for name, child in children.items() if "failed" in child]
    assert all(child["peak_mb"] > 100 for child in children.values())


@pytest.mark.slow
def test_rivals_arrive_at_the_same_loss(tmp_path: Path) -> None:
    """Peers that take the same step have the same loss after it, and one that cannot is listed with its error."""
    peers = ("peft-b", "peft", "joint", "joint-rewritten", "onnx", "exact", "two-sided")
    cache = ("--cache", str(tmp_path / "cache"), "--onnx-python", sys.executable)
    run("rivals", "--rows", "2", "--steps", "3", "--out", str(tmp_path), *cache, "--peers", *peers)
    found = json.loads((tmp_path / "rivals.json").read_text())["peers"]
    assert "empty_permuted" in found["joint"]["failed"]
    assert "failed" in found["onnx"]
    same = [found[name]["losses"] + [found[name]["loss"]] for name in ("peft-b", "joint-rewritten", "exact")]
    assert same[1] == pytest.approx(same[0], abs=1e-3) and same[2] == pytest.approx(same[0], abs=1e-3)
    assert same[0][0] - same[0][-1] > 0.01, "the steps are large enough to tell"
    assert found["peft"]["losses"][1] == pytest.approx(same[0][1], abs=1e-4), "A has no gradient where B is 0"
    assert all(peer["peak_mb"] > 100 for peer in found.values() if "failed" not in peer)


def test_arguments_of_a_workload_make_the_same_workload() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    Workload.add_arguments(parser)
    workload = Workload(queries=3, rows=2, tokens=5, last=2, targets="qv")
    assert Workload.from_arguments(parser.parse_args(workload.to_arguments())) == workload


def test_shares_of_a_profile_add_up() -> None:
    def event(name: str, *milliseconds: float, delegated: bool = False) -> Any:
        data = SimpleNamespace(raw=list(milliseconds))
        return SimpleNamespace(name=name, perf_data=data, is_delegated_op=delegated)

    total, groups = group_events(
        [
            event("Method::execute", 30.0, 10.0, 11.0),
            event("DELEGATE_CALL", 20.0, 7.0, 8.0),
            event("Fully Connected (NC, F32) GEMM #1", 15.0, 4.0, 5.0, delegated=True),
            event("Fully Connected (NC, F32) GEMM #2", 3.0, 2.0, 2.0, delegated=True),
            event("OPERATOR_CALL", 5.0, 2.0, 2.0),
            event("native_call_mul.out", 5.0, 2.0, 2.0),
        ]
    )
    found = {(group.place, group.name): group.milliseconds for group in groups}
    assert total == 10.0, "the median run after the first"
    assert found["inside", "Fully Connected"] == 6.0
    assert found["outside", "mul"] == 2.0
    assert sum(found.values()) == pytest.approx(total)
    assert operator_kind("Batch Matrix Multiply (NC, F32) GEMM #3") == "Batch Matrix Multiply"


def test_the_slope_of_a_line_through_the_origin_is_one() -> None:
    def point(x: float, seconds: float) -> dict[str, Any]:
        return {"value": x, "x": x, "measured": {"peers": {"f": {"median_seconds": seconds}}}}

    found = fits([point(x, 0.5 * x) for x in (1, 2, 4)])
    assert found["f"]["log_log_slope"] == pytest.approx(1)


def test_topics_are_apart() -> None:
    parts = load_topics()
    words = [word.text for part in parts.values() for word in part]
    assert len(words) == len(set(words)) > 8000
    counts = [sum(word.label == topic for word in parts["test"]) for topic in range(len(TOPICS))]
    assert len(counts) == 7 and min(counts) > 150
    held_out = balanced(parts["test"], 400)
    assert [sum(word.label == topic for word in held_out) for topic in range(7)] == [57] * 7


@pytest.mark.slow
def test_every_task_makes_batches_and_scores_a_model(smollm2: tuple[Any, Any]) -> None:
    tokenizer, model = smollm2
    for name, make in TASKS.items():
        task = make(tokenizer, Options(train_rows=28, held_out=14))
        batches = task.batches(4, seed=0)
        seen = [next(batches) for _ in range(14)]
        texts = Counter(tuple(row.tolist()) for inputs, _ in seen for row in inputs["input_ids"])
        assert set(texts.values()) == {2}, f"{name}: two epochs have every row twice"
        assert torch.equal(next(task.batches(4, seed=0))[0]["input_ids"], seen[0][0]["input_ids"])
        with torch.no_grad():
            found = task.scores(lambda inputs: model(**inputs), 4)
            assert found == pytest.approx(task.scores(lambda inputs: model(**inputs), 14), abs=1e-5)
            losses, weights = task.loss(model(**seen[0][0]), seen[0][1])
        assert (weights > 0).all() and losses.isfinite().all()


def test_a_model_that_knows_scores_all(smollm2: tuple[Any, Any]) -> None:
    task = TASKS["topics"](smollm2[0], Options(held_out=21))
    assert isinstance(task, Choice)
    known = {tuple(task.prompter.encode([word])[0]["input_ids"][0].tolist()): word.label for word in task.held_out}

    def right(inputs: dict[str, torch.Tensor]) -> Any:
        logits = torch.zeros(*inputs["input_ids"].shape, 49152)
        for row, ids in enumerate(inputs["input_ids"].tolist()):
            logits[row, :, task.prompter.answers[known[tuple(ids)]]] = 1.0
        return SimpleNamespace(logits=logits)

    assert task.scores(right, 4) == {"accuracy": 1.0}


def test_records_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = ("task", "method", "backend", "steps", "forward_rows", "train_rows", "held_out")
    history = [{"step": n, "forward_rows": 8 * n, "minutes": n / 2, "accuracy": 0.5 + n / 10} for n in (0, 1, 2)]
    (tmp_path / "docs").mkdir()
    for seed in range(2):
        values = ("A", "library", "xnnpack", 2, 16, None, 400)
        record = dict(zip(shown, values, strict=True)) | {"seed": seed, "history": history}
        (tmp_path / f"{seed}.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    accuracy.main(["publish", str(tmp_path)])
    published = tmp_path / "docs" / "accuracy.json"
    assert len(json.loads(published.read_text())) == 2
    (tmp_path / "0.json").rename(tmp_path / "later.json")
    (tmp_path / "1.json").write_text((tmp_path / "1.json").read_text().replace('"seed": 1', '"seed": 2'))
    accuracy.main(["publish", str(tmp_path)])
    assert sorted(record["seed"] for record in json.loads(published.read_text())) == [0, 1, 2], "what was there stays"
    assert (tmp_path / "docs" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@torch.no_grad()
def small_block() -> tuple[zeroth_order.LastBlock, zeroth_order.Rows]:
    shapes = {"gate": (24, 20), "up": (24, 20), "down": (20, 24), "answers": (2, 20), "norm": (20,), "last_norm": (20,)}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}
    block = zeroth_order.LastBlock(weights, 1e-5)
    return block, (torch.randn(64, 20, generator=generator), torch.arange(64) % 2.0)


def test_a_step_on_the_last_block_is_that_of_the_reference() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    last = torch.tensor([3, 4, 5, 2])
    mask = torch.arange(7) <= last[:, None] + 1
    labels = torch.full((4, 7), -100).scatter_(1, last[:, None] + 1, torch.tensor([11, 13, 13, 11])[:, None])
    inputs = {"input_ids": torch.randint(0, 50, (4, 7)), "attention_mask": mask.long()}
    assert zeroth_order.difference_from_reference(model, inputs, labels, last, mobizo.ChoiceLoss((11, 13))) < 1e-5


@pytest.mark.parametrize("name", zeroth_order.VARIANTS)
def test_every_variant_goes_down(name: str) -> None:
    """Over many steps a direction agrees with the gradient that autograd finds."""
    (block, rows), variant = small_block(), zeroth_order.VARIANTS[name]
    block.lora_a = zeroth_order.made_a(block, variant.a, rows[0])
    trained_P = torch.zeros(block.parameters, requires_grad=True)
    block.losses(rows, trained_P[None]).mean().backward()
    assert trained_P.grad is not None
    estimate, start_P = zeroth_order.ESTIMATES[variant.estimate](block, 16), trained_P.detach()
    found_P = torch.stack([estimate(rows, start_P, seed) for seed in range(100)]).mean(0)
    assert float(torch.cosine_similarity(found_P, trained_P.grad, dim=0)) > 0.5


@pytest.mark.slow
def test_products_of_16_bits(tmp_path: Path) -> None:
    """The delegate takes each alone, and leaves the conversions outside, which decision 33 is about."""
    small = ["--width", "64", "--rows", "8", "--rounds", "3", "--out", str(tmp_path)]
    subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.half_precision", *small], check=True, cwd=ROOT)
    found = json.loads((tmp_path / "products.json").read_text())["products"]
    alone = [name for name in found if "converted" not in name]
    assert alone == ["float32", "float16", "bfloat16"] and not any(found[name]["outside"] for name in alone)
    assert all(len(found[f"{name}, converted"]["outside"]) == 2 for name in alone[1:])
    assert found["float32"]["error"] < 1e-5 < found["float16"]["error"] < found["bfloat16"]["error"] < 1e-2
