"""Sessions side by side: on one file, in one process or two, they compute what each computes alone."""

from __future__ import annotations

import gc
import logging
import pickle
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.runtime import Method, Runtime
from torch import Tensor

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, StepResult, ZOConfig
from mobizo_compiler.errors import MobizoError, SessionBusyError
from mobizo_compiler.testing import TokenWise

pytestmark = pytest.mark.xdist_group("concurrency")  # one process, so that its programs are made once

ROOT = Path(__file__).parent.parent
BACKENDS = ("xnnpack", pytest.param("portable", marks=pytest.mark.slow))
TRAINING: dict[str, Any] = {"learning_rate": 0.1, "eps": 0.02}
STEPS = 6


def compiled(folder: Path, backend: str, seed: int) -> Path:
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, target_modules=("up", "head"))
    program = mobizo.compile(TokenWise().eval(), batch(0)[0], lora, ZOConfig(queries=2), backend=backend)
    return program.save(folder / f"{backend}{seed}.pte")


class Files(dict[str, Path]):
    """Two programs of XNNPACK with other weights, and one of portable kernels, made when they are asked for."""

    PROGRAMS = {"xnnpack": ("xnnpack", 0), "other": ("xnnpack", 1), "portable": ("portable", 0)}

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Path:
        self[name] = compiled(self.folder, *self.PROGRAMS[name])
        return self[name]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return Files(tmp_path_factory.mktemp("concurrency"))


def batch(number: int) -> tuple[tuple[Tensor], Tensor]:
    tokens = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(number))
    return (tokens,), tokens


def step(session: Session, number: int) -> StepResult:
    inputs, labels = batch(number)
    return session.train_step(inputs, labels, seed=number, **TRAINING)


def trained(session: Session, first: int) -> tuple[Tensor, Tensor]:
    """State and logits after some steps."""
    for number in range(first, first + STEPS):
        step(session, number)
    return session.state(), session.evaluate(batch(0)[0])


def alone(file: Path, first: int) -> tuple[Tensor, Tensor]:
    found = trained(Session(file), first)
    gc.collect()
    return found


def same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_sessions_in_turns(files: dict[str, Path], backend: str) -> None:
    """Two of one file, and one of another model between them; one of them ends before the others."""
    wanted = [alone(files[backend], 0), alone(files[backend], 100), alone(files["other"], 0)]
    assert not torch.equal(wanted[0][0], wanted[1][0]) and not torch.equal(wanted[0][0], wanted[2][0])
    sessions = [Session(files[backend]), Session(files[backend]), Session(files["other"])]
    passing = Session(files[backend])
    for number in range(STEPS):
        for session, first in zip(sessions, (0, 100, 0), strict=True):
            step(session, first + number)
            step(passing, number) if number < 3 else None
        if number == 3:  # it shares packed weights with the others
            del passing
            gc.collect()
    found = [(s.state(), s.evaluate(batch(0)[0])) for s in sessions]
    assert all(same(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sessions_in_threads(files: dict[str, Path], backend: str) -> None:
    """Each thread loads, trains and drops sessions of its own."""
    firsts = (0, 100)
    wanted = [alone(files[backend], first) for first in firsts]
    ready = threading.Barrier(len(firsts))

    def work(first: int) -> list[tuple[Tensor, Tensor]]:
        ready.wait()
        return [trained(Session(files[backend]), first) for _ in range(3)]

    with ThreadPoolExecutor(len(firsts)) as pool:
        for results, expected in zip(pool.map(work, firsts), wanted, strict=True):
            assert all(same(found, expected) for found in results)


@pytest.mark.slow
def test_sessions_in_processes(files: dict[str, Path], tmp_path: Path) -> None:
    firsts = (0, 100)
    wanted = [alone(files["xnnpack"], first) for first in firsts]
    code = (
        "import sys, torch; from pathlib import Path; from mobizo_compiler import Session\n"
        "from tests.test_concurrency import trained\n"
        "torch.set_num_threads(int(sys.argv[4]))\n"
        "torch.save(trained(Session(sys.argv[1]), int(sys.argv[2])), sys.argv[3])\n"
    )
    outputs = [tmp_path / f"{first}.pt" for first in firsts]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, files["xnnpack"], str(first), output, str(torch.get_num_threads())],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for first, output in zip(firsts, outputs, strict=True)
    ]
    for process, output, expected in zip(running, outputs, wanted, strict=True):
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]
        assert same(torch.load(output), expected)


CALLS: dict[str, Callable[[Session], object]] = {
    "train_step": lambda session: step(session, 0),
    "evaluate": lambda session: session.evaluate(batch(0)[0]),
    "replay": lambda session: session.replay(1, [0.0, 0.0], 0.1),
    "state": lambda session: session.state(),
    "load_state": lambda session: session.load_state(torch.zeros(5)),
    "lora_b": lambda session: session.lora_b(session.program.sites[0].fqn),
    "merge": lambda session: session.merge(["nothing"]),
    "finetune": lambda session: session.finetune([batch(0)], steps=1, learning_rate=0.1, run="nowhere"),
    "restore": lambda session: session.restore("nowhere"),
    "export_ptd": lambda session: session.export_ptd("nowhere.ptd"),
}


def test_one_session_is_for_one_thread_at_a_time(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session = Session(files["xnnpack"])
    found: dict[str, BaseException | None] = {}

    def from_another_thread() -> None:
        with ThreadPoolExecutor(1) as pool:
            found.update({name: pool.submit(call, session).exception() for name, call in CALLS.items()})

    with session.lane(0, seed=1, eps=0.1):
        lane = session.state()
        from_another_thread()
        assert torch.equal(session.state(), lane)
        session.evaluate(batch(0)[0])
    assert {name: type(error) for name, error in found.items()} == dict.fromkeys(CALLS, SessionBusyError)
    assert "Session(session.program)" in str(found["evaluate"])
    assert not session.state().any()

    found.clear()
    session.finetune([batch(0)], steps=1, run="run", on_step=lambda number, result: from_another_thread(), **TRAINING)
    assert {name: type(error) for name, error in found.items()} == dict.fromkeys(CALLS, SessionBusyError)
    from_another_thread()
    free = {name for name, error in found.items() if not isinstance(error, SessionBusyError)}
    assert free == set(CALLS), "a thread after another may use it"
    assert all(error is None or isinstance(error, MobizoError) for error in found.values()), found


def test_a_session_changes_nothing_of_its_process(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while it loads and runs either: what other threads print and log is theirs."""
    load, execute = Runtime.load_program, Method.execute
    seen = []

    def now() -> list[object]:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        filters = [*warnings.filters]
        return [sys.stdout, sys.stderr, logging.root.manager.disable, filters, handlers, torch.get_num_threads()]

    def looked_at(inner: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.append(now())
            return inner(*arguments, **options)

        return call

    monkeypatch.setattr(Runtime, "load_program", looked_at(load))
    monkeypatch.setattr(Method, "execute", looked_at(execute))
    before = now()
    session = Session(files["xnnpack"])
    inputs, labels = batch(0)
    session.finetune([(inputs, labels)], steps=2, learning_rate=0.1, run=tmp_path / "run")
    session.evaluate(inputs)
    session.export_ptd(tmp_path / "state.ptd")
    assert len(seen) > 4 and all(found == before for found in [*seen, now()])


def test_errors_come_whole_from_another_process() -> None:
    """Pools of processes send them by pickle, which makes an exception again of its arguments."""
    error = SessionBusyError("in use", where="here", hint="wait")
    error.add_note("while training")
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is SessionBusyError and str(found) == str(error)
    assert (found.where, found.hint, found.__notes__) == ("here", "wait", ["while training"])


def test_compiling_in_two_threads() -> None:
    """One waits for the other: what torch knows of a trace under way is the process's."""
    enabled, models = gc.isenabled(), [TokenWise().eval() for _ in range(2)]

    def compiles(number: int) -> tuple[Tensor, Tensor]:
        lora = LoraConfig(r=4, target_modules=("up", "head"))
        program = mobizo.compile(models[number], batch(0)[0], lora, ZOConfig(queries=2), backend="portable")
        return trained(Session(program), 0)

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(compiles, (0, 1)))
    assert gc.isenabled() == enabled
    for number, found in enumerate(made):
        assert all(torch.equal(a, b) for a, b in zip(found, compiles(number), strict=True))
