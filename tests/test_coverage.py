"""Every architecture of the zoo, on the eager and the XNNPACK backend, against the oracle; what comes out is recorded.

`docs/coverage.json` says what each cell does: "pass", or "refused" with our reason. A cell that does anything else
fails here. After a change that is meant, `pytest tests/test_coverage.py -m "slow or not slow" --accept` writes the
record, and `make docs` the page made from it.
"""

from __future__ import annotations

import fcntl
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import mobizo_compiler as mobizo
from mobizo_compiler import GenerateConfig, LoraConfig, passes
from mobizo_compiler.analysis.targets import resolve_targets
from mobizo_compiler.errors import CaptureError, ConfigError, UnsupportedGraphError
from mobizo_compiler.graph.example import bind_example
from mobizo_compiler.graph.pipeline import Pipeline
from mobizo_compiler.testing import Case, check_against_oracle, zoo

RECORD = Path(__file__).parent.parent / "docs" / "coverage.json"
ZOO = zoo()
# Tried on both backends; the rest of the zoo on the eager backend, by `make test-all`.
CORE = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "gpt2", "gpt_neox", "opt"),
    *("bloom", "falcon", "mixtral", "mamba", "gemma", "gptj", "starcoder2", "deepseek_v3"),
    *("bert", "roberta", "distilbert", "albert", "electra", "deberta_v2", "modernbert", "mpnet"),
    *("t5", "bart", "vit", "swin", "convnext", "resnet", "clip", "whisper", "wav2vec2", "hubert"),
    *("attention_batch_second", "transformer_encoder", "lstm", "cnn", "fixed_rows", "inputs_without_rows"),
)
# One of each kind is tried in every run, the rest by `make test-all`. That plain modules are right on the eager backend
# is shown by test_axes.py; Llama, BERT and T5 by test_rewrites.py, with one rewrite less each. On XNNPACK the tests of
# the command line have a Llama.
QUICK = {
    "eager": {"token_wise", "mamba", "convnext"},
    "xnnpack": set[str](),
}
# Cells that neither pass nor are refused, each with its cause; pytest fails when one of them starts to pass.
KNOWN_FAILURES: dict[tuple[str, str], str] = {}


def _cells() -> list[Any]:
    cells = []
    for name in ZOO:
        for backend in ("eager", "xnnpack") if name in CORE else ("eager",):
            marks = [] if name in QUICK[backend] else [pytest.mark.slow]
            if (name, backend) in KNOWN_FAILURES:
                marks.append(pytest.mark.xfail(strict=True, reason=KNOWN_FAILURES[name, backend]))
            cells.append(pytest.param(name, backend, marks=marks, id=f"{name}-{backend}"))
    return cells


@pytest.mark.parametrize(("name", "backend"), _cells())
def test_cell(name: str, backend: str, request: pytest.FixtureRequest) -> None:
    case = ZOO[name]
    found = {backend: outcome(case, backend)}
    if backend == "eager" and found[backend] == "pass":
        found["default"] = " ".join(default_targets(case))
    if request.config.getoption("--accept"):
        _write(name, case.family, found)
    recorded = json.loads(RECORD.read_text()).get(name, {})
    assert found == {key: recorded.get(key) for key in found}, "what this cell does changed: run pytest --accept"


@pytest.mark.slow
def test_a_linear_layer_that_is_stored_transposed_on_portable() -> None:
    """GPT-2's Conv1D gives products whose rows are not next to each other; kernels want them so."""
    assert outcome(ZOO["gpt2"], "portable") == "pass"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.family == "decoder"])
def test_generates(name: str, request: pytest.FixtureRequest) -> None:
    """With a cache of keys and values, which `compile` compares with the model, at once and token by token."""
    found = {"generate": generates(ZOO[name])}
    if request.config.getoption("--accept"):
        _write(name, ZOO[name].family, found)
    recorded = json.loads(RECORD.read_text()).get(name, {})
    assert found["generate"] == recorded.get("generate"), "what this cell does changed: run pytest --accept"


def generates(case: Case) -> str:
    """ "pass", or "refused" with code and reason; anything else raises."""
    model, lora = case.model(), LoraConfig(r=3, lora_alpha=5, target_modules=case.target_modules)
    options = {**case.options, "lora": lora, "loss": case.loss, "generate": GenerateConfig(context=16)}
    try:
        mobizo.compile(model, case.inputs(), backend="eager", **options)
    except (CaptureError, ConfigError, UnsupportedGraphError) as error:
        reason = f"refused: [{error.code}] {error.problem}".partition("\n")[0]
        return re.sub(r"\{(u\d+(?:, u\d+)*)\}", _sorted_names, reason)
    return "pass"


def _sorted_names(found: re.Match[str]) -> str:
    """A set that torch prints in any order."""
    return "{" + ", ".join(sorted(found[1].split(", "))) + "}"


def outcome(case: Case, backend: str) -> str:
    """ "pass", or "refused" with code and reason; anything else raises."""
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=case.target_modules)
    try:
        check_against_oracle(case.model(), case.inputs(), backend=backend, lora=lora, loss=case.loss, **case.options)
    except UnsupportedGraphError as error:
        return f"refused: [{error.code}] {error.problem}"
    return "pass"


def default_targets(case: Case) -> tuple[str, ...]:
    """The layers that are adapted if the user names none."""
    model = case.model()
    example = bind_example(model, case.inputs(), case.options.get("row_axes"))
    front = [passes.AttachLoss(case.loss), passes.Canonicalize(), passes.FreeRows(), passes.HoistPicks()]
    for symbolic in (True, False):
        try:
            captured = passes.capture(model, example, symbolic=symbolic)
            chosen = resolve_targets(Pipeline(front).run(captured), LoraConfig()).target_modules
        except Exception:
            if not symbolic:
                raise
            continue
        assert isinstance(chosen, tuple)
        return chosen
    raise AssertionError


def _write(name: str, family: str, found: dict[str, str]) -> None:
    """Put a cell into the record; several processes may do so at once."""
    with RECORD.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        record = json.loads(file.read() or "{}")
        record[name] = {**record.get(name, {}), "family": family, **found}
        file.truncate(0)
        file.write(json.dumps({key: record[key] for key in ZOO if key in record}, indent=1) + "\n")


def test_the_promised_coverage() -> None:
    """At least 32 architectures pass on eager and 28 on XNNPACK; no cell of the record lacks an outcome."""
    record = json.loads(RECORD.read_text())
    architectures = [name for name in CORE if ZOO[name].family != "plain"]
    assert len(architectures) >= 36
    assert sum(record[name]["eager"] == "pass" for name in architectures) >= 32
    assert sum(record[name]["xnnpack"] == "pass" for name in architectures) >= 28
    assert set(record) == set(ZOO)
    allowed = ("pass", "refused: [MBZ")
    assert all(cell[b].startswith(allowed) for cell in record.values() for b in ("eager", "xnnpack") if b in cell)


def test_an_error_in_a_lane_does_not_go_unseen() -> None:
    """The check must fail for a program whose lanes are wrong: here, adapters with another scaling."""
    from mobizo_compiler.testing import check

    case = ZOO["token_wise"]

    class Shifted(check.Oracle):
        def merged(self, state: torch.Tensor) -> dict[str, torch.Tensor]:
            return super().merged(state.flip(0))

    original, check.Oracle = check.Oracle, Shifted  # type: ignore[misc]
    try:
        with pytest.raises(AssertionError, match="lane losses differ"):
            outcome(case, "eager")
    finally:
        check.Oracle = original  # type: ignore[misc]
