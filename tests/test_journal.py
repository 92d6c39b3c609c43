"""Runs that survive: whatever happens to the process or the files, the state is right or there is a clear error."""

from __future__ import annotations

import functools
import math
import os
import random
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mobizo_compiler as mobizo
from mobizo_compiler import JournalWarning, LoraConfig, Session, ZOConfig
from mobizo_compiler.device.journal import Journal, Record, pack_journal, read_journal, unpack_journal
from mobizo_compiler.device.run import SNAPSHOT, START, read_state, step_seed, write_state
from mobizo_compiler.errors import InputError, JournalError, JournalLockedError
from tests.killed_run import survives

TRAINING: dict[str, Any] = {"learning_rate": 0.05, "eps": 0.01}


def compiled(backend: str = "eager", queries: int = 2, seed: int = 0, **options: Any) -> mobizo.Program:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(16, 12), nn.Linear(12, 16)).eval()
    lora = LoraConfig(r=3, target_modules=("1",))
    return mobizo.compile(model, batch(0)[0], lora, ZOConfig(queries=queries), backend=backend, **options)


def batch(step: int) -> tuple[tuple[Tensor], Tensor]:
    tokens = torch.randint(0, 16, (2, 5), generator=torch.Generator().manual_seed(step))
    return (tokens,), tokens


@functools.cache
def shared() -> mobizo.Program:
    return compiled()


@pytest.fixture(scope="module")
def program() -> mobizo.Program:
    return shared()


def uninterrupted(program: mobizo.Program, steps: int) -> Session:
    session = Session(program)
    for step in range(steps):
        inputs, labels = batch(step)
        session.train_step(inputs, labels, seed=step_seed(0, step), **TRAINING)
    return session


def test_a_run_goes_on_where_it_was(program: mobizo.Program, tmp_path: Path) -> None:
    seen: list[int] = []
    first = Session(program).finetune(
        batch, steps=7, run=tmp_path, snapshot_every=3, on_step=lambda step, _: seen.append(step), **TRAINING
    )
    again = Session(program)
    second = again.finetune(batch, steps=11, run=tmp_path, on_step=lambda step, _: seen.append(step), **TRAINING)
    assert (first.steps, first.resumed_at, second.steps, second.resumed_at) == (7, 0, 11, 7)
    assert seen == list(range(11)) and second.losses[:7] == first.losses
    assert torch.equal(again.state(), uninterrupted(program, 11).state())
    finished = Session(program)
    assert finished.finetune(batch, steps=11, run=tmp_path, **TRAINING).resumed_at == 11
    assert torch.equal(finished.state(), again.state())


def test_a_run_starts_from_the_state_of_the_session(program: mobizo.Program, tmp_path: Path) -> None:
    session, other = Session(program), Session(program)
    session.load_state(torch.ones(program.parameters))
    session.finetune(batch, steps=2, run=tmp_path, **TRAINING)
    (tmp_path / SNAPSHOT).unlink()
    assert other.restore(tmp_path) == 2
    assert torch.equal(other.state(), session.state())


def test_batches_may_be_a_sequence_and_the_rate_a_schedule(program: mobizo.Program, tmp_path: Path) -> None:
    batches, rates = [batch(0), batch(1)], [0.5, 0.25, 0.125]
    Session(program).finetune(batches, steps=3, run=tmp_path, learning_rate=rates.__getitem__, seed=5)
    records = read_journal(tmp_path / "journal", program)
    assert [record.learning_rate for record in records] == rates
    assert [record.seed for record in records] == [step_seed(5, step) for step in range(3)]
    session = Session(program)
    for record in records:
        inputs, labels = batches[record.step % 2]
        result = session.train_step(
            inputs, labels, seed=record.seed, learning_rate=record.learning_rate, eps=program.manifest.eps
        )
        assert tuple(result.projected_gradient.tolist()) == record.projected_gradient
        assert torch.tensor(result.loss) == torch.tensor(record.loss)


@pytest.mark.parametrize(("kills", "steps"), [(50, 60), pytest.param(200, 60, marks=pytest.mark.slow)])
def test_kills_at_random_instants(kills: int, steps: int, tmp_path: Path) -> None:
    """In the stock runtime: during steps, journal writes and snapshots."""
    survives(compiled("portable"), tmp_path, kills, steps)


@pytest.mark.parametrize("kept", [0, 1, 5, 31])
def test_a_torn_record_is_cut_off(kept: int, program: mobizo.Program, tmp_path: Path) -> None:
    Session(program).finetune(batch, steps=5, run=tmp_path, **TRAINING)
    (tmp_path / SNAPSHOT).unlink()
    path = tmp_path / "journal"
    size = path.stat().st_size
    os.truncate(path, size - 32 + kept)
    session = Session(program)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", JournalWarning)
        assert session.restore(tmp_path) == 4
    said = [str(w.message) for w in caught if w.category is JournalWarning]
    assert len(said) == (kept > 0) and all(f"the last {kept} bytes were not a whole step" in text for text in said)
    assert torch.equal(session.state(), uninterrupted(program, 4).state())
    assert path.stat().st_size == size - 32
    session.finetune(batch, steps=5, run=tmp_path, **TRAINING)
    assert torch.equal(session.state(), uninterrupted(program, 5).state())


def test_corrupted_files(program: mobizo.Program, tmp_path: Path) -> None:
    """500 times something is wrong with the journal or a saved state: a right state or an error, and nothing else."""
    run = tmp_path / "run"
    Session(program).finetune(batch, steps=6, run=run, snapshot_every=2, **TRAINING)
    original = {path.name: path.read_bytes() for path in run.iterdir()}
    states = [uninterrupted(program, steps).state() for steps in range(7)]
    rng = random.Random(0)
    outcomes = {"error": 0, "right": 0}
    for turn in range(500):
        for name, data in original.items():
            (run / name).write_bytes(data)
        victim = run / rng.choice(["journal", "journal", START, SNAPSHOT])
        data = bytearray(victim.read_bytes())
        kind = turn % 4
        if kind == 0:
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[rng.randrange(len(data)) :]
        elif kind == 2:
            data = bytearray(rng.randbytes(rng.randrange(2 * len(data))))
        else:
            data += rng.choice([b"\0" * 40, rng.randbytes(50), bytes(data)])
        victim.write_bytes(data)
        session = Session(program)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", JournalWarning)
            try:
                steps = session.restore(run)
            except JournalError as error:
                assert str(victim) in str(error) or str(run) in str(error)
                outcomes["error"] += 1
                assert torch.equal(session.state(), states[0]), "an error leaves the state alone"
                continue
        outcomes["right"] += 1
        assert torch.equal(session.state(), states[steps]), (turn, victim.name, kind)
    assert min(outcomes.values()) > 50, outcomes


def test_every_bit_of_what_a_saved_state_says_counts(program: mobizo.Program, tmp_path: Path) -> None:
    """The number of its step above all: with another one, steps would be replayed twice or not at all."""
    session = uninterrupted(program, 6)
    path = tmp_path / SNAPSHOT
    write_state(path, session, 6)
    whole = path.read_bytes()
    described = 8 + int.from_bytes(whole[:8], "little")
    for bit in range(8 * described):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            state, step = read_state(path, session)
        except JournalError:
            continue
        assert step == 6 and torch.equal(state, session.state()), f"bit {bit}"


def test_damage_in_the_middle_is_not_skipped(program: mobizo.Program, tmp_path: Path) -> None:
    Session(program).finetune(batch, steps=5, run=tmp_path, **TRAINING)
    data = bytearray((tmp_path / "journal").read_bytes())
    data[64 + 2 * 32 + 9] ^= 4
    (tmp_path / "journal").write_bytes(data)
    with pytest.raises(JournalError, match=r"step 2 is damaged(.|\n)*truncate the file to 128 bytes"):
        Session(program).finetune(batch, steps=6, run=tmp_path, **TRAINING)


@pytest.mark.parametrize("other", [{"queries": 3}, {"seed": 1}], ids=["queries", "weights"])
def test_a_journal_of_another_program_is_refused(
    other: dict[str, Any], program: mobizo.Program, tmp_path: Path
) -> None:
    Session(program).finetune(batch, steps=1, run=tmp_path, **TRAINING)
    with pytest.raises(JournalError, match="of another program"):
        Session(compiled(**other)).finetune(batch, steps=2, run=tmp_path, **TRAINING)


@pytest.mark.slow
def test_the_same_model_on_another_engine_is_the_same_program(program: mobizo.Program, tmp_path: Path) -> None:
    Session(program).finetune(batch, steps=3, run=tmp_path, **TRAINING)
    other = Session(compiled("portable", quantization="int8"))
    assert other.restore(tmp_path) == 3
    assert torch.equal(other.state(), uninterrupted(program, 3).state())


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_a_replay_is_the_same_bits_on_every_engine_of_executorch(rule: str) -> None:
    """And in PyTorch, which adds few directions in the same order."""
    states = []
    for backend in ("portable", "xnnpack", "eager"):
        session = Session(compiled(backend, rule=rule, queries=4))
        generator = torch.Generator().manual_seed(0)
        for seed in range(200):
            session.replay(seed, torch.randn(4, generator=generator), 0.01)
        states.append(session.state())
    assert states[0].any() and all(torch.equal(states[0], state) for state in states[1:])


def test_two_sessions_do_not_share_a_journal(program: mobizo.Program, tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", program):
        with pytest.raises(JournalLockedError, match="another session"):
            Journal(tmp_path / "journal", program)
        script = (
            "import sys, pytest, mobizo_compiler as m; sys.path.insert(0, sys.argv[2]); import test_journal as t\n"
            "from mobizo_compiler.errors import JournalLockedError\n"
            "with pytest.raises(JournalLockedError): t.Journal(sys.argv[1] + '/journal', t.compiled())"
        )
        command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    Journal(tmp_path / "journal", program).close()


def test_a_full_disk(program: mobizo.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full would do, but cannot be truncated: a file that takes half a record and then nothing."""
    Session(program).finetune(batch, steps=2, run=tmp_path, **TRAINING)

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            self.file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    with Journal(tmp_path / "journal", program) as journal:
        journal._file = Full(journal._file)
        with pytest.raises(JournalError, match=r"No space left on device(.|\n)*the journal is whole and holds 2 steps"):
            journal.append(Record(2, 1, 0.1, 0.1, 0.1, (0.0, 1.0)))
    assert len(read_journal(tmp_path / "journal", program)) == 2
    assert Session(program).finetune(batch, steps=3, run=tmp_path, **TRAINING).resumed_at == 2


@functools.cache
def regression(backend: str) -> mobizo.Program:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(layer=nn.Linear(4, 3))).eval()
    lora, zo, loss = LoraConfig(r=2), ZOConfig(queries=2), mobizo.MSELoss()
    return mobizo.compile(model, (torch.randn(2, 4),), lora, zo, loss=loss, backend=backend)


@pytest.mark.xdist_group("journal")  # one process, so that each program is made once
@pytest.mark.parametrize("backend", ["eager", "xnnpack", pytest.param("portable", marks=pytest.mark.slow)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(value: float, backend: str, tmp_path: Path) -> None:
    program = regression(backend)
    generator = torch.Generator().manual_seed(0)
    good, bad = torch.randn(2, 4, generator=generator), torch.randn(2, 4, generator=generator)
    bad[1, 2] = value
    session, target = Session(program), torch.zeros(2, 3)
    session.train_step((good,), target, seed=1, **TRAINING)
    before = session.state()
    assert not math.isfinite(session.train_step((bad,), target, seed=2, **TRAINING).loss)
    assert torch.equal(session.state(), before)

    batches = [((good,), target), ((bad,), target), ((good,), target)]
    summary = Session(program).finetune(batches, steps=3, run=tmp_path, **TRAINING)
    assert summary.void == (1,) and math.isfinite(summary.losses[2])
    again = Session(program)
    (tmp_path / SNAPSHOT).unlink()
    again.restore(tmp_path)
    last = Session(program)
    for step in (0, 2):
        last.train_step((good,), target, seed=step_seed(0, step), **TRAINING)
    assert torch.equal(again.state(), last.state())


def test_merged_journals_average_what_devices_learned(program: mobizo.Program, tmp_path: Path) -> None:
    devices = []
    for device in range(3):
        session = Session(program)
        session.finetune(batch, steps=4, run=tmp_path / str(device), seed=device, **TRAINING)
        devices.append(session.state())
    server = Session(program)
    assert server.merge([tmp_path / str(device) / "journal" for device in range(3)]) == 12
    torch.testing.assert_close(server.state(), torch.stack(devices).mean(0), rtol=1e-5, atol=1e-7)
    (tmp_path / "2" / "journal").write_bytes(b"nothing")
    before = server.state()
    with pytest.raises(JournalError, match="not a journal"):
        server.merge([tmp_path / str(device) / "journal" for device in range(3)])
    assert torch.equal(server.state(), before)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2**31 - 1), st.floats(width=32), st.lists(st.floats(width=32), min_size=2, max_size=2))
    )
)
def test_records_come_back(steps: list[tuple[int, float, list[float]]]) -> None:
    import tempfile

    program = shared()
    with tempfile.TemporaryDirectory() as folder:
        records = [Record(i, seed, 0.5, 0.25, loss, tuple(g)) for i, (seed, loss, g) in enumerate(steps)]
        with Journal(Path(folder) / "journal", program) as journal:
            for record in records:
                journal.append(record)
        assert str(read_journal(Path(folder) / "journal", program)) == str(records)


def test_a_journal_as_bytes(program: mobizo.Program, tmp_path: Path) -> None:
    """They are those of the file, and every one of them counts: nothing that was sent may be cut off in silence."""
    Session(program).finetune(batch, steps=3, run=tmp_path, **TRAINING)
    data = (tmp_path / "journal").read_bytes()
    records = unpack_journal(data, program, "what came")
    assert records == read_journal(tmp_path / "journal", program) and pack_journal(records, program) == data
    assert unpack_journal(pack_journal([], program), program, "nothing") == []
    for length in set(range(len(data))) - {64, 64 + 32, 64 + 2 * 32}:
        with pytest.raises(JournalError, match="at: what came"):
            unpack_journal(data[:length], program, "what came")
    for position in range(len(data)):
        with pytest.raises(JournalError):
            unpack_journal(data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :], program, "what came")
    with pytest.raises(JournalError, match="record 0 says that it is step 1"):
        pack_journal(records[1:], program)
    with pytest.raises(JournalError, match="another program"):
        unpack_journal(data, compiled(seed=1), "what came")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"batches": iter([])}, "a function of the step, or a sequence"),
        ({"batches": []}, "a function of the step, or a sequence"),
        ({"steps": -1}, "steps is -1"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"snapshot_every": 0}, "snapshot_every is 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], match: str, program: mobizo.Program, tmp_path: Path) -> None:
    given_ = {"batches": batch, "steps": 1, "run": tmp_path / "run", **TRAINING, **arguments}
    with pytest.raises(InputError, match=match):
        Session(program).finetune(given_.pop("batches"), **given_)


def test_there_is_no_run(program: mobizo.Program, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no run in this folder"):
        Session(program).restore(tmp_path)
    with pytest.raises(JournalError, match="there is no folder"):
        Journal(tmp_path / "no" / "journal", program)
