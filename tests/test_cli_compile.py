"""`mobizo compile`: options and where they come from, what a dry run says, and the same bytes from the same input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import mobizo_compiler as mobizo
from mobizo_compiler import cli
from mobizo_compiler.cli.compiling import SECTIONS
from mobizo_compiler.cli.options import read_config
from mobizo_compiler.errors import ConfigError

pytestmark = pytest.mark.xdist_group("cli")  # one process, so that its programs are made once


def run(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "160"}, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(
    tiny_model: Path, tiny_program: Path, mobizo_command: Any, compile_options: tuple[str, ...], tmp_path: Path
) -> None:
    """In another process, where sets have another order."""
    again = mobizo_command("compile", tiny_model, "-o", tmp_path / "again.pte", *compile_options, "--json", seed=1)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.pte").read_bytes() == tiny_program.read_bytes()
    found = json.loads(again.stdout)
    assert found["lanes"] == 8 and found["file_bytes"] == tiny_program.stat().st_size
    assert "Traceback" not in again.stderr and "capture" in again.stderr


def test_what_was_asked_for_is_in_the_program(tiny_program: Path, tiny_model: Path) -> None:
    manifest = mobizo.load(tiny_program).manifest
    assert (manifest.lora.r, manifest.zo.queries, manifest.backend) == (3, 4, "xnnpack")
    assert [spec.shape for spec in manifest.inputs] == [(2, 12), (2, 12)]
    assert manifest.base_model == str(tiny_model) and manifest.max_labels == 1
    assert manifest.history["train_step"][0] == "capture()"
    assert any(step.startswith("DuplicateLanes(lanes=8") for step in manifest.history["train_step"])
    blocks = {block.name: block for block in manifest.outline}
    layer = blocks["model.layers.0"]
    assert layer.kind == "LlamaDecoderLayer" and layer.lanes == "some"
    assert layer.adapters == {"v_proj": 1, "down_proj": 1}
    # q, o: 32 x 32; k, v: 32 x 16; gate, up, down: 32 x 48, for 2 x 12 tokens; attention: 2 x 12 x 12 x 32 each.
    weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert layer.multiply_adds == 24 * weights + 2 * 2 * 12 * 12 * 32
    assert layer.parameter_bytes == 4 * (weights + 2 * 32)
    assert (blocks["lm_head"].lanes, blocks["model.embed_tokens"].lanes) == ("all", "none")


def test_a_dry_run_writes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    before = sorted(tiny_model.parent.iterdir())
    options = ["--tokens", "6", "--zo-queries", "1", "--graph", tmp_path / "graph.svg", "--dump-dir", tmp_path / "dump"]
    options += ["--output", tmp_path / "program.pte", "--cache-dir", tmp_path / "cache"]
    found = json.loads(run("compile", tiny_model, "--dry-run", "--json", "--quiet", *options))
    assert found["file"] is None and found["sites"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    ]
    assert found["parameters"] == 8 * (32 + 16)
    needs = found["estimate"]
    assert needs["state_bytes"] == 4 * found["parameters"]
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 3 * 32
    assert needs["weight_bytes"] > 4 * (layer + 2 * 22 * 32)
    assert needs["step_multiply_adds"] > needs["inference_multiply_adds"] > 0
    assert needs["step_activation_bytes"] > needs["inference_activation_bytes"] > 6 * 2 * 22 * 4, "the logits at least"
    assert not list(tmp_path.iterdir()) and sorted(tiny_model.parent.iterdir()) == before


def test_sequence_classification_and_a_file_of_options(tiny_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "options.toml"
    config.write_text(
        f'[compile]\nmodel = "{tiny_model}"\ntask = "sequence-classification"\nbackend = "portable"\n'
        'tokens = 5\nrows = 3\n[compile.lora]\nr = 2\ntarget_modules = ["q_proj"]\n[compile.zo]\nqueries = 7\n'
        "[finetune]\nsteps = 3\n"
    )
    text = run("compile", "--config", config, "--zo-queries", "1", "--dry-run", "--json", "--quiet")
    found = json.loads(text)
    assert found["loss"] == {"name": "sequence-classification", "ignore_index": -100} and found["backend"] == "portable"
    assert found["lanes"] == 2, "the command line goes before the file"
    assert found["sites"] == ["model.layers.0.self_attn.q_proj"] and found["parameters"] == 2 * 32


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("a.toml", "tokns = 3\n", "did you mean 'tokens'"),
        ("a.toml", "[lora]\nrr = 3\n", "no option 'rr' in [lora]"),
        ("a.toml", "[zoo]\nqueries = 3\n", "no option 'zoo'"),
        ("a.toml", "tokens = \n", "cannot be read"),
        ("a.yaml", "tokens: [\n", "cannot be read"),
        ("a.yaml", "- tokens\n", "by name"),
        ("a.ini", "", "is .toml"),
        ("a.yaml", "compile: {tokens: 3}\nrows: 2\n", "beside tables of commands"),
        ("a.toml", "zo_queries = 1\n[zo]\nqueries = 2\n", "there twice"),
    ],
)
def test_unknown_options_of_a_file_are_errors(tmp_path: Path, name: str, text: str, part: str) -> None:
    (tmp_path / name).write_text(text)
    output = run("compile", "model", "--config", tmp_path / name, code=1)
    assert part in output and "[MBZ101]" in output


def test_yaml_and_toml_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('tokens = 4\nquantization = "int8"\n[zo]\nqueries = 2\n[lora]\nlora-alpha = 8.0\n')
    (tmp_path / "a.yml").write_text(
        "tokens: 4\nquantization: {recipe: int8}\nzo: {queries: 2}\nlora: {lora_alpha: 8.0}\n"
    )
    names = {"tokens", "quantization", "zo_queries", "lora_alpha"}
    found = [read_config(tmp_path / name, "compile", names, SECTIONS) for name in ("a.toml", "a.yml")]
    assert found[0] == found[1] == {"tokens": "4", "quantization": "int8", "zo_queries": "2", "lora_alpha": "8.0"}


def test_every_field_of_the_configurations_is_an_option() -> None:
    text = run("compile", "--help")
    for option in ("--lora-r", "--lora-target-modules", "--zo-queries", "--zo-noise", "--quantization-group-size"):
        assert option in text
    assert "two-sided" in text, "the help says what the dataclass says"


def test_wrong_usage(tiny_model: Path, tmp_path: Path) -> None:
    assert "--output" in run("compile", tiny_model, code=2)
    assert "Missing argument" in run("compile", code=2)
    for options, part in [
        (["--lora-r", "0"], "[MBZ101] LoraConfig.r is 0"),
        (["--zo-noise", "pink"], "ZOConfig.noise is 'pink'"),
        (["--quantization", "int3"], "[MBZ101] QuantizationConfig.recipe"),
        (["--quantization-group-size", "64"], "no recipe"),
        (["--loss", "hinge"], "there is no loss 'hinge'"),
        (["--loss", "choice"], "goes with --loss-choices"),
        (["--loss", "mse"], "not trained with"),
        (["--rule", "newton"], "there is no update rule 'newton'"),
        (["--estimator", "newton"], "there is no estimator 'newton'"),
        (["--rule-options", '{"beta": 1}'], "SGD has no field 'beta'"),
        (["--rule", "sign", "--rule-beta", "0.5", "--rule-options", '{"beta": 0.5}'], "is given by another option"),
        (["--estimator-options", '{"factor": 1}'], "TwoSided has no field 'factor'"),
        (["--loss", "choice", "--loss-choices", "happy,grim work"], "2 tokens"),
        (["--task", "vision"], "task is 'vision'"),
        (["--backend", "tpu"], "[MBZ103]"),
        (["--tokens", "9", "--max-tokens", "8"], "more than --max-tokens"),
        (["--graph", "a.pdf"], "ends in .png or .svg"),
        (["--template", "{text}"], "--examples"),
        (["--examples", str(tmp_path / "no.txt")], "[MBZ801]"),
    ]:
        output = run("compile", tiny_model, "--dry-run", *options, code=1)
        assert part in output and "Traceback" not in output, output
    assert "is not a integer" in run("compile", tiny_model, "--lora-r", "many", code=2)
    assert "[MBZ803]" in run("compile", tmp_path / "nothing", "--dry-run", code=1)
    (tmp_path / "empty").mkdir()
    assert "[MBZ803]" in run("compile", tmp_path / "empty", "--dry-run", code=1)
    assert "no such folder" in run("compile", tiny_model, "-o", tmp_path / "no" / "a.pte", code=1)


def test_transformers_is_optional(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    output = run("compile", tiny_model, "--dry-run", code=1)
    assert "[MBZ802]" in output and "pip install transformers" in output


def test_examples_are_what_quantization_measures(tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The example inputs that reach compile are the words of the file, and no remark is made then."""
    from mobizo_compiler.cli import compiling

    seen: list[Any] = []

    def stop(model: Any, inputs: Any, *rest: Any, **more: Any) -> None:
        seen.append(inputs)
        raise ConfigError("enough")

    monkeypatch.setattr(compiling, "compile", stop)
    (tmp_path / "a.csv").write_text("word,n\ngood,1\nbad,2\n")
    options = ["--examples", tmp_path / "a.csv", "--template", "{word} day", "--quantization", "8da8w", "--tokens", "4"]
    text = run("compile", tiny_model, "--dry-run", *options, code=1)
    assert seen[0]["input_ids"].tolist() == [[9, 16, 0, 0], [13, 16, 0, 0]] and "random tokens" not in text
    assert seen[0]["attention_mask"].sum() == 4
    assert "random tokens" in run("compile", tiny_model, "--dry-run", "--quantization", "8da8w", code=1)
    assert seen[1]["input_ids"].shape == (2, 64)


def test_the_file_of_options_in_the_documentation(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "command_line.md").read_text()
    (tmp_path / "a.toml").write_text(page.split("```toml\n")[1].split("```")[0])
    found = read_config(tmp_path / "a.toml", "compile", {"model", "output", "tokens"}, SECTIONS)
    assert found["lora_r"] == "8" and found["loss"] == "causal-lm" and found["loss_max_labels"] == "4"
    trained = read_config(tmp_path / "a.toml", "finetune", {"template", "answer_column", "steps"}, ())
    assert trained["template"] == "Message: {message}\nIntent:" and trained["steps"] == "150"
