"""What a person meets who uses the commands for the first time: help, refusals, remarks, interrupts."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import mobizo_compiler as mobizo
from mobizo_compiler import cli
from mobizo_compiler.cli import text as text_commands
from mobizo_compiler.cli.outcome import say_unchanged
from mobizo_compiler.text.hub import load_model

ROOT = Path(__file__).parent.parent
COMMANDS = [info.name for info in cli.app.registered_commands]
PROMPT = ("--template", "Message : {text}", "--answer-column", "tone")


def run(*arguments: object, code: int = 0, columns: int = 100) -> tuple[str, str]:
    """Stdout and stderr of a command in this process."""
    result = CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": str(columns)})
    assert result.exit_code == code, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [f"{word} day,happy\n{other} rain,sad" for word, other in zip(["good", "fine"] * 4, ["bad", "poor"] * 4)]  # noqa: B905
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    path.write_text("text,tone\n" + "\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize("columns", [60, *(pytest.param(width, marks=pytest.mark.slow) for width in (80, 120))])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_whole_names_and_the_common_options(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    group: Any = typer.main.get_command(cli.app)
    command, parent = group.commands[name], group.make_context("mobizo", [], resilient_parsing=True)
    text = command.get_help(command.make_context(name, [], parent=parent, resilient_parsing=True))
    assert columns / 2 < max(map(len, text.splitlines())) <= columns
    for option in (option for parameter in command.params for option in parameter.opts if option.startswith("--")):
        assert re.search(rf"(^|[\s,]){option}([\s,]|$)", text), f"{option} is not there as a whole"
    assert all(option in text for option in ("--json", "--quiet", "--config")), "every command has these"
    assert not re.search(r"--?[a-z-]+-\n", text), "a line ends within the name of an option"


def test_help_shows_defaults() -> None:
    text = " ".join(run("finetune", "--help", columns=80)[0].split())
    assert (
        "[default: 50]" in text
        and ".001 for the rule AdamW" in text
        and "[default: linear]" in text
        and "[default: utf-8]" in text
    )
    assert "[default: 8]" in " ".join(run("compile", "--help", columns=80)[0].split())


def test_inspect_takes_the_common_options(tiny_program: Path, tmp_path: Path) -> None:
    assert "backend" in run("inspect", tiny_program, "--quiet")[0]
    (tmp_path / "a.toml").write_text("[inspect]\njson = true\n")
    assert json.loads(run("inspect", tiny_program, "--config", tmp_path / "a.toml")[0])["backend"] == "xnnpack"


@pytest.fixture(scope="module")
def own_code(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a module of its own."""
    folder = tmp_path_factory.mktemp("own") / "model"
    load_model(str(tiny_model)).save_pretrained(folder)
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nclass OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    }
    config |= {"model_type": "own"}
    (folder / "configuration_own.py").write_text("")
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_beside_a_model_is_not_run_unasked(
    own_code: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("a question in the middle of a command"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    _, error = run("compile", own_code, "--dry-run", code=1)
    assert "brings code of its own" in error and "--trust-remote-code" in error
    found = load_model(str(own_code), trust_remote_code=True)
    assert type(found).__name__ == "OwnForCausalLM"


def test_a_model_without_its_head_is_refused_or_drawn_from_a_seed(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
    _, error = run("compile", tmp_path / "base", "--dry-run", code=1)
    assert "the weights lm_head.weight are not there" in error and "--init-missing" in error
    torch.manual_seed(5)
    first = load_model(str(tmp_path / "base"), init_missing=True).lm_head.weight
    torch.manual_seed(6)
    begun = torch.get_rng_state()
    second = load_model(str(tmp_path / "base"), init_missing=True).lm_head.weight
    assert torch.equal(first, second) and bool(first.any()) and torch.equal(begun, torch.get_rng_state())


def test_a_new_head_for_classes_is_said_and_the_same_each_time(tiny_model: Path) -> None:
    task = "sequence-classification"
    names: list[str] = []
    first = load_model(str(tiny_model), task, on_new=names.extend)
    torch.manual_seed(7)
    second = load_model(str(tiny_model), task)
    assert names == ["score.weight"] and torch.equal(first.score.weight, second.score.weight)
    _, remarks = run("compile", tiny_model, "--task", task, "--dry-run", "--rows", 2, "--tokens", 8)
    assert "has no score.weight" in remarks


def test_cheap_checks_come_first(
    tiny_program: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is refused is refused before a program or a model is loaded."""
    from mobizo_compiler.cli import compiling

    for module, name in ((text_commands, "load"), (compiling, "load_model")):
        monkeypatch.setattr(module, name, lambda *a, **b: pytest.fail("loaded before the cheap checks"))
    for command in ("finetune", "evaluate", "tune"):
        more = ("--run", tmp_path / "run") if command == "finetune" else ()
        assert "[MBZ801]" in run(command, tiny_program, "--data", tmp_path / "no.csv", *more, code=1)[1]
        assert "no column 'prompt'" in run(command, tiny_program, "--data", data, *more, code=1)[1]
    assert "no run in this folder" in run("evaluate", tiny_program, "--data", data, "--run", tmp_path / "x", code=1)[1]
    assert (
        "learning_rate is -1"
        in run(
            "finetune", tiny_program, "--data", data, "--run", tmp_path / "run", *PROMPT, "--learning-rate", -1, code=1
        )[1]
    )
    for options, part in (
        (["--rule", "newton"], "newton"),
        (["--loss", "mse"], "not trained with"),
        (["--loss", "masked-lm"], "not trained with"),
        (["--task", "sequence-classification", "--loss", "causal-lm"], "not trained with"),
        (["--backend", "tpu"], "[MBZ103]"),
        (["--examples", tmp_path / "no.txt"], "[MBZ801]"),
        (["--adapter", tmp_path], "[MBZ703]"),
    ):
        assert part in run("compile", "model", "--dry-run", *options, code=1)[1]
    assert not (tmp_path / "run").exists()


def test_a_mistyped_folder_is_found_out_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen3-bf16").mkdir()
    begun = time.monotonic()
    _, error = run("compile", "qwen3-bf17", "--dry-run", code=1)
    assert "there is no such folder, and" in error and "did you mean qwen3-bf16?" in error
    assert time.monotonic() - begun < 60, "a hub that does not answer is not asked again and again"


def test_a_moved_model_is_found_by_an_option(tiny_program: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    real = text_commands.load

    def moved(path: Path) -> Any:
        program = real(path)
        manifest = dataclasses.replace(program.manifest, base_model="/nowhere/model")
        return dataclasses.replace(program, manifest=manifest)

    monkeypatch.setattr(text_commands, "load", moved)
    _, error = run("evaluate", tiny_program, "--data", data, *PROMPT, code=1)
    assert "/nowhere/model" in error and "--tokenizer FOLDER" in error


def test_a_refused_run_leaves_nothing_and_a_run_is_for_one_process(
    tiny_program: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobizo_compiler.device.run import JOURNAL
    from mobizo_compiler.errors import ConfigError
    from mobizo_compiler.format.files import hold

    line = ("finetune", tiny_program, "--data", data, "--run", tmp_path / "run", *PROMPT, "--no-plot")

    def refuses(*arguments: Any, **options: Any) -> None:
        (tmp_path / "run").mkdir()
        raise ConfigError("refused late")

    with monkeypatch.context() as patch:
        patch.setattr(text_commands, "train", refuses)
        run(*line, code=1)
        assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    lock = hold(tmp_path / "run" / JOURNAL, "held", "wait")
    _, error = run(*line, code=1)
    assert "another process is training in this folder" in error and "--run" in error
    lock.release()


def test_empty_rows_are_counted_aloud(tiny_program: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,tone\ngood day,happy\n ,happy\n,sad\n")
    _, remarks = run("evaluate", tiny_program, "--data", tmp_path / "a.csv", *PROMPT)
    assert "2 prompts have no text" in remarks


def test_a_run_that_made_nothing_better_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    from mobizo_compiler.cli.app import Remarks
    from mobizo_compiler.device.run import RunSummary
    from mobizo_compiler.text.evaluation import Score
    from mobizo_compiler.text.training import Outcome, Validation

    def said(*losses: float) -> str:
        found = tuple(Validation(step * 10, loss, Score(4, loss)) for step, loss in enumerate(losses))
        best = min(found, key=lambda v: v.objective)
        outcome = Outcome(RunSummary(20, 0, (), ()), 20, found, best, "done")
        say_unchanged(Remarks(quiet=False), outcome)
        return capsys.readouterr().err

    assert "no validation was better" in said(1.0, 1.5, 1.2) and "mobizo tune" in said(1.0, 1.0)
    assert said(1.0, 0.9, 1.2) == "" and said(1.0) == ""


def test_the_time_left_follows_the_last_steps_and_the_validations(capsys: pytest.CaptureFixture[str]) -> None:
    from mobizo_compiler.cli.progress import TimeLeft

    left = TimeLeft(total=100, first_epoch=10, validations=lambda done: (100 - done) // 50)
    assert left.text(0) == "-:--:--"
    for step in range(1, 6):
        left.step(step, 60.0)  # rows are seen for the first time
    assert left.text(5) == "> 0:05:00", "what comes after the first epoch is not known yet"
    for step in range(6, 41):
        left.step(step, 60.0 if step <= 10 else 1.0)
    assert left.text(40) == "0:01:00"
    left.validation(20.0)
    assert left.text(40) == "0:01:20" and left.validations_cost(10) == 2.0


@pytest.mark.slow
def test_label_words_of_a_program(tiny_model: Path, tmp_path: Path) -> None:
    options = (
        "--rows",
        2,
        "--tokens",
        12,
        "--lora-target-modules",
        "v_proj",
        "--zo-queries",
        1,
        "--backend",
        "portable",
    )
    _, error = run("compile", tiny_model, "--dry-run", "--loss", "choice", "--loss-choices", "happy day,sad", code=1)
    assert "2 tokens" in error and '--label-words "happy day=WORD' in error
    run("compile", tiny_model, "-o", tmp_path / "a.pte", *options, "--label-words", "account_access=happy,1=sad")
    assert mobizo.load(tmp_path / "a.pte").manifest.answers == ("account_access", "1")
    (tmp_path / "a.csv").write_text("text,tone\ngood day,account_access\nbad rain,1\n")
    found = json.loads(run("evaluate", tmp_path / "a.pte", "--data", tmp_path / "a.csv", *PROMPT, "--json")[0])
    assert found["choices"] == ["account_access", "1"] and found["accuracy"] is not None


def test_a_rank_that_cannot_tell_the_answers_apart_is_said(tiny_model: Path) -> None:
    line = ("compile", tiny_model, "--dry-run", "--tokens", 8, "--lora-target-modules", "lm_head", "--lora-r", 1)
    choices = ("--loss", "choice", "--loss-choices")
    assert "--lora-r 2" in run(*line, *choices, "happy,sad,grim")[1]
    assert "cannot tell" not in run(*line, *choices, "happy,sad")[1]


def test_a_full_disk_is_one_line(tiny_program: Path, tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage(100))
        _, error = run("compile", tiny_model, "-o", tmp_path / "a.pte", code=1)
        assert "are free" in error and "[MBZ101]" in error and not (tmp_path / "a.pte").exists()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    _, error = run("inspect", tiny_program, "--graph", tmp_path / "a.svg", code=1)
    assert error.strip() == f"{tmp_path / 'a.svg'}: No space left on device"
    with pytest.raises(OSError, match="No space left"):
        mobizo.Session(tiny_program).export_adapter(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_quiet_is_quiet(mobizo_command: Any, tiny_program: Path, data: Path) -> None:
    """Neither lines of the engine about the processor, nor what torchao was not built with."""
    done = mobizo_command("evaluate", tiny_program, "--data", data, *PROMPT, "--quiet")
    assert done.returncode == 0 and done.stderr == ""
    code = "import mobizo_compiler; import sys; mobizo_compiler.Session(sys.argv[1]); sys.stderr.write('done')"
    done = subprocess.run([sys.executable, "-c", code, tiny_program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "Failed to load" not in done.stderr and ".cpp" not in done.stderr
    assert done.stderr.endswith("done")


@pytest.mark.slow
def test_what_is_no_line_of_the_engine_passes() -> None:
    code = (
        "import os, sys\nfrom mobizo_compiler.backends.executorch.engine_start import without_lines\n"
        "with without_lines():\n"
        "    os.write(2, b'[cpuinfo_utils.cpp:71] Reading\\n[other.cpp:1] stays\\n')\n"
        "    os.write(2, b'I 00 executorch:threadpool.cpp:1] no\\n')\n"
        "    sys.stderr.write('[also stays')\nsys.stderr.write(', and so does this')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "[other.cpp:1] stays\n[also stays, and so does this"


@pytest.mark.parametrize("seconds", [1.0, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.1, 3.0))])
def test_an_interrupt_in_the_first_seconds_is_no_traceback(seconds: float, tiny_program: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # What Python does before it runs any code of ours is not ours to handle.
    code = "import mobizo_compiler.__main__ as command; print('begun', flush=True); command.main()"
    line = [sys.executable, "-c", code, "inspect", str(tiny_program)]
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert "Traceback" not in error
    assert (process.returncode, error) in ((130, "interrupted\n"), (0, error)), error


def test_experts_are_computed_for_each_row(tmp_path: Path) -> None:
    """As they are by default, they sort the tokens of all rows together, which no program may."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path / "mixtral")
    out, _ = run("compile", tmp_path / "mixtral", "--dry-run", "--tokens", 8, "--zo-queries", 1)
    assert "adapters" in out


@pytest.mark.parametrize("targets", ["v_proj", "score"])
def test_a_new_head_travels_with_the_adapter(targets: str, tiny_model: Path, words: Any, tmp_path: Path) -> None:
    """peft loads it onto a base model that has drawn another head, and answers as the session does."""
    import peft
    from transformers import AutoModelForSequenceClassification

    from mobizo_compiler import LoraConfig, SequenceClassificationLoss, ZOConfig
    from mobizo_compiler.errors import AdapterError, ConfigError

    new: list[str] = []
    model = load_model(str(tiny_model), "sequence-classification", on_new=new.extend)
    ids = words(["good day fine work", "the bad rain a"], return_tensors="pt").input_ids
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    lora, zo = LoraConfig(r=3, target_modules=("v_proj", *{targets})), ZOConfig(queries=2)
    loss = SequenceClassificationLoss()
    program = mobizo.compile(model, inputs, lora, zo, loss, backend="eager", new_weights=new)
    session = mobizo.Session(program)
    for seed in range(3):
        session.train_step(inputs, torch.tensor([0, 1]), seed=seed, learning_rate=0.5)
    session.export_adapter(tmp_path / "adapter")
    torch.manual_seed(99)
    other = AutoModelForSequenceClassification.from_pretrained(tiny_model, dtype=torch.float32)
    assert not torch.equal(other.score.weight, model.score.weight), "it has another head"
    loaded = peft.PeftModel.from_pretrained(other, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = session.evaluate(inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"brings score\.weight"):
        mobizo.compile(model, inputs, None, zo, loss, backend="eager", adapter=tmp_path / "adapter")
    again = mobizo.Session(program)
    if targets == "v_proj":
        again.import_adapter(tmp_path / "adapter")
        assert torch.equal(again.state(), session.state())
    else:
        with pytest.raises(AdapterError, match="cannot be taken apart"):
            again.import_adapter(tmp_path / "adapter")


def test_example_inputs_of_a_model(tiny_model: Path) -> None:
    """Token types for classifiers of pairs; cells as text; ids that the model has."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from mobizo_compiler.cli.model_inputs import example_inputs
    from mobizo_compiler.text.prompts import Piece
    from mobizo_compiler.text.speller import Speller

    words = AutoTokenizer.from_pretrained(tiny_model)
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    bert = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4))
    made = example_inputs(bert, "sequence-classification", None, [], rows=2, tokens=8)
    assert list(made) == ["input_ids", "attention_mask", "token_type_ids"] and not made["token_type_ids"].any()
    llama = load_model(str(tiny_model))
    texts = [[Piece("good </s> day", False), Piece("</s>", True)]]
    words.add_special_tokens({"pad_token": "[new]"})
    filled = example_inputs(llama, "causal-lm", Speller(words), texts, 1, 12)
    assert filled["input_ids"].tolist()[0].count(words.eos_token_id) == 1, "cells are text, templates are not"
    assert int(filled["input_ids"].max()) < 22, "padding that the model has not is another token"
    assert list(example_inputs(llama, "causal-lm", None, [], 2, 8)) == ["input_ids", "attention_mask"]
