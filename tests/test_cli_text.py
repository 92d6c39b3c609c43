"""`mobizo finetune`, `evaluate`, `generate`, `import-adapter`, as a new user runs them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import mobizo_compiler as mobizo
from mobizo_compiler import cli
from mobizo_compiler.text.data import TextData
from mobizo_compiler.text.evaluation import score
from mobizo_compiler.text.generation import generate
from mobizo_compiler.text.prompts import PromptConfig, samples
from mobizo_compiler.text.rows import read_rows
from mobizo_compiler.text.training import restore_best

pytestmark = pytest.mark.xdist_group("cli")  # one process, so that its programs are made once

ROOT = Path(__file__).parent.parent
HAPPY, SAD = ("great", "good", "fine", "lovely"), ("awful", "bad", "poor", "grim")
PROMPT = ("--template", r"Message :\n{text}", "--answer-column", "tone")
FAST = ("--learning-rate", "0.03", "--schedule", "constant", "--validation-share", "0.25", "--validate-every", "10")


def run(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "100"}, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is to be learnt: the tone is in the last word."""
    path = tmp_path_factory.mktemp("data") / "messages.csv"
    rows = [f"{thing} {word},{tone}" for words, tone in ((HAPPY, "happy"), (SAD, "sad")) for word in words
            for thing in ("day", "food", "rain", "work")]  # fmt: skip
    path.write_text("text,tone\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def trained(tiny_program: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of 40 steps, and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "first"
    text = run("finetune", tiny_program, "--data", data, "--run", folder, *PROMPT, *FAST, "--steps", 40, "--json")
    return folder, json.loads(text)


def state(program: Path, folder: Path) -> torch.Tensor:
    session = mobizo.Session(program)
    session.restore(folder)
    return session.state()


def test_a_run_learns_and_says_so(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, found = trained
    assert (found["ended"], found["steps"], found["resumed_at"]) == ("done", 40, 0)
    assert [v["step"] for v in found["validations"]] == [0, 10, 20, 30, 40]
    first, last = found["validations"][0]["score"], found["validations"][-1]["score"]
    assert first["choice_loss"] > 0.6 and first["accuracy"] < 0.75, "a random model does not know the tones"
    assert last["choice_loss"] < 0.5 and last["accuracy"] >= 0.75, last
    record = json.loads((folder / "run.json").read_text())
    assert len(record["summary"]["losses"]) == 40 and record["settings"]["learning_rate"] == 0.03
    assert record["data"]["prompt"]["choices"] == ["happy", "sad"]
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_gone_on_with_exactly(
    trained: tuple[Path, dict[str, Any]], tiny_program: Path, data: Path, tmp_path: Path
) -> None:
    line = ("finetune", tiny_program, "--data", data, "--run", tmp_path / "run", *PROMPT, *FAST, "--no-plot")
    run(*line, "--steps", 15, "--quiet")
    result = CliRunner().invoke(cli.app, [*map(str, line), "--steps", "40", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["resumed_at"] == 15
    assert "going on after step 15 of 40" in result.stderr and "steps was 15 before, and is 40" in result.stderr
    assert torch.equal(state(tiny_program, tmp_path / "run"), state(tiny_program, trained[0]))
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    steps = [v["step"] for v in found["validations"]]
    assert steps == [0, 10, 15, 20, 30, 40], "15 was the end before"
    expected = {v["step"]: v["objective"] for v in trained[1]["validations"]}
    for v in found["validations"]:
        assert v["objective"] == expected.get(v["step"], v["objective"])
    assert json.loads(run(*line, "--steps", 40, "--json"))["resumed_at"] == 40, "nothing is left to do"


@pytest.mark.slow
def test_an_exact_run_that_was_killed_goes_on(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """The state is saved once a minute, and what came after it is made again from the rows."""
    program = tmp_path / "exact.pte"
    sizes = ("--rows", "2", "--tokens", "12", "--lora-r", "3", "--lora-target-modules", "v_proj,down_proj")
    run("compile", tiny_model, "-o", program, *sizes, "--loss", "choice", "--loss-choices", "happy,sad",
        "--zo-queries", 1, "--zo-estimator", "exact")  # fmt: skip
    line = ("finetune", program, "--data", data, *PROMPT, *FAST, "--steps", 60, "--no-plot", "--json")
    whole = json.loads(run(*line, "--run", tmp_path / "whole"))
    folder, journal = tmp_path / "killed", tmp_path / "killed" / "journal"
    command = [sys.executable, "-m", "mobizo_compiler", *map(str, line), "--run", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not journal.exists() or journal.stat().st_size < 64 + 12 * 28:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        process.kill()
    found = json.loads(run(*line, "--run", folder))
    assert 12 <= found["resumed_at"] < 60 and found["steps"] == 60
    assert torch.equal(state(program, folder), state(program, tmp_path / "whole"))
    assert [v["objective"] for v in found["validations"]] == [v["objective"] for v in whole["validations"]]


@pytest.mark.slow
def test_two_ranks_learn_together(tiny_program: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    line = (tiny_program, "--data", data, "--run", folder, *PROMPT, *FAST, "--steps", 40, "--json")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = [*map(str, (*torchrun, "-m", "--", "mobizo_compiler.distributed", *line))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(done.stdout)  # rank 1 says nothing
    assert found["steps"] == 40 and found["validations"][-1]["score"]["accuracy"] >= 0.75
    assert done.stderr.count("2 ranks share the rows of every step") == 1
    evaluated = json.loads(run("evaluate", tiny_program, "--data", data, "--run", folder, "--json"))
    assert evaluated["accuracy"] >= 0.75 and state(tiny_program, folder).any()
    output = run("finetune", *line, "--distributed", code=1)
    assert "torchrun" in output


def test_another_run_is_refused(trained: tuple[Path, dict[str, Any]], tiny_program: Path, data: Path) -> None:
    line = ("finetune", tiny_program, "--data", data, "--run", trained[0], *FAST, "--steps", 41)
    before = state(tiny_program, trained[0])
    output = run(*line, *PROMPT, "--seed", 1, code=1)
    assert "[MBZ704]" in output
    assert "[MBZ704]" in run(*line, "--template", "Tone : {text}", "--answer-column", "tone", code=1)
    assert "another seed" not in output or "0 before, 1 now" in output
    assert torch.equal(state(tiny_program, trained[0]), before)


def test_early_stopping_keeps_the_best(tiny_program: Path, data: Path, tmp_path: Path) -> None:
    """With a learning rate far too high the loss only rises."""
    line = ("finetune", tiny_program, "--data", data, "--run", tmp_path / "run", *PROMPT, "--validation-share", "0.25")
    line = (*line, "--learning-rate", "30", "--steps", "60", "--validate-every", "5", "--patience", "2", "--no-plot")
    found = json.loads(run(*line, "--json"))
    assert found["ended"] == "stopped early" and found["steps"] < 60
    best = found["best_step"]
    assert found["steps"] == best + 10, "two validations after the best one"
    session = mobizo.Session(tiny_program)
    assert restore_best(session, tmp_path / "run") == best
    assert bool(session.state().any()) == (best > 0)
    assert json.loads(run(*line, "--json"))["steps"] == found["steps"], "it stays stopped"
    text = run("finetune", *line[1:], "--quiet")
    assert text == ""
    some = ("evaluate", tiny_program, "--data", data, "--run", tmp_path / "run", "--json")
    assert json.loads(run(*some))["steps"] == found["steps"]
    assert json.loads(run(*some, "--best"))["steps"] == best


def test_evaluate_is_what_a_plain_loop_computes(
    trained: tuple[Path, dict[str, Any]], tiny_program: Path, tiny_model: Path, data: Path
) -> None:
    """Against transformers with the exported adapter merged into it, one row at a time, without padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = json.loads(run("evaluate", tiny_program, "--data", data, "--run", trained[0], "--json"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    session = mobizo.Session(tiny_program)
    session.restore(trained[0])
    session.merge_into(model)
    answers = tokenizer.convert_tokens_to_ids(["happy", "sad"])
    losses, choice_losses, margins, classes = [], [], [], []
    for line in data.read_text().splitlines()[1:]:
        text, tone = line.split(",")
        ids = tokenizer(f"Message :\n{text}", add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0, -1].double()
        right = ["happy", "sad"].index(tone)
        losses.append(-float(logits.log_softmax(0)[answers[right]]))
        choice_losses.append(-float(logits[answers].log_softmax(0)[right]))
        margins.append(float(logits[answers[1]] - logits[answers[0]]))
        classes.append(right)
    assert found["rows"] == 32
    assert found["loss"] == pytest.approx(sum(losses) / 32, abs=1e-4)
    assert found["choice_loss"] == pytest.approx(sum(choice_losses) / 32, abs=1e-4)
    pairs = [(a > b) + 0.5 * (a == b) for a, i in zip(margins, classes, strict=True) if i
             for b, j in zip(margins, classes, strict=True) if not j]  # fmt: skip
    assert found["auc"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-9)
    assert found["accuracy"] == sum((m > 0) == bool(c) for m, c in zip(margins, classes, strict=True)) / 32
    untrained = json.loads(run("evaluate", tiny_program, "--data", data, *PROMPT, "--json"))
    assert untrained["steps"] == 0 and untrained["choice_loss"] > found["choice_loss"]
    assert "accuracy" in run("evaluate", tiny_program, "--data", data, "--run", trained[0], "--quiet")


def test_choices_of_several_tokens(tiny_program: Path, words: Any, tmp_path: Path) -> None:
    """The probability of a choice is the product over its tokens; the same numbers as from whole rows of text."""
    import dataclasses

    session = mobizo.Session(tiny_program)
    manifest = session.program.manifest
    free = dataclasses.replace(manifest, max_labels=None, labels=dataclasses.replace(manifest.labels, choices=None))
    (tmp_path / "a.jsonl").write_text('{"text": "good day", "tone": "happy"}\n{"text": "bad", "tone": "sad sad"}\n')
    prompt = PromptConfig(template="{text} :", answer_column="tone", choices=("happy", "sad sad"), end_answers=False)
    data = TextData.encode(samples(read_rows(tmp_path / "a.jsonl"), prompt), free, words, prompt)
    found = score(session, data)
    assert found is not None and found.choice_loss is not None
    expected = []
    for text, right in (("good day :", 0), ("bad :", 1)):
        logs = []
        for answer in ("happy", "sad sad"):
            start, ids = len(words(text).input_ids), words(f"{text} {answer}").input_ids
            logits = session.evaluate(data.inputs([ids + [0] * (12 - len(ids))] * 2)).logits[0]
            logs.append(sum(logits[t - 1].double().log_softmax(0)[ids[t]] for t in range(start, len(ids))))
        expected.append(-float(torch.stack(logs).log_softmax(0)[right]))
    assert found.choice_loss == pytest.approx(sum(expected) / 2, abs=1e-3), "padding is masked, so it may be seen here"


def test_generate_goes_on_until_it_ends(
    trained: tuple[Path, dict[str, Any]], tiny_program: Path, tiny_model: Path, words: Any
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    session = mobizo.Session(tiny_program)
    session.restore(trained[0])
    session.merge_into(model)
    ids = words("Message : good day", return_tensors="pt").input_ids
    expected = []
    while len(ids[0]) < 12:
        with torch.no_grad():
            token = int(model(ids).logits[0, -1].argmax())
        if token == words.eos_token_id:
            break
        expected.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    line = ("generate", tiny_program, "Message : good day", "--run", trained[0])
    found = json.loads(run(*line, "--json"))
    assert found["tokens"] == expected and found["stopped"] == ("end" if len(expected) < 8 else "length")
    assert run(*line).strip() == found["text"].strip() == words.decode(expected).strip()
    two = json.loads(run(*line, "--max-new-tokens", 1, "--json"))
    assert two["tokens"] == expected[:1] and two["stopped"] == ("limit" if expected else "end")
    assert "13 tokens" in run("generate", tiny_program, "day " * 13, code=1)


def test_generation_ends_at_the_end_of_text(tiny_program: Path, words: Any) -> None:
    """Whatever token comes first, declared the end of text, ends it."""
    session = mobizo.Session(tiny_program)
    first = generate(session, words, "good day", 1).tokens[0]

    class Other:
        """The tokenizer with another end of text."""

        eos_token_id = first

        def __getattr__(self, name: str) -> Any:
            return getattr(words, name)

        def __call__(self, *arguments: Any, **more: Any) -> Any:
            return words(*arguments, **more)

    assert generate(session, Other(), "good day", 5).stopped == "end"


def test_tune_prints_options_for_finetune(tiny_program: Path, data: Path) -> None:
    found = run("tune", tiny_program, "--data", data, *PROMPT, "--steps", 400)
    assert found.startswith("--eps ") and " --learning-rate " in found
    described = json.loads(run("tune", tiny_program, "--data", data, *PROMPT, "--steps", 400, "--eps", 0.02, "--json"))
    assert described["eps"] == 0.02 and described["steps"] <= 40 and len(described["rate_trials"]) == 5
    assert "a search pays from" in run("tune", tiny_program, "--data", data, *PROMPT, "--steps", 10, code=1)


def test_an_interrupt_leaves_a_run_to_go_on_with(tiny_program: Path, data: Path, tmp_path: Path) -> None:
    """Ctrl-C in a process of its own: exit code 130, a whole journal, and the state of an uninterrupted run."""
    line = ["finetune", tiny_program, "--data", data, "--run", tmp_path / "run", *PROMPT, *FAST, "--no-plot"]
    whole = [sys.executable, "-m", "mobizo_compiler", *map(str, line), "--steps", "100000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(whole, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        journal = tmp_path / "run" / "journal"
        deadline = time.monotonic() + 300
        while not journal.exists() or journal.stat().st_size < 64 + 3 * 40:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, remarks = process.communicate(timeout=300)
    assert process.returncode == 130, remarks
    assert "the same command goes on from there" in remarks and "Traceback" not in remarks
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    done = record["summary"]["steps"]
    assert record["summary"]["ended"] == "interrupted" and done >= 3
    assert journal.stat().st_size == 64 + done * 40, "24 + 4q bytes a step"
    run(*line, "--steps", done + 5, "--quiet")
    run(*line[:5], tmp_path / "other", *line[6:], "--steps", done + 5, "--quiet")
    assert torch.equal(state(tiny_program, tmp_path / "run"), state(tiny_program, tmp_path / "other"))


def test_minutes_leave_a_run_to_go_on_with(tiny_program: Path, data: Path, tmp_path: Path) -> None:
    line = ("finetune", tiny_program, "--data", data, "--run", tmp_path / "run", *PROMPT, *FAST, "--steps", 10)
    result = CliRunner().invoke(cli.app, [*map(str, line), "--minutes", "1e-6", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["ended"], found["limit"], found["steps"]) == ("limit", "1e-06 minutes are over", 0)
    assert [v["step"] for v in found["validations"]] == [0], "or no call as short as that would get on"
    said = " ".join(result.stderr.split())
    assert "1e-06 minutes are over: stopped after step 0 of 10; the same command goes on from there" in said
    assert json.loads(run(*line, "--no-plot", "--json"))["ended"] == "done"


def test_an_adapter_goes_out_and_comes_back(
    trained: tuple[Path, dict[str, Any]], tiny_program: Path, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    run("export-adapter", tiny_program, trained[0], tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model), "as it was compiled"
    run("import-adapter", tiny_program, tmp_path / "adapter", tmp_path / "run")
    assert torch.equal(state(tiny_program, tmp_path / "run"), state(tiny_program, trained[0]))
    again = run("import-adapter", tiny_program, tmp_path / "adapter", tmp_path / "run", code=1)
    assert "[MBZ701]" in again and "holds a run already" in again
    line = ("finetune", tiny_program, "--data", data, "--run", tmp_path / "run", *PROMPT, *FAST, "--steps", 2)
    found = json.loads(run(*line, "--json", "--no-plot"))
    assert found["validations"][0]["objective"] == trained[1]["validations"][-1]["objective"], "it starts from there"
    run("export-adapter", tiny_program, tmp_path / "run", tmp_path / "best", "--best")
    assert load_file(tmp_path / "best" / "adapter_model.safetensors").keys()


def test_data_that_cannot_be_used(tiny_program: Path, tmp_path: Path) -> None:
    def refused(text: bytes, part: str, *options: str, name: str = "a.csv") -> None:
        (tmp_path / name).write_bytes(text)
        line = ("finetune", tiny_program, "--data", tmp_path / name, "--run", tmp_path / "run", *PROMPT, *options)
        output = run(*line, code=1)
        assert part in output and "Traceback" not in output, output
        assert not (tmp_path / "run").exists(), "nothing is written for data that cannot be used"

    refused(b"", "no rows")
    refused(b"words,tone\na,happy\n", "no column 'text'")
    refused(b"text,tone\ngood day\n", "1 cells, the header has 2")
    refused(b"text,tone\n\xff\xfe,happy\n", "is not UTF-8")
    refused(b"text,tone\ngood,happy\nbad,\n", "line 3")
    refused(b"text,tone\ngood,grim\n", "none of ['happy', 'sad']", "--validation-share", "0")
    refused(b"text,tone\ngood,happy\n", "cannot be split")
    refused(b"text,tone\ngood,happy\n", "[MBZ101]", "--steps", "0")
    refused(b"text,tone\ngood,happy\n", "schedule is 'sine'", "--schedule", "sine")
    refused(b"text,tone\ngood,happy\nbad,sad\n", "[MBZ803]", "--tokenizer", str(tmp_path))
    assert "[MBZ801]" in run("finetune", tiny_program, "--data", tmp_path / "no", "--run", tmp_path / "run", code=1)
    assert "[MBZ701]" in run("evaluate", tiny_program, "--data", tmp_path / "a.csv", "--run", tmp_path / "x", code=1)
    assert "--best is about a run" in run("evaluate", tiny_program, "--data", tmp_path / "a.csv", "--best", code=1)
    assert "--data" in run("finetune", tiny_program, "--run", tmp_path / "run", code=2)


def test_cut_prompts_are_counted_aloud(tiny_program: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,tone\n" + "good " * 9 + "day,happy\nbad,sad\ngood,happy\n")
    line = ("evaluate", tiny_program, "--data", tmp_path / "a.csv", *PROMPT)
    result = CliRunner().invoke(cli.app, [*map(str, line), "--json"])
    assert "1 of 3 prompts are too long and lose their first tokens" in result.stderr
    assert json.loads(result.stdout)["rows"] == 3
    assert "too long" not in CliRunner().invoke(cli.app, [*map(str, line), "--quiet"]).stderr


def test_without_matplotlib_there_is_no_plot(
    trained: tuple[Path, dict[str, Any]], tiny_program: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run" / "plot.png").unlink()
    line = ("finetune", tiny_program, "--data", data, "--run", tmp_path / "run", *PROMPT, *FAST, "--steps", 40)
    result = CliRunner().invoke(cli.app, list(map(str, line)))
    assert result.exit_code == 0 and "no plot.png" in result.stderr and "pip install matplotlib" in result.stderr
    assert not (tmp_path / "run" / "plot.png").exists()
    assert "[MBZ802]" in run("inspect", tiny_program, "--graph", tmp_path / "a.svg", code=1)


def test_graph_and_history_of_inspect(tiny_program: Path, tmp_path: Path) -> None:
    text = run("inspect", tiny_program, "--graph", tmp_path / "a.svg")
    assert "DuplicateLanes" in text and "model.layers.0" in text and "outside of delegates" in text
    run("inspect", tiny_program, "--graph", tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn.startswith("<?xml") and drawn == (tmp_path / "b.svg").read_text(), "the same file each time"
    run("inspect", tiny_program, "--graph", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "[MBZ101]" in run("inspect", tiny_program, "--graph", tmp_path / "a.pdf", code=1)
    found = json.loads(run("inspect", tiny_program, "--json"))
    assert found["history"]["replay"][0] == "empty_program()" and len(found["outline"]) >= 4


@pytest.mark.slow
def test_a_private_run_says_what_it_spends(tiny_model: Path, data: Path, compile_options: Any, tmp_path: Path) -> None:
    file, folder = tmp_path / "program.pte", tmp_path / "run"
    run("compile", tiny_model, "-o", file, *compile_options, "--zo-row-losses", "--quiet")
    command = ("finetune", file, "--data", data, "--run", folder, *PROMPT, *FAST, "--privacy-row-clip", 0.5)
    command += ("--privacy-sample-rows", 4)
    shown = run(*command, "--privacy-epsilon", 20, "--epochs", 2)
    assert "epsilon 19.9" in shown or "epsilon 20.0" in shown, shown
    kept = json.loads((folder / "privacy.json").read_text())
    assert kept["steps"] == 12 and kept["rows"] == 24 and 19 < kept["epsilon_spent"] <= 20
    record = json.loads((folder / "run.json").read_text())
    assert record["summary"]["losses"] == [None] * 12 and (folder / "plot.png").exists()
    more = json.loads(run(*command, "--privacy-epsilon", 20, "--steps", 30, "--json"))
    assert (more["ended"], more["steps"]) == ("budget", 12) and more["limit"] == "the budget of epsilon 20 is spent"
    assert more["epsilon_spent"] == kept["epsilon_spent"]
    said = run(*command, "--privacy-epsilon", 3, "--steps", 30, code=1)
    assert "another epsilon (20.0 before, 3.0 now)" in said
    assert "the run is private" in run(*command[:-4], "--steps", 30, code=1)
