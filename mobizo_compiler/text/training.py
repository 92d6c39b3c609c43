"""A run on text from beginning to end: validation, early stopping, and a record that a later call goes on from.

It adds two files to a run of `Session.finetune`:

    run.json              settings, data, and every validation
    best.safetensors      the state with the lowest validation loss
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from mobizo_compiler.device.accountant import Accountant, Privacy
from mobizo_compiler.device.limits import Limits, Watch, watch_of
from mobizo_compiler.device.private_run import OnBegin, read_privacy
from mobizo_compiler.device.run import JOURNAL, RunSummary, check_plain, read_state, steps_of, write_state
from mobizo_compiler.device.schedules import schedule
from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import ConfigError, JournalError, RunMismatchError
from mobizo_compiler.format.files import whole_file
from mobizo_compiler.format.program import StepResult
from mobizo_compiler.options import MAX_SEED, JsonConfig, check_int
from mobizo_compiler.text.data import TextData
from mobizo_compiler.text.evaluation import Score, objective, score

RECORD, BEST = "run.json", "best.safetensors"
DEFAULT_STEPS = 200
_RATE, _RATE_OF_ADAMW = 1e-2, 1e-3


@dataclasses.dataclass(frozen=True)
class TrainingConfig(JsonConfig):
    """How long and how fast to train, and when to look.

    Args:
        steps: Steps that the run has in the end; 200 if neither steps nor epochs are given.
        epochs: The same as a number of times that every sample is seen.
        learning_rate: Its highest value; if not given, .001 for the rule AdamW, as PyTorch's, and .01 for others.
        schedule: "constant", "linear" or "cosine": how it falls.
        warmup: Steps in which it rises first.
        final_rate: Share of the learning rate that is left at the end.
        eps: Size of the perturbation; if not given, what suits the program's quantization.
        seed: Of noise, of the order of samples, and of the split.
        balanced: Take the answers in turns, so that rare ones are learnt as often as common ones.
        group_by_length: Let the rows of a batch have similar lengths, for programs that take any length.
        validation_share: Share of the samples that is held out, where no other file is for validation; 0 for none.
        validation_rows: Most samples that one validation measures.
        validate_every: Steps between validations.
        patience: Stop after so many validations in a row that were no better than the best one.

    Raises:
        ConfigError: A field is out of range.
    """

    steps: int | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    schedule: str = "linear"
    warmup: int = 0
    final_rate: float = 0.0
    eps: float | None = None
    seed: int = 0
    balanced: bool = False
    group_by_length: bool = False
    validation_share: float = 0.1
    validation_rows: int = 200
    validate_every: int = 50
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("steps and epochs are both given", hint="give one of them")
        for name, low in (("steps", 1), ("patience", 1), ("seed", 0), ("validate_every", 1), ("validation_rows", 1)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), low, MAX_SEED)
        for name in ("epochs", "eps"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}; it must be a number above 0")
        if not 0 <= self.validation_share < 1:
            raise ConfigError(f"validation_share is {self.validation_share}; it must be 0 or more, and below 1")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be above 0, or nothing is learnt")
        self.rates(max(1, self.warmup))

    def total_steps(self, samples: int, rows: int) -> int:
        """Steps of the whole run.

        >>> TrainingConfig(epochs=2).total_steps(samples=5, rows=2)
        5
        """
        if self.epochs is not None:
            return math.ceil(self.epochs * samples / rows)
        return self.steps or DEFAULT_STEPS

    def rates(self, steps: int) -> Callable[[int], float]:
        """The learning rate of every step."""
        highest = _RATE if self.learning_rate is None else self.learning_rate
        return schedule(self.schedule, highest, steps, warmup=self.warmup, end=self.final_rate)

    def for_rule(self, name: str) -> TrainingConfig:
        """With the learning rate that suits an update rule, where none is given.

        >>> TrainingConfig().for_rule("adamw").learning_rate
        0.001
        """
        usual = _RATE_OF_ADAMW if name == "adamw" else _RATE
        return self if self.learning_rate is not None else dataclasses.replace(self, learning_rate=usual)


@dataclasses.dataclass(frozen=True)
class Validation:
    """What was measured after so many steps."""

    step: int
    objective: float
    score: Score


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What `train` did.

    Args:
        summary: Of `Session.finetune`.
        steps: Steps that the run was to have.
        validations: All of the run.
        best: The one with the lowest loss.
        why: "done", "stopped early", "budget" (of a private run, which is spent), "limit" or "interrupted".
    """

    summary: RunSummary
    steps: int
    validations: tuple[Validation, ...]
    best: Validation | None
    why: str

    @property
    def ended(self) -> bool:
        """Whether the run is over; else a later call goes on with it."""
        return self.why in ("done", "stopped early", "budget")


def train(
    session: Session,
    training: TextData,
    validation: TextData | None,
    config: TrainingConfig,
    run: str | PathLike[str],
    *,
    notes: Mapping[str, Any] | None = None,
    on_begin: Callable[[int, int], object] = lambda done, steps: None,
    on_step: Callable[[int, StepResult], object] = lambda step, result: None,
    on_validation: Callable[[Validation], object] = lambda validation: None,
    on_change: Callable[[str], object] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
    until: Limits | Watch | None = None,
    privacy: Privacy | None = None,
    on_privacy: OnBegin = lambda privacy, accountant, steps: None,
) -> Outcome:
    """Train on samples in a folder, from where the run there is.

    Args:
        session: Of the program that the data was encoded for.
        training: What to learn.
        validation: What to measure; None for nothing.
        config: How to train.
        run: The folder; see `Session.finetune`.
        notes: More for the record, JSON values.
        on_begin: Told how many steps the run has, and how many it is to have.
        on_step: Told after each step.
        on_validation: Told after each validation.
        on_change: Told of settings that differ from those that the run was begun with.
        stop: Asked before every step and during validation; True ends this call with a run that can go on.
        until: As in `Session.finetune`; also asked during validation.
        privacy: How much the run may tell of a row of `training`: `Session.finetune_privately`. What is measured for
            validation is not noised.
        on_privacy: Told what was settled, what counts it, and how many steps the budget is enough for.

    Raises:
        RunMismatchError: The run was begun with other data, another seed, or other settings of privacy.
        ConfigError: Rows are in an order (balanced, by length), which a private run does not have.
        JournalError: As in `Session.finetune`.
    """
    config = config.for_rule(str(session.program.manifest.rule["name"]))
    if privacy is None:
        check_plain(run)
    elif config.balanced or config.group_by_length:
        raise ConfigError("a private run draws rows one by one", hint="leave out balanced and group_by_length")
    folder, batches = Path(run), training.batches(config.seed, config.balanced, config.group_by_length)
    settings = {**config.to_json(), "ranks": session.ranks}
    record = _Record.open(folder, settings, training, validation, notes or {}, on_change)
    rows = training.layout.rows * session.ranks
    if privacy is not None:
        told = read_privacy(folder)
        rows = (privacy if told is None else told.settings).sample_rows or rows
    steps = config.total_steps(len(training), rows)
    watch = watch_of(until)
    done = 0
    if (folder / JOURNAL).exists():  # exact steps may have to be made again, for which `finetune` has the batches
        exact = session.program.manifest.zo.differentiates
        done = steps_of(session, folder) if exact else session.restore(folder)
    found = [v for v in record.validations if v.step <= done]
    on_begin(done, steps)
    early = False
    last = steps  # fewer, where a budget is not enough for all of them

    def validate(step: int, cut: Callable[[], bool]) -> None:
        nonlocal early
        assert validation is not None
        measured = score(session, validation, lambda rows: cut())
        if measured is None:
            return
        found.append(Validation(step, objective(measured, validation), measured))
        if _best(found) is found[-1]:
            write_state(folder / BEST, session, step)
        record.write(found)
        on_validation(found[-1])
        early = _exhausted(found, config.patience)

    def begin_privately(settled: Privacy, accountant: Accountant, allowed: int) -> None:
        nonlocal last
        last = allowed
        on_privacy(settled, accountant, allowed)

    def after(step: int, result: StepResult) -> None:
        on_step(step, result)
        if validation is not None and ((step + 1) % config.validate_every == 0 or step + 1 == last):
            validate(step + 1, lambda: stop() or watch())

    folder.mkdir(parents=True, exist_ok=True)
    early = _exhausted(found, config.patience)
    due = validation is not None and (done % config.validate_every == 0 or done == steps) and not early
    due = due and not any(v.step == done for v in found)

    def stopped() -> bool:
        """Whether to stop before a step; before the first one, measure what a run that was killed had no time for."""
        nonlocal due
        if due:  # limits wait for it: else none shorter than that would get on
            due = False
            validate(done, stop)
        return early or stop()

    record.write(found)
    options: dict[str, Any] = {
        "steps": steps,
        "learning_rate": config.rates(steps),
        "run": folder,
        "seed": config.seed,
        "eps": config.eps,
        "on_step": after,
        "stop": stopped,
        "until": watch,
    }
    if privacy is None:
        summary = session.finetune(batches, **options)
    else:
        options["on_begin"] = begin_privately
        summary = session.finetune_privately(training.batch_of, len(training), privacy, **options)
    stopped()  # where there was no step to make
    left = "stopped early" if early else "interrupted" if summary.limit is None else "limit"
    measured = validation is None or early or any(v.step >= last for v in found)
    ended = "done" if last == steps else "budget"
    why = ended if summary.steps >= last and measured else left
    record.write(found, summary=_shown(summary if privacy is None else _untold(summary), why))
    return Outcome(summary, steps, tuple(found), _best(found), why)


def restore_best(session: Session, run: str | PathLike[str]) -> int:
    """Set the state to the one with the best validation of a run, and return its step.

    Raises:
        JournalError: The run has none, or it is of another program.
    """
    path = Path(run) / BEST
    if not path.exists():
        raise JournalError("the run has no validated state", where=str(path), hint="leave out --best")
    state, step = read_state(path, session)
    session.load_state(state)
    return step


def read_record(run: str | PathLike[str]) -> dict[str, Any]:
    """The `run.json` of a run; empty if it has none.

    Raises:
        JournalError: It is damaged.
    """
    path = Path(run) / RECORD
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return dict(values)
    except (ValueError, TypeError) as error:
        raise JournalError(
            f"the record cannot be read: {error}", where=str(path), hint="without this file the run goes on as well"
        ) from None


def _best(found: list[Validation]) -> Validation | None:
    return min(found, key=lambda v: (v.objective, v.step)) if found else None


def _exhausted(found: list[Validation], patience: int | None) -> bool:
    best = _best(found)
    return patience is not None and best is not None and len(found) - 1 - found.index(best) >= patience


def _untold(summary: RunSummary) -> RunSummary:
    """Without the losses of steps, which a private run does not have."""
    return dataclasses.replace(summary, losses=(math.nan,) * len(summary.losses))


def _shown(summary: RunSummary, why: str) -> dict[str, Any]:
    losses = [loss if math.isfinite(loss) else None for loss in summary.losses]
    return {
        "steps": summary.steps,
        "ended": why,
        "limit": summary.limit,
        "void_steps": list(summary.void),
        "losses": losses,
    }


class _Record:
    """`run.json`: what the run was begun with, and what it measured."""

    def __init__(self, path: Path, values: dict[str, Any], validations: list[Validation]) -> None:
        self._path, self._values, self.validations = path, values, validations

    @classmethod
    def open(
        cls,
        folder: Path,
        settings: dict[str, Any],
        training: TextData,
        validation: TextData | None,
        notes: Mapping[str, Any],
        on_change: Callable[[str], object],
    ) -> _Record:
        """The record of the run, compared with what is asked for now."""
        path = folder / RECORD
        data = {
            "training_rows": len(training),
            "validation_rows": len(validation) if validation is not None else 0,
            "training": training.digest,
            "validation": None if validation is None else validation.digest,
            "prompt": training.config.to_json(),
        }
        before = read_record(folder)
        validations: list[Validation] = []
        if before:
            try:
                _compare(before, settings, data, path, on_change)
                items = before["validations"]
                validations = [Validation(v["step"], v["objective"], Score(**v["score"])) for v in items]
            except (KeyError, TypeError) as error:
                raise JournalError(
                    f"the record lacks {error}", where=str(path), hint="without this file the run goes on as well"
                ) from None
        elif (folder / JOURNAL).exists():
            on_change("the run was begun without a record of its settings: it is taken up with those of now")
        values = {"settings": settings, "data": data, **notes}
        return cls(path, values, validations)

    def write(self, validations: list[Validation], **more: Any) -> None:
        """Write it whole."""
        self._values |= more
        listed = [dataclasses.asdict(v) for v in validations]
        with whole_file(self._path) as file:
            file.write((json.dumps(self._values | {"validations": listed}, indent=2) + "\n").encode())


def _compare(
    before: Mapping[str, Any],
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    path: Path,
    on_change: Callable[[str], object],
) -> None:
    """Refuse what would make another run of it; say what may change on the way."""
    was = before["data"]
    fixed = [
        ("training data or prompt", was["training"], data["training"]),
        ("validation data", was["validation"], data["validation"]),
        ("seed", before["settings"]["seed"], settings["seed"]),
    ]
    for name, old, new in fixed:
        if old != new:
            shown = f" ({old} before, {new} now)" if name == "seed" else ""
            raise RunMismatchError(
                f"the run was begun with another {name}{shown}" if name == "seed" else f"the {name} differ from before",
                where=str(path),
                hint="give this one a folder of its own, or repeat the command that began the run",
            )
    for name, new in settings.items():
        old = before["settings"].get(name, 1 if name == "ranks" else None)
        if old != new:
            on_change(f"{name.replace('_', '-')} was {old} before, and is {new} from here on")
