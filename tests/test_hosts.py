"""Hosts without Python: the C++ host of `examples/cpp_host` beside Python, and the calls that a phone makes."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import executorch
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import mobizo_compiler as mobizo
from examples.cpp_host.write_tokens import write_tokens
from mobizo_compiler import (
    CausalLMLoss,
    ChoiceLoss,
    GenerateConfig,
    JournalWarning,
    LoraConfig,
    SequenceClassificationLoss,
    Session,
    ZOConfig,
)
from mobizo_compiler.device.journal import Journal, Record, fingerprint, read_journal
from mobizo_compiler.device.run import SNAPSHOT, START, step_seed
from mobizo_compiler.errors import ArtifactError, JournalLockedError
from mobizo_compiler.format import checksum, data_file
from mobizo_compiler.format.bundle import read_bundle
from mobizo_compiler.format.manifest import FORMAT_VERSION
from mobizo_compiler.format.probe import Probe
from mobizo_compiler.step.losses import get_loss
from mobizo_compiler.testing import TinyCausalLM, tiny_batch
from mobizo_compiler.text.answers import Encoded
from mobizo_compiler.text.batch_shape import BatchShape
from mobizo_compiler.text.data import IGNORED, TextData
from mobizo_compiler.text.evaluation import measure
from mobizo_compiler.text.prompts import PromptConfig

pytestmark = pytest.mark.xdist_group("hosts")  # one process, so that the host is built once

ROOT = Path(__file__).parent.parent
LEARNING_RATE, QUERIES = 0.05, 2
LOSS_ERROR = 3e-6  # fifty times the unit roundoff of float32
BAD_ARGUMENTS, BAD_PROGRAM, BAD_DATA, BAD_RUN, LOCKED, OTHER_NUMBERS = 2, 3, 4, 5, 6, 7

Batch = tuple[dict[str, Tensor], Tensor]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ host, built with every warning an error."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.fail(f"{tool} is missing: the C++ host cannot be built")
    build = tmp_path_factory.mktemp("cpp_host")
    package = next(iter(executorch.__path__))
    configure = ["cmake", "-S", str(ROOT / "examples" / "cpp_host"), "-B", str(build), f"-DCMAKE_PREFIX_PATH={package}"]
    for command in ([*configure, "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"], ["cmake", "--build", str(build), "-j2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return build / "mobizo_host"


def batches() -> list[Batch]:
    """Two batches that differ."""
    inputs, labels = tiny_batch()
    return [(inputs, labels), ({**inputs, "input_ids": inputs["input_ids"].flip(0)}, labels.flip(0))]


class Case:
    """A program file, its token file, and how the host is run on them."""

    def __init__(self, host: Path, folder: Path, program: mobizo.Program, data: list[Any]) -> None:
        self.host, self.folder, self.data = host, folder, data
        self.path = program.save(folder / "program.pte")
        self.program = mobizo.load(self.path)
        self.tokens = folder / "train.tokens"
        write_tokens(self.tokens, self.program.manifest, data)

    def command(self, run: Path, steps: int, *options: str, **places: Path) -> list[str]:
        paths = [places.get("program", self.path), places.get("tokens", self.tokens), run]
        arguments = ["--steps", str(steps), "--learning-rate", str(LEARNING_RATE), *options]
        return [str(self.host), *map(str, paths), *arguments]

    def train(self, run: Path, steps: int, *options: str, **places: Path) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.command(run, steps, *options, **places), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done

    def refused(self, code: int, run: Path, steps: int = 1, *options: str, **places: Path) -> str:
        done = subprocess.run(self.command(run, steps, *options, **places), capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        return next(line for line in done.stderr.splitlines() if line.startswith("error: "))

    def read(self, verb: str, *options: str, **places: Path) -> subprocess.CompletedProcess[str]:
        """What a verb does that reads a trained program."""
        paths = [places.get("program", self.path)]
        if verb != "generate":
            paths.append(places.get("tokens", self.tokens))
        command = [str(self.host), verb, *map(str, paths), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    def says(self, verb: str, *options: str, **places: Path) -> str:
        done = self.read(verb, *options, **places)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def cannot(self, code: int, verb: str, *options: str, **places: Path) -> str:
        done = self.read(verb, *options, **places)
        assert done.returncode == code, done.stdout + done.stderr
        return next(line for line in done.stderr.splitlines() if line.startswith("error: "))

    def finetune(self, run: Path, steps: int, **options: Any) -> Session:
        session = Session(self.program)
        session.finetune(self.data, steps=steps, learning_rate=LEARNING_RATE, run=run, **options)
        return session


@pytest.fixture(scope="module")
def case(host: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A tiny language model on XNNPACK."""
    torch.manual_seed(0)
    model = TinyCausalLM(layers=1).eval()
    lora, zo, loss = LoraConfig(r=3), ZOConfig(queries=QUERIES), CausalLMLoss(max_labels=6)
    program = mobizo.compile(model, tiny_batch()[0], lora, zo, loss)
    return Case(host, tmp_path_factory.mktemp("xnnpack"), program, batches())


@pytest.fixture(scope="module")
def passed(host: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A program whose state goes in and out, as the bindings of phones need it, and whose rows are of any length."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 12), nn.Linear(12, 16)).eval()
    words = torch.randint(0, 16, (2, 5))
    program = mobizo.compile(
        model,
        (words,),
        LoraConfig(r=3),
        ZOConfig(queries=QUERIES),
        backend="portable",
        state="io",
        dynamic_shapes=({1: torch.export.Dim("tokens", min=4, max=7)},),
    )
    data = [((rows,), rows) for rows in (words, words[:, :4].flip(1))]
    return Case(host, tmp_path_factory.mktemp("passed"), program, data)


class _Chooser(nn.Module):
    """Logits of the token that follows, from the tokens that are not masked."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 12), nn.Linear(12, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(input_ids) * attention_mask[:, :, None])
        return logits


@pytest.fixture(scope="module")
def chooser(host: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Answers by one of three tokens, the state in a data file, and steps that start from a prefix."""
    torch.manual_seed(0)
    words = torch.randint(0, 16, (3, 2, 5))
    masks = torch.ones_like(words)
    masks[1, 0, 3:] = 0
    labels = torch.full_like(words, IGNORED)
    labels[:, 0, 2], labels[:, 1, 4] = 9, 5
    loss = ChoiceLoss(choices=(9, 5, 2))
    program = mobizo.compile(
        _Chooser().eval(),
        {"input_ids": words[0], "attention_mask": masks[0]},
        LoraConfig(r=3),
        ZOConfig(queries=QUERIES),
        loss,
        backend="portable",
        state="data",
        split_prefix=True,
        answers=("no", "yes\t!", "maybe"),
    )
    data = [({"input_ids": words[n], "attention_mask": masks[n]}, labels[n]) for n in range(3)]
    return Case(host, tmp_path_factory.mktemp("chooser"), program, data)


class _Classifier(nn.Module):
    """Classes of rows, behind another output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 12), nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        hidden = self.embedding(tokens).mean(1)
        return {"hidden": (hidden, hidden + 1), "logits": self.head(hidden)}


@pytest.fixture(scope="module")
def exact(host: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A program whose steps have the gradient itself, so that it has no method `replay`."""
    torch.manual_seed(0)
    words = torch.randint(0, 11, (2, 2, 5))
    zo, loss = ZOConfig(estimator="exact"), SequenceClassificationLoss()
    program = mobizo.compile(_Classifier().eval(), (words[0],), LoraConfig(r=2), zo, loss, backend="portable")
    data = [((rows,), torch.tensor([2, label])) for rows, label in zip(words, (0, IGNORED), strict=True)]
    return Case(host, tmp_path_factory.mktemp("exact"), program, data)


def strayed(case: Case, folder: Path) -> tuple[Session, str]:
    """A session far from the start, and its state in a data file."""
    session = Session(case.program)
    session.load_state(torch.randn(session.state().shape, generator=torch.Generator().manual_seed(0)))
    return session, str(session.export_ptd(folder / "strayed.ptd"))


def saved(path: Path) -> Tensor:
    """The state in a `.ptd`, read by ExecuTorch's own reader."""
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    payload = FlatTensorSerializer().deserialize(path.read_bytes())
    assert set(payload.named_data) == {"mobizo_fingerprint", "mobizo_lora_b"}
    entry = payload.named_data["mobizo_lora_b"]
    assert entry.tensor_layout is not None
    assert entry.tensor_layout.scalar_type == 6, "float32"
    state = torch.frombuffer(bytearray(payload.buffers[entry.buffer_index]), dtype=torch.float32)
    assert list(entry.tensor_layout.sizes) == list(state.shape)
    return state


def restored(case: Case, run: Path) -> Tensor:
    session = Session(case.program)
    session.restore(run)
    return session.state()


def agree(found: list[Record], wanted: list[Record]) -> None:
    """What was chosen is equal; what was computed is near.

    A projected gradient is the difference of two losses over 2 eps. It moves B, and with B the losses after it, by the
    learning rate times as much, times the gradient.
    """
    drift = 0.0
    for one, other in zip(found, wanted, strict=True):
        chosen = ("step", "seed", "learning_rate", "eps")
        assert [getattr(one, name) for name in chosen] == [getattr(other, name) for name in chosen]
        error = LOSS_ERROR * other.loss + drift
        assert one.loss == pytest.approx(other.loss, abs=error)
        assert one.projected_gradient == pytest.approx(other.projected_gradient, abs=error / other.eps)
        drift += LEARNING_RATE * error / other.eps * max(map(abs, other.projected_gradient))


def test_it_has_no_torch_and_no_python_in_it(host: Path, case: Case, tmp_path: Path) -> None:
    linked = subprocess.run(["ldd", str(host)], capture_output=True, text=True, check=True).stdout
    assert "libexecutorch.so" in linked and "not found" not in linked
    with running(case, tmp_path / "run") as process:
        mapped = Path(f"/proc/{process.pid}/maps").read_text()
    files = {Path(line.split()[-1]).name for line in (linked + mapped).splitlines() if "/" in line}
    assert {"mobizo_host", "libexecutorch_backend_xnnpack.so"} <= files
    foreign = [name for name in files if re.match(r"lib(torch|c10|python|shm|gomp)", name)]
    assert not foreign


@contextlib.contextmanager
def running(case: Case, run: Path) -> Iterator[subprocess.Popen[str]]:
    """The host while it trains, after its first step; killed at the end of the block."""
    command = case.command(run, 10**8)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            assert any(line.startswith("step") for line in process.stdout)
            yield process
        finally:
            process.kill()


def test_the_journal_is_the_one_that_python_writes(case: Case, tmp_path: Path) -> None:
    done = case.train(tmp_path / "cpp", 6, "--seed", "5", "--save", str(tmp_path / "state.ptd"))
    case.finetune(tmp_path / "python", 6, seed=5)
    found, wanted = ((tmp_path / name / "journal").read_bytes() for name in ("cpp", "python"))
    assert found[:64] == wanted[:64] and len(found) == len(wanted)
    records = read_journal(tmp_path / "cpp" / "journal", case.program)
    assert [record.seed for record in records] == [step_seed(5, step) for step in range(6)]
    agree(records, read_journal(tmp_path / "python" / "journal", case.program))
    assert any(any(record.projected_gradient) for record in records)
    assert re.findall(r"step \d+ loss ([\d.]+)", done.stdout) == [f"{record.loss:.6f}" for record in records]
    state = saved(tmp_path / "state.ptd")
    assert state.any() and torch.equal(state, restored(case, tmp_path / "cpp"))
    (tmp_path / "cpp" / SNAPSHOT).unlink()
    assert torch.equal(state, restored(case, tmp_path / "cpp")), "Python replays to the same bits"
    (peak,) = re.findall(r"peak memory (\d+) kB", done.stdout)
    assert case.path.stat().st_size < int(peak) * 1000 < 100e6


def test_options_reach_the_journal(case: Case, tmp_path: Path) -> None:
    case.train(tmp_path / "run", 2, "--eps", "0.0123", "--threads", "1", "--seed", "12345678901")
    for step, record in enumerate(read_journal(tmp_path / "run" / "journal", case.program)):
        assert record.seed == step_seed(12345678901, step)
        assert (record.eps, record.learning_rate) == tuple(torch.tensor([0.0123, LEARNING_RATE]).tolist())


@pytest.mark.parametrize("snapshots", [True, False])
def test_a_run_goes_back_and_forth(snapshots: bool, case: Case, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def next_host() -> None:
        if not snapshots:
            (run / SNAPSHOT).unlink()

    assert "the run has" not in case.train(run, 3).stdout
    next_host()
    case.finetune(run, 6)
    next_host()
    done = case.train(run, 9, "--save", str(tmp_path / "state.ptd"))
    assert "the run has 6 steps" in done.stdout and len(re.findall(r"^step", done.stdout, re.MULTILINE)) == 3
    next_host()
    session = case.finetune(run, 9)
    assert torch.equal(session.state(), saved(tmp_path / "state.ptd"))
    case.finetune(tmp_path / "python", 9)
    agree(*(read_journal(folder / "journal", case.program) for folder in (run, tmp_path / "python")))


def test_a_state_that_goes_in_and_out(passed: Case, tmp_path: Path) -> None:
    assert passed.program.manifest.state == "io"
    passed.train(tmp_path / "cpp", 3)
    passed.train(tmp_path / "cpp", 5, "--save", str(tmp_path / "state.ptd"))
    assert torch.equal(restored(passed, tmp_path / "cpp"), saved(tmp_path / "state.ptd"))
    passed.finetune(tmp_path / "python", 5)
    agree(*(read_journal(tmp_path / name / "journal", passed.program) for name in ("cpp", "python")))


def test_rows_of_any_length(passed: Case, tmp_path: Path) -> None:
    head, *rows = passed.tokens.read_text().splitlines()
    assert [len(row.split("\t")[0].split(" ")) for row in rows] == [5, 5, 4, 4]

    def refused(*lines: str) -> str:
        (tmp_path / "tokens").write_text("\n".join([head, *lines]))
        return passed.refused(BAD_DATA, tmp_path / "no", tokens=tmp_path / "tokens")

    assert "tokens = 3, outside 4..7" in refused("1 2 3\t1 2 3", rows[0])
    assert "tokens = 4, before it in this batch it is 5" in refused(rows[1], rows[2])
    assert "tokens = 4, before it in this batch it is 5" in refused("1 2 3 4 5\t1 2 3 4", rows[1])


def test_kills_at_random_instants(case: Case, tmp_path: Path) -> None:
    run, rng, steps = tmp_path / "run", random.Random(0), 400
    case.train(tmp_path / "whole", steps)
    whole = (tmp_path / "whole" / "journal").read_bytes()
    found: list[int] = []
    while len(found) < 25:
        process = subprocess.Popen(case.command(run, steps), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        if rng.random() < 0.7:  # else also before the first step
            process.stdout.readline()
        time.sleep(rng.random() * 0.03)
        process.kill()
        reported = process.stdout.read().count(b"step ")
        if process.wait() != -signal.SIGKILL:
            shutil.rmtree(run)  # it came to the end: there is nothing left to kill
            continue
        data = (run / "journal").read_bytes() if (run / "journal").exists() else b""
        assert whole.startswith(data), "what is on the disk is what an uninterrupted run wrote"
        before = found[-1] if found and found[-1] <= len(data) else 0
        assert len(data) - before >= reported * (24 + 4 * QUERIES), "a step that was reported is on the disk"
        found.append(len(data))
    assert len(set(found)) > 5, found
    case.train(run, steps, "--save", str(tmp_path / "state.ptd"))
    assert (run / "journal").read_bytes() == whole
    assert torch.equal(saved(tmp_path / "state.ptd"), restored(case, tmp_path / "whole"))


@pytest.mark.parametrize("kept", [0, 1, 31])
def test_a_torn_record_is_cut_off(kept: int, case: Case, tmp_path: Path) -> None:
    run = tmp_path / "run"
    case.train(run, 4)
    whole = (run / "journal").read_bytes()
    os.truncate(run / "journal", len(whole) - (24 + 4 * QUERIES) + kept)
    done = case.train(run, 4)
    said = f"the last {kept} bytes of the journal were not a whole step and have been cut off; 3 steps are left"
    assert (said in done.stderr) == (kept > 0) and "the run has 3 steps" in done.stdout
    assert f"{SNAPSHOT}: it is of step 4, the journal has 3 steps; replaying from the start" in done.stderr
    assert (run / "journal").read_bytes() == whole


def test_damage_in_the_middle_is_not_skipped(case: Case, tmp_path: Path) -> None:
    case.train(tmp_path, 4)
    data = bytearray((tmp_path / "journal").read_bytes())
    data[64 + 32 + 9] ^= 4
    (tmp_path / "journal").write_bytes(data)
    assert "step 1 is damaged" in (said := case.refused(BAD_RUN, tmp_path, 6)) and "to 96 bytes" in said
    assert (tmp_path / "journal").read_bytes() == data
    data[64 + 32 + 9] ^= 4
    data[30] ^= 1
    (tmp_path / "journal").write_bytes(data)
    assert "the header of the journal is damaged" in case.refused(BAD_RUN, tmp_path, 6)
    (tmp_path / "journal").write_bytes(b"nothing")
    assert "this is no journal" in case.refused(BAD_RUN, tmp_path, 6)


@pytest.mark.parametrize("other", [{"zo": ZOConfig(queries=3)}, {"model": "0" * 64}], ids=["queries", "weights"])
def test_a_journal_of_another_program_is_refused(other: dict[str, Any], case: Case, tmp_path: Path) -> None:
    manifest = dataclasses.replace(case.program.manifest, **other)
    Journal(tmp_path / "journal", dataclasses.replace(case.program, manifest=manifest)).close()
    assert "the journal is of another program" in case.refused(BAD_RUN, tmp_path)


def test_saved_states_that_are_damaged(case: Case, tmp_path: Path) -> None:
    case.train(tmp_path, 3, "--save", str(tmp_path / "state.ptd"))
    wanted = saved(tmp_path / "state.ptd")
    original = {name: (tmp_path / name).read_bytes() for name in (SNAPSHOT, START)}
    rng = random.Random(1)
    for turn in range(40):
        data = bytearray(original[SNAPSHOT])
        if turn % 2:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / SNAPSHOT).write_bytes(data)
        done = case.train(tmp_path, 3, "--save", str(tmp_path / "state.ptd"))
        assert torch.equal(saved(tmp_path / "state.ptd"), wanted), turn
        if turn % 2:
            assert "snapshot" in done.stderr and "replaying from the start" in done.stderr
    (tmp_path / SNAPSHOT).write_bytes(original[SNAPSHOT][:-1])
    (tmp_path / START).write_bytes(original[START][:-1])
    assert START in case.refused(BAD_RUN, tmp_path, 3)
    (tmp_path / SNAPSHOT).unlink()
    (tmp_path / START).unlink()
    assert "the run has lost its saved states" in case.refused(BAD_RUN, tmp_path, 3)


def test_one_at_a_time(case: Case, tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", case.program):
        assert "another session is training" in case.refused(LOCKED, tmp_path)
    with running(case, tmp_path):
        with pytest.raises(JournalLockedError):
            Journal(tmp_path / "journal", case.program)
        assert "another session is training" in case.refused(LOCKED, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JournalWarning)  # a record may be torn
        Journal(tmp_path / "journal", case.program).close()


def test_a_full_disk(case: Case, tmp_path: Path) -> None:
    """A limit on the size of files, in the middle of the third record."""
    case.train(tmp_path, 2)
    whole = (tmp_path / "journal").read_bytes()

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10,) * 2)

    done = subprocess.run(case.command(tmp_path, 3), capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == BAD_RUN
    assert "step 2 could not be written: File too large; the journal is whole and holds 2 steps" in done.stderr
    assert (tmp_path / "journal").read_bytes() == whole
    assert not list(tmp_path.glob(".*")), "nothing is left behind"
    case.train(tmp_path, 3)


def test_a_run_starts_from_a_state(case: Case, tmp_path: Path) -> None:
    from executorch.exir._serialize.data_serializer import DataEntry, DataPayload
    from executorch.exir.schema import ScalarType
    from executorch.exir.tensor_layout import TensorLayout
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    state = torch.randn(case.program.parameters, generator=torch.Generator().manual_seed(0)) * 0.1
    layout = TensorLayout(scalar_type=ScalarType.FLOAT, sizes=[len(state)], dim_order=[0])

    def write(data: bytes) -> Path:
        bytes_layout = TensorLayout(scalar_type=ScalarType.BYTE, sizes=[32], dim_order=[0])
        entries = {"mobizo_lora_b": DataEntry(0, 16, layout), "mobizo_fingerprint": DataEntry(1, 16, bytes_layout)}
        payload = DataPayload([data, fingerprint(case.program)], entries)
        (tmp_path / "given.ptd").write_bytes(checksum.sealed(bytes(FlatTensorSerializer().serialize(payload))))
        return tmp_path / "given.ptd"

    given = str(write(state.numpy().tobytes()))
    done = case.train(tmp_path / "run", 0, "--load", given, "--save", str(tmp_path / "same.ptd"))
    assert "warning" not in done.stderr and torch.equal(saved(tmp_path / "same.ptd"), state)
    with safe_open(tmp_path / "run" / START, framework="pt") as file:
        assert torch.equal(file.get_tensor("lora_b"), state)
    again = case.train(tmp_path / "run", 2, "--load", given, "--save", str(tmp_path / "trained.ptd"))
    assert "the run has begun" in again.stderr
    session = Session(case.program)
    session.load_state(state)
    session.finetune(case.data, steps=2, learning_rate=LEARNING_RATE, run=tmp_path / "python")
    agree(*(read_journal(tmp_path / name / "journal", case.program) for name in ("run", "python")))
    torch.testing.assert_close(saved(tmp_path / "trained.ptd"), session.state(), rtol=0, atol=1e-4)
    case.train(tmp_path / "next", 1, "--load", str(tmp_path / "trained.ptd"))  # its own file, too

    state[3] = torch.inf
    assert "not finite" in case.refused(BAD_DATA, tmp_path / "no", 1, "--load", str(write(state.numpy().tobytes())))
    layout.sizes[0] = 4
    assert "no tensor mobizo_lora_b of" in case.refused(BAD_DATA, tmp_path / "no", 1, "--load", str(write(bytes(16))))
    (tmp_path / "given.ptd").write_bytes(checksum.sealed(b"FT01" * 100))
    assert "no .ptd file" in case.refused(BAD_DATA, tmp_path / "no", 1, "--load", given)
    assert "no checksum at its end" in case.refused(BAD_DATA, tmp_path / "no", 1, "--load", str(case.tokens))
    assert "cannot be read" in case.refused(BAD_DATA, tmp_path / "no", 1, "--load", str(tmp_path / "none.ptd"))
    assert "cannot be written" in case.refused(
        BAD_DATA, tmp_path / "run", 2, "--save", str(tmp_path / "no" / "a" / "b")
    )


def test_a_loss_that_is_not_finite_changes_nothing(host: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    good, target = torch.randn(2, 4), torch.randn(2, 3)
    bad = good.clone()
    bad[1, 2] = torch.nan
    model = nn.Sequential(OrderedDict(layer=nn.Linear(4, 3))).eval()
    program = mobizo.compile(
        model, (good,), LoraConfig(r=2), ZOConfig(queries=2), loss=mobizo.MSELoss(), backend="portable"
    )
    data = [((good,), target), ((bad,), target)]
    case = Case(host, tmp_path, program, data)
    done = case.train(tmp_path / "run", 3, "--save", str(tmp_path / "state.ptd"))
    assert "step 1 loss nan (not finite: nothing was changed)" in done.stdout
    records = read_journal(tmp_path / "run" / "journal", case.program)
    assert records[1].projected_gradient == (0.0, 0.0) and all(records[2].projected_gradient)
    (tmp_path / "run" / SNAPSHOT).unlink()
    assert torch.equal(saved(tmp_path / "state.ptd"), restored(case, tmp_path / "run"))
    case.finetune(tmp_path / "python", 3)
    wanted = read_journal(tmp_path / "python" / "journal", case.program)
    agree([records[0], records[2]], [wanted[0], wanted[2]])
    session, given = strayed(case, tmp_path)
    write_tokens(tmp_path / "good", case.program.manifest, data[:1])
    said = case.says("evaluate", "--load", given, tokens=tmp_path / "good")
    assert float(said.split()[1]) == pytest.approx(mean_loss(session, data[:1]), rel=LOSS_ERROR, abs=1e-6)
    assert case.says("evaluate", "--load", given).startswith("loss nan of 4 labels in 4 rows")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["p", "t"], "a program, a token file and a run folder are needed"),
        (["p", "t", "r", "more"], "a program, a token file and a run folder are needed"),
        (["p", "t", "r", "--learning-rate", "0.1"], "--steps is needed"),
        (["p", "t", "r", "--steps", "3"], "--learning-rate is needed"),
        (["p", "t", "r", "--steps"], "--steps needs a value"),
        (["p", "t", "r", "--steps", "-1"], "--steps is '-1', which is no whole number"),
        (["p", "t", "r", "--steps", "3.5"], "--steps is '3.5', which is no whole number"),
        (["p", "t", "r", "--seed", "x"], "--seed is 'x', which is no whole number"),
        (["p", "t", "r", "--learning-rate", "nan"], "--learning-rate is nan; it must be a finite number"),
        (["p", "t", "r", "--learning-rate", "1e99"], "--learning-rate is 1e99; it must be a finite number"),
        (["p", "t", "r", "--learning-rate", "1e-60"], "--learning-rate is 1e-60; it must be a finite number"),
        (["p", "t", "r", "--eps", "0"], "--eps is 0; it must be above 0"),
        (["p", "t", "r", "--threads", "0"], "--threads is 0"),
        (["p", "t", "r", "--rate", "0"], "there is no option --rate"),
    ],
)
def test_bad_arguments(arguments: list[str], said: str, host: Path) -> None:
    done = subprocess.run([str(host), *arguments], capture_output=True, text=True)
    assert done.returncode == BAD_ARGUMENTS and f"error: {said}" in done.stderr and "usage:" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "p"], "evaluate needs a program and a token file"),
        (["predict", "p", "t", "more"], "predict needs a program and a token file"),
        (["generate"], "generate needs a program, and no other file"),
        (["evaluate", "p", "t", "--steps", "3"], "there is no option --steps here"),
        (["evaluate", "p", "t", "--run"], "--run needs a value"),
        (["predict", "p", "t", "--threads", "0"], "--threads is 0"),
        (["generate", "p", "--steps", "3"], "--prompt is needed"),
        (["generate", "p", "--prompt", "1"], "--steps is needed"),
        (["generate", "p", "--prompt", "1", "--steps", "0"], "--steps is 0"),
        (["generate", "p", "--prompt", "1", "--steps", "1", "--stop", "x"], "--stop is 'x', which is no whole number"),
        (
            ["generate", "p", "--prompt", "1", "--steps", "1", "--temperature", "1"],
            "--temperature is not for this host",
        ),
    ],
)
def test_bad_arguments_of_verbs(arguments: list[str], said: str, host: Path) -> None:
    done = subprocess.run([str(host), *arguments], capture_output=True, text=True)
    assert done.returncode == BAD_ARGUMENTS and f"error: {said}" in done.stderr and "usage:" in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("input_ids", "ids", r":1: the program takes no ids"),
        ("input_ids\tattention_mask", "input_ids\tinput_ids", r":1: the column input_ids must be there once"),
        ("\n19 ", "\n23 ", r":2: input_ids has the value 23, outside 0\.\.22"),
        ("\n19 ", "\n-1 ", r":2: input_ids has the value -1, outside 0\.\.22"),
        ("\n19 ", "\nx ", r":2: input_ids has 'x' where a number of int64 should be"),
        ("\n19 ", "\n1 19 ", r":2: input_ids has 8 values in a row, the program takes 7"),
        ("-100 -100", "-99 -100", r":2: labels has the value -99, outside 0\.\.22"),
        ("\t-100 -100 4", "", r":2: there are 2 columns, the first line has 3"),
        ("\n22 ", "\n\n22 ", r"there are 7 rows; the program takes 3 in a step"),
    ],
)
def test_bad_tokens(old: str, new: str, said: str, case: Case, tmp_path: Path) -> None:
    text = case.tokens.read_text()
    assert old in text
    (tmp_path / "tokens").write_text(text.replace(old, new, 1))
    assert re.search(said, case.refused(BAD_DATA, tmp_path / "run", tokens=tmp_path / "tokens"))
    assert not (tmp_path / "run").exists(), "nothing has begun"


def test_labels_that_cannot_be(case: Case, tmp_path: Path) -> None:
    head, *rows = [line.split("\t") for line in case.tokens.read_text().splitlines()]
    path = tmp_path / "tokens"
    for labels, said in (
        ("5 -100 -100 -100 -100 -100 -100", ":4: nothing is labelled in this batch"),  # the first never counts
        ("1 1 1 1 1 1 1", ":2: there are 6 labels; the loss was compiled for at most 5 in a row"),
    ):
        lines = [head, *([*row[:2], labels] for row in rows)]
        path.write_text("\n".join("\t".join(line) for line in lines))
        program = edited(case, tmp_path, '"max_labels": 6', '"max_labels": 5')
        assert said in case.refused(BAD_DATA, tmp_path / "run", tokens=path, program=program)
    path.write_text("")
    assert "the file is empty" in case.refused(BAD_DATA, tmp_path / "run", tokens=path)
    assert "cannot be opened" in case.refused(BAD_DATA, tmp_path / "run", tokens=tmp_path / "none")


def edited(case: Case, folder: Path, old: str, new: str) -> Path:
    """The program file with some bytes of it changed on purpose: with the right checksum."""
    data = case.path.read_bytes()
    assert old.encode() in data and len(old) == len(new)
    (folder / "edited.pte").write_bytes(data.replace(old.encode(), new.encode()))
    checksum.seal(folder / "edited.pte")
    return folder / "edited.pte"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            f'"format_version": {FORMAT_VERSION}',
            '"format_version": 99',
            f"the program has format 99, this host reads format {FORMAT_VERSION}",
        ),
        ('"format_version"', '"format_versi0n"', "the field format_version is missing"),
        ('"labels": {', '"labels": [', "no JSON"),
        ('"state": "shared"', '"state": "sharem"', "the state is sharem, not shared, data or io"),
        ("XnnpackBackend", "XnnpackBackenb", "it needs XnnpackBackenb, and this host was linked without it"),
        ('"dtype": "int64"', '"dtype": "int63"', "cannot make the input input_ids"),
    ],
)
def test_programs_that_it_cannot_run(old: str, new: str, said: str, case: Case, tmp_path: Path) -> None:
    assert said in case.refused(BAD_PROGRAM, tmp_path / "run", program=edited(case, tmp_path, old, new))


def test_files_that_are_no_programs(case: Case, tmp_path: Path) -> None:
    from executorch.exir import to_edge

    (tmp_path / "empty.pte").write_bytes(b"")
    (tmp_path / "cut.pte").write_bytes(case.path.read_bytes()[:5000])
    (tmp_path / "text.pte").write_bytes(checksum.sealed(b"this is no program"))
    said = {
        "none.pte": "it cannot be read: No such file",
        "empty.pte": "it has no checksum at its end",
        "cut.pte": "it has no checksum at its end",
        "text.pte": "it cannot be loaded",
    }
    for name, problem in said.items():
        assert problem in case.refused(BAD_PROGRAM, tmp_path / "run", program=tmp_path / name)
    layer = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    (tmp_path / "other.pte").write_bytes(checksum.sealed(to_edge(layer).to_executorch().buffer))
    assert "no program of mobizo-compiler" in case.refused(
        BAD_PROGRAM, tmp_path / "run", program=tmp_path / "other.pte"
    )
    (tmp_path / "file").write_text("")
    case.refused(BAD_RUN, tmp_path / "file")


def test_damaged_programs_and_data_files(case: Case, tmp_path: Path) -> None:
    session = Session(case.program)
    session.load_state(torch.randn(session.state().shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    data = session.export_ptd(tmp_path / "state.ptd")
    damaged, rng = tmp_path / "damaged", random.Random(0)
    for turn in range(60):
        original = data if turn % 2 else case.path
        content = bytearray(original.read_bytes())
        if turn % 3:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            del content[rng.randrange(len(content)) :]
        damaged.write_bytes(content)
        said = (
            case.refused(BAD_DATA, tmp_path / "run" / str(turn), 1, "--load", str(damaged))
            if turn % 2
            else case.refused(BAD_PROGRAM, tmp_path / "run" / str(turn), program=damaged)
        )
        assert "checksum" in said


def test_data_files_go_back_and_forth(case: Case, tmp_path: Path) -> None:
    session = Session(case.program)
    session.load_state(torch.randn(session.state().shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    given = session.export_ptd(tmp_path / "given.ptd")
    done = case.train(tmp_path / "run", 0, "--load", str(given), "--save", str(tmp_path / "back.ptd"))
    assert f"moves the model's answer to a fixed input by {100 * session.probe().effect:.2f} %" in done.stderr
    other = Session(case.program)
    other.import_ptd(tmp_path / "back.ptd")
    assert torch.equal(other.state(), session.state())
    wanted = data_file.packed(session.state(), fingerprint(session.program))
    assert (tmp_path / "back.ptd").read_bytes() == wanted, "the same state is the same file, without a probe"
    given.write_bytes(data_file.packed(session.state(), bytes(32)))
    assert "state of another program" in case.refused(BAD_DATA, tmp_path / "no", 1, "--load", str(given))
    given.write_bytes(data_file.packed(session.state()))
    assert "does not say which program" in case.refused(BAD_DATA, tmp_path / "no", 1, "--load", str(given))


def test_minutes_of_the_host(case: Case, tmp_path: Path) -> None:
    """It stops, and goes on as one that was not stopped."""
    done = case.train(tmp_path / "run", 3, "--minutes", "0.0000001")
    assert re.search(r"minutes are over after step [0-2] of 3; the same call goes on from there", done.stderr)
    case.train(tmp_path / "run", 3, "--minutes", "10")
    case.train(tmp_path / "other", 3)
    journals = [(tmp_path / name / "journal").read_bytes() for name in ("run", "other")]
    assert journals[0] == journals[1]
    assert "--minutes is 0; it must be above 0" in case.refused(BAD_ARGUMENTS, tmp_path / "no", 1, "--minutes", "0")


def test_sensors_of_the_host(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A low battery and a hot part stop it; it goes on as one that was not stopped."""
    battery, zone = tmp_path / "class" / "power_supply" / "BAT0", tmp_path / "class" / "thermal" / "thermal_zone0"

    def says(status: str, percent: int, thousandths: int) -> None:
        for folder, files in (
            (battery, {"type": "Battery", "status": status, "capacity": percent}),
            (zone, {"temp": thousandths}),
        ):
            folder.mkdir(parents=True, exist_ok=True)
            for name, value in files.items():
                (folder / name).write_text(f"{value}\n")

    run, limits = tmp_path / "run", ("--battery", "30", "--temperature", "60")
    monkeypatch.setenv("MOBIZO_SYS_CLASS", str(tmp_path / "class"))
    assert "does not say how hot it is" in case.refused(BAD_ARGUMENTS, run, 3, *limits)
    says("Discharging", 29, 41_000)
    assert "the battery is at 29 % after step 0 of 3" in case.train(run, 3, *limits).stderr
    says("Charging", 29, 61_500)
    assert "the device is at 62 degrees after step 0 of 3" in case.train(run, 3, *limits).stderr
    says("Charging", 29, 59_000)
    assert "after step" not in case.train(run, 3, *limits).stderr
    case.train(tmp_path / "other", 3)
    journals = [(tmp_path / name / "journal").read_bytes() for name in ("run", "other")]
    assert journals[0] == journals[1]
    assert "--battery is 101; it must be above 0, and at most 100" in case.refused(
        BAD_ARGUMENTS, tmp_path / "no", 1, "--battery", "101"
    )


@pytest.mark.parametrize("which", ["case", "passed", "chooser", "exact"])
def test_the_probe_of_an_adapter(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The host finds Python's numbers, with ids, masks, dynamic sizes and several outputs, and refuses others."""
    case: Case = request.getfixturevalue(which)
    session, file = strayed(case, tmp_path)
    probe = session.probe()
    said = case.read("evaluate", "--load", file)
    assert said.returncode == 0, said.stderr
    assert f"moves the model's answer to a fixed input by {100 * probe.effect:.2f} %" in said.stderr
    assert "fixed input" not in case.read("evaluate", "--load", file, "--quiet").stderr
    other = tuple(2 * b - a for b, a in zip(probe.base, probe.adapted, strict=True))
    turned = Probe(probe.base, other, probe.asked)
    Path(file).write_bytes(data_file.packed(session.state(), fingerprint(session.program), turned))
    assert "when it was exported" in case.cannot(BAD_DATA, "evaluate", "--load", file)
    another = dataclasses.replace(turned, asked=probe.asked ^ 1)
    Path(file).write_bytes(data_file.packed(session.state(), fingerprint(session.program), another))
    assert case.read("evaluate", "--load", file).returncode == 0, "a probe of another input is not compared"
    fresh = Session(case.program)
    fresh.export_ptd(file)
    assert "changes nothing of the model's answer" in case.read("evaluate", "--load", file, "--quiet").stderr


@pytest.mark.slow
def test_the_state_of_another_program_of_the_same_size(host: Path, case: Case, tmp_path: Path) -> None:
    """The host's own file: refused by the host and by Python where the other program has other weights."""
    torch.manual_seed(1)
    lora, zo, loss = LoraConfig(r=3), ZOConfig(queries=QUERIES), CausalLMLoss(max_labels=6)
    other = Case(
        host, tmp_path, mobizo.compile(TinyCausalLM(layers=1).eval(), tiny_batch()[0], lora, zo, loss), batches()
    )
    case.train(tmp_path / "run", 2, "--save", str(tmp_path / "state.ptd"))
    assert other.program.manifest.state_size == case.program.manifest.state_size
    said = other.refused(BAD_DATA, tmp_path / "no", 1, "--load", str(tmp_path / "state.ptd"))
    assert "it has the state of another program" in said
    session = Session(other.program)
    with pytest.raises(ArtifactError, match="state of another program"):
        session.import_ptd(tmp_path / "state.ptd")
    assert not session.state().any()


def mean_loss(session: Session, data: list[Any], rows: int | None = None) -> float:
    """Of the program's own loss, over all labels of the first `rows` rows."""
    loss, manifest = get_loss(session.program.manifest.loss), session.program.manifest
    found = [loss(session.evaluate(inputs), labels) for inputs, labels in data]
    sums, counts = (torch.cat(parts)[:rows].double().sum() for parts in zip(*found, strict=True))
    assert manifest.labels.also is None or float(counts) > 0
    return float(sums / counts)


@pytest.mark.parametrize("name", ["case", "passed", "chooser", "exact"])
def test_the_loss_of_a_token_file(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    case: Case = request.getfixturevalue(name)
    session, given = strayed(case, tmp_path)
    for options, state in (((), Session(case.program)), (("--load", given), session)):
        (loss, labels, rows) = re.findall(
            r"^loss (\S+) of (\d+) labels in (\d+) rows$", case.says("evaluate", *options)
        )[0]
        assert float(loss) == pytest.approx(mean_loss(state, case.data), rel=LOSS_ERROR, abs=1e-6)
        assert int(rows) == sum(len(labels) for _, labels in case.data) and int(labels) > 0
    lines = case.tokens.read_text().splitlines()
    (tmp_path / "fewer").write_text("\n".join(lines[:-1]))
    said = case.says("evaluate", "--load", given, tokens=tmp_path / "fewer")
    assert float(said.split()[1]) == pytest.approx(
        mean_loss(session, case.data, len(lines) - 2), rel=LOSS_ERROR, abs=1e-6
    )


def test_the_loss_is_the_one_that_a_step_reports(exact: Case, tmp_path: Path) -> None:
    """An exact program runs one lane, with nothing perturbed."""
    session, given = strayed(exact, tmp_path)
    write_tokens(tmp_path / "tokens", exact.program.manifest, exact.data[:1])
    said = exact.says("evaluate", "--load", given, tokens=tmp_path / "tokens")
    step = session.train_step(*exact.data[0], seed=0, learning_rate=0.0)
    assert float(said.split()[1]) == pytest.approx(step.loss, rel=LOSS_ERROR, abs=1e-6)


def predicted(said: str) -> tuple[list[str], list[str], Tensor]:
    """The head, the answers and the probabilities of a table."""
    head, *rows = [line.split("\t") for line in said.splitlines()]
    chances = torch.tensor([[float(cell) for cell in row[1:]] for row in rows], dtype=torch.float64)
    return head, [row[0] for row in rows], chances


def by_classifier(session: Session, encoded: list[Encoded], spelled: tuple[tuple[int, ...], ...] = ()) -> Tensor:
    """The probabilities that `Classifier` gives to rows of tokens, without a tokenizer."""
    layout = BatchShape.of(session.program.manifest)
    data = TextData(tuple(encoded), layout, layout.names, spelled, padding=0, config=PromptConfig())
    found = measure(session, data)
    assert found is not None and found.log_NC is not None
    return found.log_NC.exp()


def test_answers_of_rows(chooser: Case, tmp_path: Path) -> None:
    session, given = strayed(chooser, tmp_path)
    names, encoded = ["no", "yes\\t!", "maybe"], []
    for inputs, labels in chooser.data:
        for words, label in zip(inputs["input_ids"].tolist(), labels.tolist(), strict=True):
            place = next(place for place, token in enumerate(label) if token != IGNORED)
            encoded.append(Encoded((*words[:place], label[place]), 1, 0, 0))
    head, answers, chances = predicted(chooser.says("predict", "--load", given))
    assert head == ["predicted", *(f"p_{name}" for name in names)]
    wanted = by_classifier(session, encoded, ((9,), (5,), (2,)))
    torch.testing.assert_close(chances, wanted, rtol=2e-5, atol=1e-6)
    assert answers == [names[int(row.argmax())] for row in wanted] and len(set(answers)) > 1


def test_rows_without_answers(chooser: Case, tmp_path: Path) -> None:
    """They end where their mask does, and there may be any number of them."""
    session, given = strayed(chooser, tmp_path)
    tokens, data = tmp_path / "tokens", [(inputs, torch.full_like(labels, IGNORED)) for inputs, labels in chooser.data]
    write_tokens(tokens, chooser.program.manifest, data)
    head, *lines = tokens.read_text().splitlines()
    tokens.write_text("\n".join([head, *lines[:5]]))
    _, answers, chances = predicted(chooser.says("predict", "--load", given, tokens=tokens))
    last = [int(row.sum()) - 1 for inputs, _ in data for row in inputs["attention_mask"]]
    logits = torch.cat([session.evaluate(inputs) for inputs, _ in data])[range(6), last][:5, [9, 5, 2]]
    assert len(set(last)) > 1 and len(answers) == 5
    torch.testing.assert_close(chances, logits.double().softmax(-1), rtol=2e-5, atol=1e-6)
    assert "nothing is labelled" in chooser.cannot(BAD_DATA, "evaluate", tokens=tokens)
    tokens.write_text("\n".join([head, "1 2 3 4 5\t0 0 0 0 0\t" + " ".join([str(IGNORED)] * 5)]))
    assert "line 2 has no token" in chooser.cannot(BAD_DATA, "predict", tokens=tokens)
    tokens.write_text(head)
    assert "there are no rows" in chooser.cannot(BAD_DATA, "predict", tokens=tokens)
    session.load_state(torch.full_like(session.state(), 1e38))
    tokens.write_text("\n".join([head, lines[0]]))
    loud = str(session.export_ptd(tmp_path / "loud.ptd"))
    assert "are no numbers" in chooser.cannot(BAD_PROGRAM, "predict", "--load", loud, tokens=tokens)


def test_classes_of_rows(exact: Case, tmp_path: Path) -> None:
    session, given = strayed(exact, tmp_path)
    head, answers, chances = predicted(exact.says("predict", "--load", given))
    assert head == ["predicted", "p_0", "p_1", "p_2"], "numbers, where nobody named them"
    wanted = torch.cat([session.evaluate(inputs)["logits"].double().softmax(-1) for inputs, _ in exact.data])
    torch.testing.assert_close(chances, wanted, rtol=2e-5, atol=1e-6)
    assert answers == [str(int(row.argmax())) for row in wanted]


def test_a_state_in_a_data_file_trains(chooser: Case, tmp_path: Path) -> None:
    """And a step starts from the prefix of its rows."""
    assert chooser.program.manifest.state == "data" and chooser.program.manifest.prefix
    chooser.train(tmp_path / "cpp", 3)
    chooser.train(tmp_path / "cpp", 5, "--save", str(tmp_path / "state.ptd"))
    session = chooser.finetune(tmp_path / "python", 5)
    agree(*(read_journal(tmp_path / name / "journal", chooser.program) for name in ("cpp", "python")))
    assert torch.equal(restored(chooser, tmp_path / "cpp"), saved(tmp_path / "state.ptd"))
    session.load_state(saved(tmp_path / "state.ptd"))
    (tmp_path / "cpp" / SNAPSHOT).unlink()  # and the five steps are replayed
    for options in (("--run", str(tmp_path / "cpp")), ("--load", str(tmp_path / "state.ptd"))):
        said = chooser.says("evaluate", *options)
        assert float(said.split()[1]) == pytest.approx(mean_loss(session, chooser.data), rel=LOSS_ERROR, abs=1e-6)
    given = session.export_ptd(tmp_path / "given.ptd")
    chooser.train(tmp_path / "other", 0, "--load", str(given), "--save", str(tmp_path / "same.ptd"))
    assert (tmp_path / "same.ptd").read_bytes() == data_file.packed(session.state(), fingerprint(session.program))


def test_runs_of_exact_steps(exact: Case, tmp_path: Path) -> None:
    assert "whose runs this host cannot resume" in exact.refused(BAD_PROGRAM, tmp_path / "no")
    run, session = tmp_path / "run", exact.finetune(tmp_path / "run", 3)
    said = exact.says("evaluate", "--run", str(run))
    assert float(said.split()[1]) == pytest.approx(mean_loss(session, exact.data), rel=LOSS_ERROR, abs=1e-6)
    (run / SNAPSHOT).unlink()
    said = exact.cannot(BAD_RUN, "evaluate", "--run", str(run))
    assert "the last 3 steps are not in a saved state" in said and "finetune in Python" in said


def test_states_that_cannot_be_read(case: Case, chooser: Case, tmp_path: Path) -> None:
    assert "there is no run in this folder" in case.cannot(BAD_RUN, "evaluate", "--run", str(tmp_path))
    assert not list(tmp_path.iterdir()), "and none is made"
    _, other = strayed(chooser, tmp_path)
    assert "no tensor mobizo_lora_b of" in case.cannot(BAD_DATA, "evaluate", "--load", other)
    assert "exclude each other" in case.cannot(BAD_ARGUMENTS, "evaluate", "--load", other, "--run", str(tmp_path))
    case.train(tmp_path / "run", 2)
    with Journal(tmp_path / "run" / "journal", case.program):
        assert "another session" in case.cannot(LOCKED, "evaluate", "--run", str(tmp_path / "run"))
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [str(case.host), "evaluate", str(case.path), str(case.tokens)], stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 1 and b"could not be written" in done.stderr
    done = case.read("evaluate", "--run", str(tmp_path / "run"), "--quiet", "--threads", "1")
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1


def test_what_a_program_cannot_do(case: Case, chooser: Case, tmp_path: Path) -> None:
    assert "the program's loss is causal-lm, whose answers are no closed set" in case.cannot(BAD_PROGRAM, "predict")
    said = case.cannot(BAD_PROGRAM, "generate", "--prompt", "1", "--steps", "1")
    assert "it has no method forward" in said and "GenerateConfig" in said
    unknown = edited(case, tmp_path, '"name": "causal-lm"', '"name": "causal-xy"')
    assert "the program's loss is causal-xy; this host computes" in case.cannot(
        BAD_PROGRAM, "evaluate", program=unknown
    )
    two = tmp_path / "two"
    two.write_text(chooser.tokens.read_text().replace("-100 -100 9", "-100 9 9", 1))
    assert ":2: there are 2 labels; the loss was compiled for at most 1" in chooser.cannot(
        BAD_DATA, "predict", tokens=two
    )


@pytest.fixture(scope="module")
def speaker(host: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A decoder that generates with a cache, and whose state is in a data file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.4,
    )
    words = torch.randint(0, 97, (2, 6))
    program = mobizo.compile(
        LlamaForCausalLM(config).eval(),
        {"input_ids": words},
        LoraConfig(r=2),
        ZOConfig(queries=1),
        state="data",
        generate=GenerateConfig(32, stop_ids=()),
    )
    return Case(host, tmp_path_factory.mktemp("speaker"), program, [({"input_ids": words}, words)])


@pytest.mark.slow
def test_tokens_that_go_on_with_a_prompt(speaker: Case, tmp_path: Path) -> None:
    prompt, texts = [3, 50, 7], []
    session, given = strayed(speaker, tmp_path)
    speaker.train(tmp_path / "run", 2)
    trained = Session(speaker.program)
    trained.restore(tmp_path / "run")
    (tmp_path / "run" / SNAPSHOT).unlink()  # so that the host replays before it generates
    for options, state in (
        (("--load", given), session),
        ((), Session(speaker.program)),
        (("--run", str(tmp_path / "run")), trained),
    ):
        done = speaker.read("generate", "--prompt", "3 50  7", "--steps", "64", *options)
        texts.append([int(word) for word in done.stdout.split(" ")])
        assert texts[-1] == list(state.generate(prompt, 64))
        assert done.stdout.endswith("\n") and "ended by a full cache" in done.stderr and len(texts[-1]) == 30
    assert len(set(texts[0])) > 10 and texts[0] != texts[1]
    text = texts[0]
    done = speaker.read("generate", "--prompt", "3 50 7", "--steps", "5", "--load", given, "--quiet")
    assert (done.stdout, done.stderr) == (" ".join(map(str, text[:5])) + "\n", "")
    last = next(place for place, token in enumerate(text) if place > 3 and token not in text[:place])
    stops = f"{text[last]} 96" if 96 not in text else str(text[last])
    done = speaker.read("generate", "--prompt", "3 50 7", "--steps", "64", "--load", given, "--stop", stops)
    assert [int(word) for word in done.stdout.split()] == text[:last] and "ended by a stop token" in done.stderr
    for prompt_given, said in (
        ("", "--prompt is empty"),
        ("1 -2", "--prompt is '-2', which is no whole number of 0 or more"),
        ("1 97", "--prompt has the token 97, outside 0..96"),
        (" ".join(["1"] * 32), "--prompt has 32 tokens, and the cache has room for 32"),
    ):
        assert said in speaker.cannot(BAD_ARGUMENTS, "generate", "--prompt", prompt_given, "--steps", "1")


@pytest.mark.slow
def test_tokens_come_one_by_one(speaker: Case) -> None:
    """Each is written when it is there: a packet is what one call has written."""
    command = [str(speaker.host), "generate", str(speaker.path), "--prompt", "3", "--steps", "9", "--quiet"]
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with its, subprocess.Popen(command, stdout=its) as process:
            assert process.wait() == 0
        packets = list(iter(lambda: ours.recv(1000).decode(), ""))
    wanted = [str(token) for token in Session(speaker.program).generate([3], 9)]
    assert packets == [wanted[0], *(f" {token}" for token in wanted[1:]), "\n"]


@pytest.mark.parametrize(
    "name", ["case", "passed", "chooser", "exact", pytest.param("speaker", marks=pytest.mark.slow)]
)
def test_a_bundle_is_verified(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    case: Case = request.getfixturevalue(name)
    bundle = mobizo.write_bundle(case.path, tmp_path / "bundle")
    wanted = mobizo.verify_bundle(case.path, bundle)
    lines = case.says("verify", tokens=bundle).splitlines()
    assert lines[-1] == f"{len(wanted)} values agree"
    found = dict(re.findall(r"^(.*): the (.*) is .*, of at most .*$", "\n".join(lines), re.MULTILINE))
    assert set(found) == {key.partition(",")[0] for key in wanted}
    assert case.says("verify", "--quiet", tokens=bundle) == ""
    whole, copy = read_bundle(bundle), tmp_path / "other"
    for value in found.keys() - {"again/state"}:
        other = whole.tensors[f"wanted {value}"] + 10
        dataclasses.replace(whole, tensors={**whole.tensors, f"wanted {value}": other}).write(copy)
        assert f": {value}: the " in case.cannot(OTHER_NUMBERS, "verify", tokens=copy)


def test_bundles_that_are_none(case: Case, passed: Case, tmp_path: Path) -> None:
    bundle = mobizo.write_bundle(case.path, tmp_path / "bundle")
    assert "the bundle is of another program" in passed.cannot(BAD_DATA, "verify", tokens=bundle)
    data = bytearray(bundle.read_bytes())
    data[-3] ^= 1
    for content, problem in (
        (bytes(data), "its checksum is another"),
        (bytes(data[:-8]), "cut off"),
        (b"{}", "no safetensors file, or cut off"),
        ((tmp_path / "bundle").read_bytes().replace(b"mobizo_bundle", b"mobizo_bumble"), "this is no bundle"),
    ):
        (tmp_path / "bad").write_bytes(content)
        assert problem in case.cannot(BAD_DATA, "verify", tokens=tmp_path / "bad")
    whole = read_bundle(bundle)
    lacking = {name: tensor for name, tensor in whole.tensors.items() if name != "start"}
    dataclasses.replace(whole, tensors=lacking).write(tmp_path / "bad")
    assert "it has no value start" in case.cannot(BAD_DATA, "verify", tokens=tmp_path / "bad")


def test_quiet_is_quiet(case: Case, tmp_path: Path) -> None:
    loud = case.train(tmp_path / "loud", 2, "--threads", "1")
    done = case.train(tmp_path / "run", 2, "--threads", "1", "--quiet", "--save", str(tmp_path / "state.ptd"))
    assert (done.stdout, done.stderr) == ("", "") and len(loud.stdout.splitlines()) == 4
    assert (tmp_path / "run" / "journal").read_bytes() == (tmp_path / "loud" / "journal").read_bytes()
    os.truncate(tmp_path / "run" / "journal", 100)
    done = case.train(tmp_path / "run", 2, "--quiet")
    assert done.stdout == "" and all(line.startswith("warning: ") for line in done.stderr.splitlines())
    assert len(done.stderr.splitlines()) == 2, "warnings stay"
    assert "there is no option" in case.refused(BAD_ARGUMENTS, tmp_path / "run", 2, "--quiet", "--option", "1")


def test_an_empty_journal(case: Case, tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(b"")
    assert "warning: the journal is empty, and is begun anew" in case.train(tmp_path, 2).stderr
    assert len(read_journal(tmp_path / "journal", case.program)) == 2
    (tmp_path / "journal").write_bytes(b"")
    assert "there is a snapshot.safetensors of later steps" in case.refused(BAD_RUN, tmp_path, 3)


def test_a_private_run_is_not_gone_on_with(case: Case, tmp_path: Path) -> None:
    (tmp_path / "privacy.json").write_text("{}")
    assert "the run is private" in case.refused(BAD_RUN, tmp_path, 2) and not (tmp_path / "journal").exists()


def test_what_killed_hosts_left_is_removed(case: Case, tmp_path: Path) -> None:
    """As Python does it, which names and locks its temporary files alike: what is locked is being written."""
    case.train(tmp_path, 0)
    dead = tmp_path / f".{SNAPSHOT}.0123abcd.partial"
    living, others = tmp_path / f".{SNAPSHOT}.4567abcd.partial", tmp_path / f".{SNAPSHOT}.settings"
    for path in (dead, living, others):
        path.write_bytes(b"half")
    with living.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        case.train(tmp_path, 1)
        assert not dead.exists() and living.exists() and others.exists()
    case.train(tmp_path, 2)
    assert not living.exists() and others.exists()

    def killed() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500,) * 2)  # and SIGXFSZ ends the process

    done = subprocess.run(case.command(tmp_path / "run", 1), capture_output=True, preexec_fn=killed)
    assert done.returncode == -signal.SIGXFSZ
    (left,) = (tmp_path / "run").glob(".*")
    assert left.name.startswith(f".{START}.") and left.name.endswith(".partial")
    case.finetune(tmp_path / "run", 1)
    assert not list((tmp_path / "run").glob(".*")), "Python removes what the host left"


def test_the_calls_of_a_phone(passed: Case) -> None:
    """What `examples/android` and `examples/ios` call, in the same order, with nothing that these bindings lack."""
    from executorch.runtime import Runtime

    module = Runtime.get().load_program(passed.path)
    execute = {name: module.load_method(name).execute for name in module.method_names}
    manifest = json.loads(execute["mobizo_manifest"]([])[0])
    assert manifest["format_version"] == FORMAT_VERSION and manifest["state"] == "io"
    state = torch.zeros(sum(site["r"] * (len(site["outputs"]) or site["out_features"]) for site in manifest["sites"]))

    (rows, labels) = passed.data[0]
    assert len(rows) == len(manifest["inputs"])
    session = Session(passed.program)
    journal = []
    rate, eps = torch.tensor([LEARNING_RATE]), torch.tensor([manifest["eps"]])
    for step in range(3):
        seed = torch.tensor([step_seed(0, step)], dtype=torch.int32)
        outputs = execute["train_step"]([*rows, labels, seed, rate, eps, state])
        assert [list(output.shape) for output in outputs] == [[1], [2 * QUERIES], [QUERIES], list(state.shape)]
        journal.append((seed, outputs[2].clone()))
        state = outputs[3].clone()
        wanted = session.train_step(rows, labels, seed=int(seed), learning_rate=LEARNING_RATE)
        assert torch.equal(outputs[2], wanted.projected_gradient) and float(outputs[0]) == wanted.loss
        assert torch.equal(state, session.state())
    (logits,) = execute["evaluate"]([*rows, state])
    assert torch.equal(logits, session.evaluate(rows))
    again = torch.zeros_like(state)
    for seed, gradient in journal:
        again = execute["replay"]([seed, gradient, rate, again])[0].clone()
    assert state.any() and torch.equal(again, state)


def test_the_sources_for_phones_name_what_there_is(passed: Case) -> None:
    """Methods and fields of the manifest; the format that they know is the one that is written."""
    manifest = json.loads(passed.program.manifest.to_json())
    fields = {*manifest, *manifest["labels"], *manifest["sites"][0]}
    kotlin = (ROOT / "examples" / "android" / "Trainer.kt").read_text()
    swift = (ROOT / "examples" / "ios" / "Trainer.swift").read_text()
    methods = {"train_step", "evaluate", "replay", "mobizo_manifest"}
    assert set(re.findall(r'execute\(\s*"(\w+)"', kotlin)) == set(re.findall(r'execute\(\s*"(\w+)"', swift)) == methods
    assert set(re.findall(r'(?:get\w+|isNull)\("(\w+)"\)', kotlin)) <= fields
    declared = swift[swift.index("struct Manifest") :]
    named = re.findall(r"let (\w+):", declared)
    assert len(named) > 10 and {re.sub("[A-Z]", lambda m: "_" + m[0].lower(), name) for name in named} <= fields
    for source in (kotlin, swift):
        assert re.findall(r'(?:"format_version"\)|formatVersion) == (\d+)', source) == [str(FORMAT_VERSION)]
    assert (ROOT / "docs" / "program_format.md").read_text().startswith(f"# Program format, version {FORMAT_VERSION}\n")


def test_the_documented_commands(host: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The code of docs/hosts.md from top to bottom; the host is built already."""
    blocks = re.findall(
        r"^```(bash|python)\n(.*?)^```", (ROOT / "docs" / "hosts.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert [kind for kind, _ in blocks] == ["bash", "python", "bash", "python", "bash"] and "cmake" in blocks[0][1]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for kind, code in blocks[1:]:
        if kind == "python":
            exec(compile(code, "hosts.md", "exec"), names)
        else:
            command = code.replace("build/cpp_host/mobizo_host", str(host)).split()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    session = names["session"]
    assert isinstance(session, Session) and session.state().any() and Path("state.ptd").exists()


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "8da4w"])
def test_smollm2(quantization: str | None, host: Path, tmp_path: Path) -> None:
    """The whole model: the journal of Python, in a process of a size that phones have."""
    from examples.smollm2 import cache_folder, load_smollm2

    tokenizer, model = load_smollm2()
    texts = ["A quiet film that says much. It was great", "Two hours that feel like four. It was terrible"]
    tokenizer.padding_side = "right"
    encoded = tokenizer(texts, padding="max_length", max_length=64, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    last = inputs["attention_mask"].sum(1) - 1
    labels = torch.full((2, 64), -100)
    labels[range(2), last] = inputs["input_ids"][range(2), last]
    program = mobizo.compile(
        model,
        inputs,
        zo=ZOConfig(queries=4),
        loss=CausalLMLoss(max_labels=1),
        quantization=quantization,
        cache_dir=cache_folder() / "programs",
    )
    del model
    case = Case(host, tmp_path, program, [(inputs, labels)])
    done = case.train(tmp_path / "cpp", 3, "--save", str(tmp_path / "state.ptd"))
    case.finetune(tmp_path / "python", 3)
    found, wanted = (read_journal(tmp_path / name / "journal", case.program) for name in ("cpp", "python"))
    assert (tmp_path / "cpp" / "journal").read_bytes()[:64] == (tmp_path / "python" / "journal").read_bytes()[:64]
    agree(found, wanted)
    assert torch.equal(saved(tmp_path / "state.ptd"), restored(case, tmp_path / "cpp"))
    (peak,) = re.findall(r"peak memory (\d+) kB", done.stdout)
    assert int(peak) * 1024 < 2 * case.path.stat().st_size, (
        "one copy of the weights, the file's pages, and a little more"
    )
