"""One run on several processes, cores or machines: `torch.distributed` carries a few numbers from rank to rank.

Every rank has the program and rows of its own. In a step all ranks perturb along the same directions, because noise is
a function of the seed; each measures them on its own rows; what they measured is averaged, as DistributedDataParallel
averages gradients; and every rank makes the same update from the averages (`Session.replay`). So the state is the same
on all ranks, bit for bit, and what a rank sends in a step are a few dozen numbers, whatever the size of the model.

With an exact gradient the steps of the ranks themselves are averaged, which crosses the network as S numbers.

Rank 0 leads a run: it keeps the journal, and tells the others which step comes next. They need no folder and no
schedule, and begin from the state that it sends them, so that a run may go on with more or fewer ranks than before.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from os import PathLike
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mobizo_compiler.device.batches import Batch, Batches, by_step
from mobizo_compiler.device.journal import fingerprint
from mobizo_compiler.device.run import LearningRate, RunSummary, all_or_none
from mobizo_compiler.device.scalars import float32, whole
from mobizo_compiler.device.session import Inputs, Session
from mobizo_compiler.errors import ConfigError, DistributedError
from mobizo_compiler.format.files import raw_bytes
from mobizo_compiler.format.program import Program, StepResult
from mobizo_compiler.load import load
from mobizo_compiler.options import MAX_SEED

TIMEOUT_S = 1800.0  # also while rank 0 measures on rows for validation
_STATE, _STEP, _END, _FAILED = range(4)  # what rank 0 tells


class DistributedSession(Session):
    """A session whose steps are those of all ranks; every rank has one, of the same program.

    `torchrun` starts the ranks, and its variables say who is who. `train_step` and `finetune` are called on all ranks
    alike; everything else, from `evaluate` to `export_adapter`, is the rank's own affair.

    Args:
        program: As for `Session`; its file lies where each rank can read it.
        timeout_s: How long a rank waits for the others before it takes them for dead.
        options: As for `Session`; a prefix cache is a file of each rank's own.

    Raises:
        ConfigError: The process was not started by `torchrun`, or the steps of this program cannot be averaged.
        DistributedError: A rank has another program, or is not there.
    """

    def __init__(self, program: Program | str | PathLike[str], *, timeout_s: float = TIMEOUT_S, **options: Any) -> None:
        if not isinstance(program, Program):
            program = load(program)
        _check_average(program)
        self._group = _group(datetime.timedelta(seconds=timeout_s))
        super().__init__(program, **options)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._step = 0  # that the batch was asked for
        # Of rank 0: it leads a run; its batch waits to be measured; the others have its state; they listen to it.
        self._leads = self._due = self._told_state = self._listening = False
        kind = json.dumps(program.manifest.zo.to_json(), sort_keys=True)
        self.agree("program", fingerprint(program) + kind.encode())

    def agree(self, what: str, value: bytes) -> None:
        """Raise on all ranks unless all of them give the same value, of which a digest is exchanged.

        Args:
            what: What it is, for the error.
            value: Any bytes.

        Raises:
            DistributedError: A rank has another value, or is gone.
        """
        digest = torch.frombuffer(bytearray(hashlib.sha256(what.encode() + value).digest()), dtype=torch.uint8)
        found = self._gathered(digest)
        if other := next((rank for rank, each in enumerate(found) if not torch.equal(each, found[0])), None):
            raise DistributedError(f"rank {other} has another {what} than rank 0", hint="give all ranks the same")

    def train_step(
        self,
        inputs: Inputs,
        labels: Tensor | None = None,
        *,
        seed: int,
        learning_rate: float,
        eps: float | None = None,
    ) -> StepResult:
        """One step of all ranks: `Session.train_step`, with the mean of what they measured, each on its own rows.

        Args:
            inputs: Of this rank's rows.
            labels: Likewise.
            seed: The same on all ranks, as the numbers after it.
            learning_rate: As for `Session.train_step`.
            eps: Likewise.

        Raises:
            InputError: As from `Session.train_step`; other ranks have a `DistributedError` then.
            DistributedError: A rank failed or is gone, or was called for another step, or has another state.
            ConfigError: It was called from within a run.

        After an error the state is what it was.
        """
        seed, rate = whole("seed", seed, 0, MAX_SEED), float32("learning_rate", learning_rate)
        size = float32("eps", self.program.manifest.eps if eps is None else eps, above=0)
        with self._held():
            if not self._leads:
                return self._shared_step(inputs, labels, seed, rate, size)
            if not self._due:
                raise ConfigError(
                    "train_step is a step of all ranks, which are in a run",
                    hint="measure with evaluate, or with a Session(session.program) of its own",
                )
            self._due = False
            if not self._told_state:
                self._tell_state()
                self._told_state = True
            self._tell(_STEP, self._step, seed, rate, size)
            self._listening = False  # from here on they listen to all ranks, and not again before the step is made
            result = self._shared_step(inputs, labels, seed, rate, size)
            self._listening = True
            return result

    def finetune(self, batches: Batches, *, steps: int, learning_rate: LearningRate, **options: Any) -> RunSummary:
        """`Session.finetune`, on all ranks: rank r of n takes batch `step * n + r` for a step.

        Rank 0 does as its arguments say. The other ranks take of theirs the batches alone, and return what rank 0 does.
        In the end all ranks have its state, whether or not there was a step to make.

        Args:
            batches: As for `Session.finetune`.
            steps: Of all ranks together, with n batches each.
            learning_rate: As for `Session.finetune`.
            options: Likewise.

        Raises:
            DistributedError: A rank failed or is gone. Called again, also with another number of ranks, the run goes
                on from the journal.
        """
        batch = by_step(batches)

        def own(step: int) -> Batch:
            found = batch(step * self.ranks + self.rank)
            self._step, self._due = step, True
            return cast(Batch, found)  # a pair, in which labels may be missing

        with self._held():
            if self.rank:
                return self._follow(own)
            return self._lead(own, steps=steps, learning_rate=learning_rate, **options)

    def finetune_privately(self, *arguments: Any, **options: Any) -> RunSummary:
        """A `ConfigError`: private runs are of one process."""
        raise ConfigError("a private run is of one process", hint="take a Session, without ranks")

    def _lead(self, own: Callable[[int], Batch], **options: Any) -> RunSummary:
        """Make the run, telling the others."""
        self._leads = self._listening = True
        self._told_state = False
        try:
            done = super().finetune(own, **options)
            self._tell_state()
            summary = json.dumps(dataclasses.asdict(done)).encode()
            self._tell(_END, len(summary))
            self._heard_from_rank_0(torch.frombuffer(bytearray(summary), dtype=torch.uint8))
            self._listening = False
            return done
        finally:
            self._leads = self._due = False
            if self._listening:
                with contextlib.suppress(DistributedError):  # whoever is gone needs no goodbye
                    self._tell(_FAILED)

    def _follow(self, own: Callable[[int], Batch]) -> RunSummary:
        """Do what rank 0 tells, until it says that the run is over."""
        while True:
            kind, number, seed, rate, size = self._heard_from_rank_0(torch.zeros(5, dtype=torch.float64)).tolist()
            if kind == _FAILED:
                raise DistributedError("rank 0 failed", hint="its own error says why")
            if kind == _END:
                text = self._heard_from_rank_0(torch.zeros(int(number), dtype=torch.uint8))
                done = json.loads(bytes(text.tolist()))
                return RunSummary(**done | {"losses": tuple(done["losses"]), "void": tuple(done["void"])})
            if kind == _STATE:
                self.load_state(self._heard_from_rank_0(self.state()))
                continue
            with self._failure_told([seed, rate, size]):
                inputs, labels = cast(tuple[Any, Tensor], own(int(number)))
            self._shared_step(inputs, labels, int(seed), rate, size)

    def _shared_step(
        self, inputs: Inputs, labels: Tensor | None, seed: int, learning_rate: float, eps: float
    ) -> StepResult:
        differentiates = self.program.manifest.zo.differentiates
        asked, before = [float(seed), learning_rate, eps], self.state()
        rate = learning_rate if differentiates else 0.0
        with all_or_none(self):
            with self._failure_told(asked):
                own = super().train_step(inputs, labels, seed=seed, learning_rate=rate, eps=eps)
            mean = self._mean(asked, before, own)
            if not bool(mean.projected_gradient.isfinite().all()):
                self.load_state(before)  # the step is void for all, also where this rank's own was not
            elif differentiates:
                self._average_steps(before)
            else:  # measuring, at learning rate 0, has left the state as it was
                self.replay(seed, mean.projected_gradient, learning_rate)
        return mean

    @contextlib.contextmanager
    def _failure_told(self, asked: list[float]) -> Iterator[None]:
        """Let the others know, who wait for what this rank measures, if this block fails."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(DistributedError):
                self._exchanged(asked, self.state(), None)
            raise

    def _mean(self, asked: list[float], before: Tensor, own: StepResult) -> StepResult:
        """What all ranks measured, if all of them made the same step from the same state."""
        found = self._exchanged(asked, before, own)
        checked = 2 + len(asked)
        for rank, (failed, state, *step) in enumerate(numbers[:checked].tolist() for numbers in found):
            if failed:
                raise DistributedError(f"rank {rank} failed", hint="its own error says why")
            if step != asked:
                raise DistributedError(
                    f"rank {rank} makes the step {step} (seed, learning rate, eps), rank {self.rank} {asked}",
                    hint="call train_step with the same numbers on all ranks",
                )
            if state != float(found[self.rank][1]):
                raise DistributedError(
                    f"rank {rank} has another state than rank {self.rank}",
                    hint="finetune begins with the state of rank 0 on all; ranks with other engines or processors "
                    'stay equal with noise="rademacher" alone',
                )
        mean = (torch.stack([numbers[checked:] for numbers in found]).sum(dim=0) / self.ranks).float()
        lanes = 1 + len(own.lane_losses)
        return StepResult(float(mean[0]), mean[1:lanes], mean[lanes:])

    def _exchanged(self, asked: list[float], before: Tensor, own: StepResult | None) -> list[Tensor]:
        """Of every rank: whether it failed, the checksum of its state, the step, and what it measured; in float64."""
        zo = self.program.manifest.zo
        measured = torch.full((1 + zo.lanes + zo.queries,), math.nan, dtype=torch.float64)
        if own is not None:
            values = (torch.tensor([own.loss]), own.lane_losses, own.projected_gradient)
            measured = torch.cat([value.double().flatten() for value in values])
        checked = [float(own is None), float(zlib.crc32(raw_bytes(before))), *asked]
        return self._gathered(torch.cat([torch.tensor(checked, dtype=torch.float64), measured]))

    def _average_steps(self, before: Tensor) -> None:
        """Take the mean of the ranks' steps for the step: that of gradients, where a step is one times a rate."""
        moved = (self.state() - before).double()
        with _heard():
            dist.all_reduce(moved, group=self._group)
        self.load_state((before.double() + moved / self.ranks).float())

    def _tell(self, kind: int, *numbers: float) -> None:
        self._heard_from_rank_0(torch.tensor([kind, *numbers, *[0.0] * (4 - len(numbers))], dtype=torch.float64))

    def _tell_state(self) -> None:
        self._tell(_STATE)
        self._heard_from_rank_0(self.state())

    def _heard_from_rank_0(self, values: Tensor) -> Tensor:
        with _heard():
            dist.broadcast(values, 0, group=self._group)
        return values

    def _gathered(self, values: Tensor) -> list[Tensor]:
        found = [torch.empty_like(values) for _ in range(self.ranks)]
        with _heard():
            dist.all_gather(found, values, group=self._group)
        return found


def _group(timeout: datetime.timedelta) -> dist.ProcessGroup | None:
    """All ranks, over gloo, which carries tensors in main memory; a group of our own where the process has one."""
    with _heard():
        if dist.is_initialized():
            return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
        if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]:
            raise ConfigError(
                f"this process has no ranks beside it: {missing[0]} is not set",
                hint="torchrun --nproc-per-node 2 YOUR_SCRIPT starts two",
            )
        dist.init_process_group("gloo", timeout=timeout)
    atexit.register(_leave)  # else its threads meet the end of the process, which aborts then
    return None


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """Errors of torch.distributed in this block, as ours."""
    try:
        yield
    except ConfigError:
        raise
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"a rank is gone, or does not answer: {error}",
            hint="start all ranks again (torchrun --max-restarts does): a run with a folder goes on from its journal",
        ) from error


def _check_average(program: Program) -> None:
    """Raise `ConfigError` for a program whose ranks' steps have no meaningful mean."""
    manifest = program.manifest
    plain = manifest.rule["name"] == "sgd" and manifest.zo.clip is None
    if manifest.zo.differentiates and not plain:
        raise ConfigError(
            f"steps of the {manifest.zo.estimator} estimator have a mean over ranks with the rule sgd alone, unclipped",
            hint='compile with rule="sgd" and without clip, or with estimator="two-sided"',
        )
