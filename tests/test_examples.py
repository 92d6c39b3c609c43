"""The data of the demo, and the demo itself on a small model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from examples import demo, federated, reward
from examples.rotten_tomatoes import Prompter, accuracy_and_auc, balanced, load_sentences, split_by_movie


def test_sentences_are_clean_and_split_by_movie() -> None:
    sentences = load_sentences()
    texts = [s.text for s in sentences]
    assert 12_700 < len(sentences) < 12_800
    assert len(set(texts)) == len(texts) and all(texts)
    parts = split_by_movie(sentences)
    movies = {name: {s.movie for s in part} for name, part in parts.items()}
    assert sum(map(len, parts.values())) == len(sentences)
    assert not movies["train"] & movies["test"] and not movies["train"] & movies["validation"]
    assert not movies["validation"] & movies["test"]
    chosen = balanced(parts["test"], 400)
    assert sum(s.label for s in chosen) == 200 and len({s.text for s in chosen}) == 400
    assert chosen == balanced(parts["test"], 400)


def test_prompts(smollm2: tuple[Any, Any]) -> None:
    tokenizer, _ = smollm2
    prompter = Prompter(tokenizer, 48)
    sentences = load_sentences()[:200]
    inputs, labels, last = prompter.encode(sentences)
    for row, sentence in enumerate(sentences):
        count = int(inputs["attention_mask"][row].sum())
        text = tokenizer.decode(inputs["input_ids"][row, :count])
        assert text.endswith(" It was great" if sentence.label else " It was terrible")
        assert last[row] == count - 2
        assert (labels[row] != -100).nonzero().tolist() == [[count - 1]]
        if count < 48:
            assert text.removesuffix(" great").removesuffix(" terrible") == f"{sentence.text} It was"
    logits = torch.zeros(len(sentences), 48, len(tokenizer))
    logits[torch.arange(200), last, tokenizer(" great").input_ids[0]] = 2.0
    assert prompter.scores(logits, last).tolist() == [2.0] * 200


def test_auc_against_scipy() -> None:
    from scipy.stats import mannwhitneyu

    scores = torch.randint(0, 9, (60,), generator=torch.Generator().manual_seed(0)).double()
    fresh = (torch.arange(60) % 3 == 0).long()
    wanted = mannwhitneyu(scores[fresh == 1], scores[fresh == 0]).statistic / (20 * 40)
    assert accuracy_and_auc(scores, fresh)[1] == pytest.approx(wanted)


@pytest.mark.parametrize(
    "adapters",
    ["exact", *(pytest.param(name, marks=pytest.mark.slow) for name in ("head", "last-block", "all-blocks"))],
)
def test_the_demo_from_end_to_end(
    adapters: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With fewer rows, directions and tokens than the demo has; adapters in blocks on two of the model's own."""
    loaded = request.getfixturevalue("narrow_smollm2" if adapters in ("exact", "head") else "smollm2")
    setup = demo.SETUPS[adapters]
    small = dataclasses.replace(setup, rows=4, zo=dataclasses.replace(setup.zo, queries=4))
    monkeypatch.setitem(demo.SETUPS, adapters, small)
    monkeypatch.setattr(demo, "TOKENS", 24)
    monkeypatch.setattr(demo, "load_smollm2", lambda: loaded)
    monkeypatch.setattr(demo, "cache_folder", lambda: tmp_path / "cache")
    arguments = ["--steps", "3", "--rows", "16", "--adapters", adapters, "--output", str(tmp_path / "run")]
    demo.main(arguments)
    first = capsys.readouterr().out
    assert "lower" in first and "zero-shot: accuracy" in first and "gain" in first
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(record["history"]) == 3 and record["versions"]["executorch"].startswith("1.5")
    assert (tmp_path / "run" / "plot.png").read_bytes().startswith(b"\x89PNG")
    path, shape = {
        "exact": ("model.layers.0.self_attn.q_proj", (32, 8)),
        "head": ("lm_head", (49152, 1)),
        "last-block": ("model.layers.1.mlp.down_proj", (576, 16)),
        "all-blocks": ("model.layers.1.self_attn.q_proj", (576, 8)),
    }[adapters]
    with safe_open(tmp_path / "run" / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        b = adapter.get_tensor(f"base_model.model.{path}.lora_B.weight")
    assert b.shape == shape and b.abs().max() > 0
    if adapters == "exact":
        return  # the others go on
    demo.main(arguments)
    assert "cached" in capsys.readouterr().out
    again = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [e["loss"] for e in again["history"]] == [e["loss"] for e in record["history"]], "same seed, same run"


@pytest.mark.slow
def test_a_reward_on_generated_text_is_learnt() -> None:
    before, after = reward.main(["--steps", "100"])
    assert after > before + 0.2


@pytest.mark.slow
def test_devices_learn_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rounds", "2", "--steps", "3", "--rows", "100", "--layers", "1", "--output", str(tmp_path / "run")]
    before, after = federated.main(arguments)
    said = capsys.readouterr().out
    assert before != after
    journals = sorted((tmp_path / "run").glob("round*/device*/journal"))
    assert len(journals) == 6
    size = sum(path.stat().st_size for path in journals)
    assert size == 6 * (64 + 3 * (24 + 4 * 4)), "a header, and 24 + 4q bytes for each step"
    assert f"{3 * size:,} bytes of journals went" in " ".join(said.split())
    shards = federated.by_movie(split_by_movie(load_sentences())["train"], 3)
    movies = [{sentence.movie for sentence in shard} for shard in shards]
    assert not movies[0] & movies[1] and not movies[1] & movies[2] and not movies[0] & movies[2]
