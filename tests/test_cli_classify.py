"""From a table with classes to answers in four commands: `mobizo compile --classify`, finetune, evaluate, predict."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mobizo_compiler as mobizo
from mobizo_compiler.cli.classify import MOST_TOKENS, label_words
from mobizo_compiler.text.prompts import PromptConfig
from mobizo_compiler.text.speller import Speller
from tests import test_predict as predict

TEXTS = {
    "0": ("the bill is wrong", "you charged me twice", "refund my money"),
    "1": ("the app crashes", "nothing loads", "the screen stays black"),
    "account_access": ("I forgot my password", "my login is locked", "reset my account"),
}


def run(*arguments: Any, code: int = 0) -> tuple[str, str]:
    return predict.run(*arguments, code=code, columns=110)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer knows some words, and a table with three classes."""
    path = tmp_path_factory.mktemp("classify")
    known = ["<pad>", "</s>", "<unk>", "Message", ":", "Class", "zero", "one", "account", "now", "again"]
    known += sorted({word for texts in TEXTS.values() for text in texts for word in text.split()} - set(known))
    spelled = Tokenizer(models.WordLevel({word: place for place, word in enumerate(known)}, unk_token="<unk>"))
    spelled.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=spelled, **special).save_pretrained(path / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {"vocab_size": len(known), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = LlamaConfig(num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=True, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(path / "model")
    rows = [f"{text} {word},{name}" for name, texts in TEXTS.items() for text in texts for word in ("now", "again")]
    random.Random(0).shuffle(rows)
    (path / "rows.csv").write_text("\n".join(["message,class", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def program(folder: Path) -> tuple[Path, str, str]:
    """The program of the first command, and what it printed."""
    line = ("compile", folder / "model", "-o", folder / "a.pte", "--classify", folder / "rows.csv")
    out, remarks = run(*line, "--answer-column", "class", "--rows", 4, "--lora-r", 4, "--backend", "portable")
    return folder / "a.pte", out, remarks


@pytest.mark.slow
def test_the_recipe_is_chosen_and_said(program: tuple[Path, str, str]) -> None:
    file, out, remarks = program
    manifest = mobizo.load(file).manifest
    assert manifest.answers == ("0", "1", "account_access") and len(manifest.labels.choices or ()) == 3
    assert len(manifest.sites) == 2 and manifest.rule["name"] == "adamw" and manifest.zo.differentiates
    assert (manifest.lora.r, manifest.lora.lora_alpha, manifest.lora.train_a) == (4, 16, True), (
        "what is given goes first"
    )
    assert manifest.prompt is not None and manifest.prompt["template"] == "Message: {message}\nClass:"
    for part in (
        "3 classes in 18 rows",
        "0 (6)",
        "'Message: {message}\\nClass:'",
        "0 as 'zero'",
        "exact gradients; batches of 4 rows",
    ):
        assert part in remarks, remarks
    assert f"next: mobizo finetune {file} --data {file.parent / 'rows.csv'}" in out and "mobizo predict" in out
    assert manifest.inputs[0].shape == (4, 16), "as long as the longest row"


def test_the_recipe_without_gradients(folder: Path) -> None:
    line = ("compile", folder / "model", "--dry-run", "--json", "--classify", folder / "rows.csv")
    out, remarks = run(*line, "--answer-column", "class", "--rows", 4, "--zo-queries", 4, "--backend", "portable")
    found = json.loads(out)
    assert found["sites"] == ["lm_head"] and found["lanes"] == 8, found
    assert "rank 2 on lm_head, 4 directions; what comes before is kept for every row" in remarks


@pytest.mark.slow
def test_four_commands_without_an_option(program: tuple[Path, str, str], folder: Path) -> None:
    file, rows = program[0], folder / "rows.csv"
    line = ("finetune", file, "--data", rows, "--run", folder / "run", "--steps", 100, "--validation-share", 0)
    _, remarks = run(*line, "--learning-rate", 0.02, "--no-plot")
    assert "answers: 0, 1, account_access" in remarks
    found = json.loads(run("evaluate", file, "--data", rows, "--run", folder / "run", "--json")[0])
    before = json.loads(run("evaluate", file, "--data", rows, "--json")[0])
    assert found["accuracy"] >= 0.8 > before["accuracy"], (found, before)
    answer = json.loads(run("predict", file, "--run", folder / "run", "refund my money now", "--json")[0])["rows"][0]
    assert answer["predicted"] == "0" and answer["message"] == "refund my money now"
    untrained = json.loads(run("predict", file, "refund my money now", "--json")[0])["rows"][0]
    assert list(untrained["probabilities"]) == ["0", "1", "account_access"], "the prompt is in the program"


@pytest.mark.slow
def test_a_head_for_the_classes_of_the_table(folder: Path, tmp_path: Path) -> None:
    """It is drawn for as many classes as the rows have, trained through an adapter, and travels with that."""
    file, rows = tmp_path / "a.pte", folder / "rows.csv"
    line = ("compile", folder / "model", "-o", file, "--classify", rows, "--answer-column", "class", "--rows", 4)
    _, remarks = run(*line, "--task", "sequence-classification", "--backend", "portable")
    manifest = mobizo.load(file).manifest
    assert manifest.answers == ("0", "1", "account_access") and list(manifest.saved or ()) == ["score.weight"]
    assert manifest.sites[-1].fqn == "score" and manifest.rule["name"] == "adamw" and "prompt '{message}'" in remarks
    line = ("finetune", file, "--data", rows, "--run", tmp_path / "run", "--steps", 100, "--validation-share", 0)
    run(*line, "--learning-rate", 0.02, "--no-plot")
    found = json.loads(run("evaluate", file, "--data", rows, "--run", tmp_path / "run", "--json")[0])
    assert found["accuracy"] >= 0.8, found
    answer = json.loads(run("predict", file, "--run", tmp_path / "run", "refund my money now", "--json")[0])["rows"][0]
    assert answer["predicted"] == "0"


def test_words_for_classes(narrow_smollm2: Any) -> None:
    speller = Speller(narrow_smollm2[0])
    prompt = PromptConfig(template="{x}\nClass:").pieces({"x": "x"})

    def found(*names: str) -> dict[str, str]:
        words = label_words(names, speller, prompt)
        spelled = [tuple(speller.answer(prompt, word)) for word in words.values()]
        assert all(len(ids) == 1 for ids in spelled) and len(set(spelled)) == len(names) == len(words)
        return words

    assert found("question", "praise") == {"question": "question", "praise": "praise"}
    assert found("0", "1", "account_access") == {"0": "zero", "1": "one", "account_access": "account"}
    assert found("account_access", "account")["account"] == "account", "who has the name, keeps it"
    assert found("account_access", "account_closed") == {"account_access": "account", "account_closed": "closed"}
    assert found("xq_zzkt", "xq_vvkt") == {"xq_zzkt": "A", "xq_vvkt": "B"}
    assert len(found(*(f"qx{i:03}z" for i in range(20)))) == 20


def test_what_is_no_table_of_classes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before the model is loaded."""
    from mobizo_compiler.cli import compiling

    monkeypatch.setattr(compiling, "load_model", lambda *a, **b: pytest.fail("loaded before the cheap checks"))
    line = ("compile", folder / "model", "--dry-run", "--classify")

    def refused(rows: str, part: str, *options: Any) -> None:
        (tmp_path / "a.csv").write_text(rows)
        assert part in run(*line, tmp_path / "a.csv", *options, code=1)[1]

    refused("text,kind\na,b\n", "there is no column 'answer'")
    refused("text,answer\na,b\nc,b\n", "one answer")
    refused("text,answer\n" + "\n".join(f"t{i},a{i}" for i in range(9)), "9 different answers in 9 rows")
    refused("text,answer\na,b\nc,\n", "the answer is empty")
    refused("id,text,answer\n1,a b,b\n2,c d,d\n3,c e,b\n4,c f,d\n", '--template "Text: {text}\\nAnswer:"')
    both = "text,answer\na,b\nc,d\ne,b\nf,d\n"
    refused(both, "--classify says", "--loss", "causal-lm")
    refused(both, "--classify says", "--loss-choices", "b,d")
    refused(both, "leave out --label-words", "--task", "sequence-classification", "--label-words", "b=x,d=y")
    refused(both, "['b', 'd'] need words", "--label-words", "b=x")
    refused(both, "--adapter", "--adapter", folder)
    (tmp_path / "a.csv").write_text(both)
    assert "--classify" in run("compile", folder / "model", "--dry-run", "--answer-column", "kind", code=1)[1]


def test_long_rows_are_cut_and_counted(narrow_smollm2: Any) -> None:
    from mobizo_compiler.cli.classify import row_tokens

    speller = Speller(narrow_smollm2[0])
    rows = [[word] for word in ("a b", "a " * 300)]
    prompt = PromptConfig(template="{x}:")
    lengths = [prompt.pieces({"x": text}) for (text,) in rows]
    assert row_tokens(lengths, speller) == (MOST_TOKENS, 1)
    assert row_tokens(lengths[:1], speller) == (8, 0)
