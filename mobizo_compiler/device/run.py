"""Training that survives: `Session.finetune`, `Session.restore`, and what it leaves in a folder.

    journal               what every step did; see `journal.py`
    privacy.json          of private runs: what they may tell; see `private_run.py`
    start.safetensors     the state before the first step
    snapshot.safetensors  the state after some step, so that a restart replays only what came later

A step runs, then its record is written and flushed, then the next step runs: whatever kills the process, at most the
step in flight is lost, and the state comes back bit for bit.

Steps with the gradient itself cannot be replayed from their records: those after the last saved state are made again,
from the same batches, and each must have the loss and the length of the gradient that the journal has. A state is saved
at least every `MOST_SECONDS_AGAIN` seconds, so that no more than that is done twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import struct
import time
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mobizo_compiler.device.batches import Batches, by_step
from mobizo_compiler.device.journal import Journal, JournalWarning, Record, fingerprint, replayed
from mobizo_compiler.device.limits import Limits, Watch, watch_of
from mobizo_compiler.device.scalars import float32, whole
from mobizo_compiler.errors import JournalError, RunMismatchError
from mobizo_compiler.format import checksum
from mobizo_compiler.format.files import sync_folder, whole_file
from mobizo_compiler.format.program import Program, StepResult
from mobizo_compiler.options import MAX_SEED

MOST_SECONDS_AGAIN = 60.0
JOURNAL, START, SNAPSHOT, PRIVACY = "journal", "start.safetensors", "snapshot.safetensors", "privacy.json"
Stop = Callable[[], bool]
LearningRate = float | Callable[[int], float]
OnStep = Callable[[int, StepResult], object]


class Trainee(Protocol):
    """What a run needs of a session."""

    program: Program

    @property
    def noised(self) -> bool:
        """Whether its steps are those of a private run."""

    def state(self) -> Tensor:
        """A copy of the flat state, float32 [S]."""

    def load_state(self, flat: Tensor) -> None:
        """Set the flat state."""

    def train_step(
        self, inputs: Any, labels: Tensor | None = None, *, seed: int, learning_rate: float, eps: float | None = None
    ) -> StepResult:
        """One step."""

    def replay(self, seed: int, projected_gradient: Tensor | Sequence[float], learning_rate: float) -> None:
        """Repeat the update of a step."""


@contextlib.contextmanager
def all_or_none(session: Trainee) -> Iterator[None]:
    """Within the block the state changes; where the block fails, the state is what it was."""
    before = session.state()
    try:
        yield
    except BaseException:
        session.load_state(before)
        raise


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What a call of `finetune` did.

    Args:
        steps: Steps that the run has now.
        resumed_at: Steps that it had before.
        losses: Mean loss of the lanes of every step, from the first on; not finite where the step was void.
        void: Steps whose loss was not finite, and that changed nothing.
        limit: The limit that ended the call, in words; None if none did.
    """

    steps: int
    resumed_at: int
    losses: tuple[float, ...]
    void: tuple[int, ...]
    limit: str | None = None


def finetune(
    session: Trainee,
    batches: Batches,
    *,
    steps: int,
    learning_rate: LearningRate,
    run: str | PathLike[str] | None = None,
    seed: int = 0,
    eps: float | None = None,
    snapshot_every: int = 200,
    on_step: OnStep | None = None,
    stop: Stop | None = None,
    until: Limits | Watch | None = None,
) -> RunSummary:
    """Train to a number of steps, in a folder that survives kills; called again, it goes on where it was.

    Args:
        batches: (inputs, labels) of a step, or a dict of inputs with labels among them: a function of the step's
            number, or a sequence or a loader that is gone through again and again. A loader that shuffles has an order
            of its own in every process.
        steps: Steps that the run has in the end, those of earlier calls included.
        learning_rate: A number, or a function of the step's number.
        run: The folder. If it holds a run of this program, the state is restored from it first; a new run starts
            from the session's state. Without a folder nothing is written, and a kill loses the run.
        seed: With the step's number, it gives the seed of the step.
        eps: As in `train_step`.
        snapshot_every: Most steps between saved states; more of them make a restart replay less.
        on_step: Called after a step is on the disk, with its number and result.
        stop: Asked before every step; where it returns True, the run stays as it is, to be taken up again.
        until: Limits that do the same, of minutes, battery and temperature, or what watches them.

    Raises:
        InputError: As in `train_step`.
        JournalLockedError: Another session trains in this folder.
        JournalError: The folder holds a run of another program, or a damaged one, or the disk is full.
        RunMismatchError: The folder holds a private run.

    A step whose losses are not finite changes nothing; the summary names it.

    With the exact estimator, the batches of steps that are made again after a kill must be those that they were: a
    function of the step's number, or an order that is the same in every process. Else it is a `JournalError`.
    """
    batch, watch = by_step(batches), watch_of(until)
    steps, seed = whole("steps", steps, 0), whole("seed", seed, 0)
    snapshot_every = whole("snapshot_every", snapshot_every, 1)
    size = float32("eps", session.program.manifest.eps if eps is None else eps, above=0)
    if not callable(learning_rate):
        float32("learning_rate", learning_rate)

    def made(step: int, drawn: int, rate: float, size: float) -> tuple[Record, StepResult]:
        inputs, labels = batch(step)
        result = session.train_step(inputs, labels, seed=drawn, learning_rate=rate, eps=size)
        gradient, loss = tuple(result.projected_gradient.tolist()), result.loss
        if not all(math.isfinite(g) for g in gradient):
            gradient, loss = (0.0,) * len(gradient), math.nan if math.isfinite(loss) else loss
        return Record(step, drawn, rate, size, loss, gradient), result

    def records(first: int) -> Iterator[tuple[Record, StepResult]]:
        for step in range(first, steps):
            if (stop is not None and stop()) or watch():
                break
            rate = float32("learning_rate", learning_rate(step) if callable(learning_rate) else learning_rate)
            yield made(step, step_seed(seed, step), rate, size)

    def again(record: Record) -> Record:
        return made(record.step, record.seed, record.learning_rate, record.eps)[0]

    tell = on_step or (lambda step, result: None)
    if run is None:
        losses = array("d")
        for record, result in records(0):
            losses.append(record.loss)
            tell(record.step, result)
        return _summary(losses, 0, watch)
    folder = Path(run)
    if not session.noised:
        check_plain(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _open(folder, session.program) as journal:
        if not len(journal) and not (folder / START).exists():
            write_state(folder / START, session, 0)
        differentiates = session.program.manifest.zo.differentiates
        behind = _restore(session, folder, journal.records(), again)
        if behind and differentiates:  # not a second time, if this process is killed before it saves a state
            write_state(folder / SNAPSHOT, session, len(journal))
        resumed_at, saved = len(journal), time.monotonic()
        for record, result in records(resumed_at):
            journal.append(record)
            done = record.step + 1
            late = differentiates and time.monotonic() - saved > MOST_SECONDS_AGAIN
            if (done % snapshot_every == 0 or late) and done < steps:
                write_state(folder / SNAPSHOT, session, done)
                saved = time.monotonic()
            tell(record.step, result)
        if len(journal) > resumed_at:
            write_state(folder / SNAPSHOT, session, len(journal))
        return _summary(journal.losses, resumed_at, watch)


def check_plain(run: str | PathLike[str]) -> None:
    """Raise `RunMismatchError` if the folder holds a private run."""
    if (Path(run) / PRIVACY).exists():
        raise RunMismatchError(
            "the run is private, and a step without noise would tell what it must not",
            where=str(run),
            hint="go on with Session.finetune_privately, or mobizo finetune with the settings of its privacy.json",
        )


def _summary(losses: Sequence[float], resumed_at: int, watch: Watch) -> RunSummary:
    void = tuple(step for step, loss in enumerate(losses) if not math.isfinite(loss))
    return RunSummary(len(losses), resumed_at, tuple(losses), void, watch.reason)


def _open(folder: Path, program: Program) -> Journal:
    """The journal of a run; an empty one is begun anew, if nothing is there that it should have.

    Raises:
        JournalError: It has lost its steps.
    """
    path = folder / JOURNAL
    if path.exists() and not path.stat().st_size and (folder / SNAPSHOT).exists():
        raise JournalError(
            f"the journal is empty, but there is a {SNAPSHOT} of later steps: it was lost",
            where=str(path),
            hint=f"without {SNAPSHOT} the run begins anew; the state in it is a safetensors file",
        )
    return Journal(path, program)


def begin(session: Trainee, run: str | PathLike[str]) -> Path:
    """Begin a run that starts from the session's state, for `finetune` to take up.

    Raises:
        JournalError: The folder holds a run already.
    """
    folder = Path(run)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / JOURNAL).exists() or (folder / START).exists():
        raise JournalError(
            "the folder holds a run already", where=str(folder), hint="give this one a folder of its own"
        )
    write_state(folder / START, session, 0)
    Journal(folder / JOURNAL, session.program).close()
    return folder


def steps_of(session: Trainee, run: Path) -> int:
    """Steps that a run has; the state is left as it is.

    Raises:
        JournalError: It is not of this program, or is damaged, or open elsewhere.
    """
    return len(losses_of(session, run))


def losses_of(session: Trainee, run: Path) -> Sequence[float]:
    """Losses of the steps of a run; what is raised is as for `steps_of`."""
    with _open(run, session.program) as journal:
        return journal.losses


def restore(session: Trainee, run: str | PathLike[str]) -> int:
    """Set the state to the end of the run in a folder, bit for bit, and return how many steps it has.

    Raises:
        JournalError: There is no run of this program, or it is damaged, or open elsewhere; or it was killed, and its
            last steps have to be made again, which `finetune` does with the batches.
    """
    folder = Path(run)
    if not (folder / JOURNAL).exists():
        raise JournalError("there is no run in this folder", where=str(folder))
    with _open(folder, session.program) as journal:
        _restore(session, folder, journal.records())
        return len(journal)


def step_seed(seed: int, step: int) -> int:
    """Seed of a step: 31 bits of SHA-256 over the run's seed and the step's number.

    >>> 0 <= step_seed(0, 1) <= MAX_SEED and step_seed(0, 1) != step_seed(1, 0)
    True
    """
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return int.from_bytes(digest[:4], "little") & MAX_SEED


def write_state(path: Path, session: Trainee, step: int) -> None:
    """Write the state to a temporary name, flush it, and rename it.

    Raises:
        JournalError: It could not be written; what was there before is still there.
    """
    state = session.state()
    tensors = {"lora_b": state}
    described = {"step": str(step), "program": fingerprint(session.program).hex()}
    try:
        with whole_file(path, mode=0o600) as file:
            file.write(save(tensors, metadata=described | {"sha256": checksum.of_tensors(described, tensors)}))
    except OSError as error:
        raise JournalError(
            f"the state could not be written: {error.strerror or error}",
            where=str(path),
            hint="make room and go on: the journal is whole",
        ) from error
    sync_folder(path.parent)


def read_state(path: Path, session: Trainee) -> tuple[Tensor, int]:
    """A state that `write_state` wrote, and after how many steps it was so.

    Raises:
        JournalError: The file is damaged, or of another program.
    """
    try:
        with safe_open(path, framework="pt") as file:
            described, state = file.metadata() or {}, file.get_tensor("lora_b")
        step, program, wanted = int(described["step"]), described["program"], described.pop("sha256")
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise JournalError(f"the saved state cannot be read: {error!r}", where=str(path)) from None
    if wanted != checksum.of_tensors(described, {"lora_b": state}):
        raise JournalError("the saved state is damaged: its checksum is another", where=str(path))
    if program != fingerprint(session.program).hex() or state.shape != (session.program.manifest.state_size,):
        raise JournalError("the saved state is of another program", where=str(path))
    return state, step


def _restore(
    session: Trainee, folder: Path, records: list[Record], again: Callable[[Record], Record] | None = None
) -> int:
    """The newest saved state that can be read and that the journal reaches, and the steps since then.

    Those are replayed; where that cannot be, `again` makes a step again, if there is one. Returns how many there were.
    """
    if not records and not (folder / START).exists():
        return 0  # killed before anything was written
    problem: JournalError | None = None
    for name in (SNAPSHOT, START):
        if not (folder / name).exists():
            continue
        try:
            state, step = read_state(folder / name, session)
            if step > len(records):
                raise JournalError(
                    f"the state is of step {step}, the journal has {len(records)} steps", where=str(folder / name)
                )
        except JournalError as error:
            problem = error
            if name == SNAPSHOT:
                warnings.warn(
                    f"{error.problem} ({error.where}); replaying from the start", JournalWarning, stacklevel=3
                )
            continue
        session.load_state(state)
        if session.program.manifest.zo.differentiates:
            _make_again(folder, records[step:], again)
            return len(records) - step
        for seed, gradient, learning_rate in replayed(records[step:]):
            session.replay(seed, gradient, learning_rate)
        return len(records) - step
    raise problem or JournalError("the run has lost its saved states", where=str(folder / START))


def _make_again(folder: Path, records: list[Record], again: Callable[[Record], Record] | None) -> None:
    """Steps with the gradient itself, from their batches; each must come out as the journal has it."""
    if again is None and records:
        raise JournalError(
            f"the last {len(records)} steps are not in a saved state, and cannot be replayed from the journal",
            where=str(folder),
            hint="finetune with the same batches makes them again, and goes on",
        )
    for record in records:
        assert again is not None
        if _bits(found := again(record)) != _bits(record):
            raise JournalError(
                f"step {record.step}, made again, has the loss {found.loss!r}; the journal has {record.loss!r}",
                where=str(folder),
                hint="give the batches that the run had; another machine or engine may round in another way, too",
            )


def _bits(record: Record) -> bytes:
    numbers = (record.loss, *record.projected_gradient)
    return struct.pack(f"<{len(numbers)}f", *(number if math.isfinite(number) else math.nan for number in numbers))
