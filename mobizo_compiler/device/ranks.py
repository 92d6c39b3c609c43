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
from mobizo_compiler.device.run import LearningRate, RunSummary
from mobizo_compiler.device.session import Inputs, Session
from mobizo_compiler.errors import ConfigError, DistributedError
from mobizo_compiler.format.files import raw_bytes
from mobizo_compiler.format.program import Program, StepResult

TIMEOUT_S = 1800.0  # also while rank 0 measures on rows for validation
_STATE, _STEP, _END, _FAILED = range(4)  # what rank 0 tells


class DistributedSession(Session):
    """A session whose steps are those of all ranks; every rank has one, of the same program.

    `torchrun` starts the ranks, and its variables say who is who. `train_step` and `finetune` are called on all ranks
    alike; everything else, from `evaluate` to `export_adapter`, is the rank's own affair.

    Args:
        program: As for `Session`; its file lies where each rank can read it.
        timeout_s: How long a rank waits for the others before it takes them for dead.
        options: As for `Session`.

    Raises:
        ConfigError: The process was not started by `torchrun`, or the steps of this program cannot be averaged.
        DistributedError: A rank has another program, or is not there.
    """

    def __init__(self, program: Program | str | PathLike[str], *, timeout_s: float = TIMEOUT_S, **options: Any) -> None:
        super().__init__(program, **options)
        _check_average(self.program)
        if not dist.is_initialized():
            if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]:
                raise ConfigError(
                    f"this process has no ranks beside it: {missing[0]} is not set",
                    hint="torchrun --nproc-per-node 2 YOUR_SCRIPT starts two",
                )
            with _heard():
                dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_s))
            atexit.register(_leave)  # else its threads meet the end of the process, which aborts then
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._step = 0  # that the next batch is for
        self._leads = self._told_state = False
        prints = self._gathered(torch.frombuffer(bytearray(fingerprint(self.program)), dtype=torch.uint8))
        if other := next((rank for rank, found in enumerate(prints) if not torch.equal(found, prints[0])), None):
            raise DistributedError(f"rank {other} has another program than rank 0", hint="give all ranks one file")

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
        """
        size = self.program.manifest.eps if eps is None else eps
        if self._leads:
            if not self._told_state:
                self._tell(_STATE)
                self._state_of_rank_0()
                self._told_state = True
            self._tell(_STEP, self._step, seed, learning_rate, size)
        asked = [float(seed), float(learning_rate), float(size)]
        differentiates = self.program.manifest.zo.differentiates
        before = self.state()
        try:
            rate = learning_rate if differentiates else 0.0
            result = super().train_step(inputs, labels, seed=seed, learning_rate=rate, eps=size)
        except BaseException:
            with contextlib.suppress(DistributedError):
                self._exchanged(asked, before, None)
            raise
        found = self._exchanged(asked, before, result)
        if not differentiates:
            self.load_state(before)  # a rule that remembers its steps has counted that one
        loss, lanes, gradient = found[0], found[1 : 1 + len(result.lane_losses)], found[1 + len(result.lane_losses) :]
        combined = StepResult(float(loss.float()), lanes.float(), gradient.float())
        if not bool(combined.projected_gradient.isfinite().all()):
            self.load_state(before)  # a rank's loss was not finite, and so the step is void for all
        elif differentiates:
            self._average_steps(before)
        else:
            self.replay(seed, combined.projected_gradient, learning_rate)
        return combined

    def finetune(self, batches: Batches, *, steps: int, learning_rate: LearningRate, **options: Any) -> RunSummary:
        """`Session.finetune`, on all ranks: rank r of n takes batch `step * n + r` for a step.

        Rank 0 does as its arguments say. The other ranks take of theirs the batches alone, and return what rank 0 does.

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
            self._step = step
            return cast(Batch, batch(step * self.ranks + self.rank))  # a pair, where labels may be missing

        if self.rank:
            return self._follow(own)
        self._leads, self._told_state = True, False
        ending, summary = _FAILED, b""
        try:
            done = super().finetune(own, steps=steps, learning_rate=learning_rate, **options)
            ending, summary = _END, json.dumps(dataclasses.asdict(done)).encode()
            return done
        finally:
            self._leads = False
            with contextlib.suppress(DistributedError):  # whoever is gone needs no goodbye
                self._tell(ending, len(summary))
                if summary:
                    self._heard_from_rank_0(torch.frombuffer(bytearray(summary), dtype=torch.uint8))

    def _follow(self, own: Callable[[int], Batch]) -> RunSummary:
        """Do what rank 0 tells, until it says that the run is over."""
        while True:
            told = self._heard_from_rank_0(torch.zeros(5, dtype=torch.float64)).tolist()
            kind, step = int(told[0]), int(told[1])
            if kind == _FAILED:
                raise DistributedError("rank 0 failed", hint="its own error says why")
            if kind == _END:
                text = self._heard_from_rank_0(torch.zeros(step, dtype=torch.uint8))
                done = json.loads(bytes(text.tolist()))
                return RunSummary(**done | {"losses": tuple(done["losses"]), "void": tuple(done["void"])})
            if kind == _STATE:
                self._state_of_rank_0()
            else:
                inputs, labels = cast(tuple[Any, Tensor], own(step))
                self.train_step(inputs, labels, seed=int(told[2]), learning_rate=told[3], eps=told[4])

    def _exchanged(self, asked: list[float], before: Tensor, result: StepResult | None) -> Tensor:
        """The mean of what all ranks measured, float64 [1 + lanes + q], if all of them made the same step."""
        zo = self.program.manifest.zo
        measured = torch.full((1 + zo.lanes + zo.queries,), math.nan, dtype=torch.float64)
        if result is not None:
            values = (torch.tensor([result.loss]), result.lane_losses, result.projected_gradient)
            measured = torch.cat([value.double().flatten() for value in values])
        own = torch.tensor([float(result is None), *asked, float(zlib.crc32(raw_bytes(before)))], dtype=torch.float64)
        found = self._gathered(torch.cat([own, measured]))
        if result is None:
            return measured  # this rank's own error is on its way
        for rank, (failed, *step) in enumerate(numbers[: len(own)].tolist() for numbers in found):
            if failed:
                raise DistributedError(f"rank {rank} failed", hint="its own error says why")
            if step[:-1] != asked:
                raise DistributedError(
                    f"rank {rank} makes the step {step[:-1]} (seed, learning rate, eps), rank {self.rank} {asked}",
                    hint="call train_step with the same numbers on all ranks",
                )
            if step[-1] != float(own[-1]):
                raise DistributedError(
                    f"rank {rank} has another state than rank {self.rank}",
                    hint="finetune begins with the state of rank 0 on all; ranks with other engines or processors "
                    'stay equal with noise="rademacher" alone',
                )
        return torch.stack([numbers[len(own) :] for numbers in found]).sum(dim=0) / self.ranks

    def _average_steps(self, before: Tensor) -> None:
        """Take the mean of the ranks' steps for the step: that of gradients, where a step is one times a rate."""
        moved = (self.state() - before).double()
        with _heard():
            dist.all_reduce(moved)
        self.load_state((before.double() + moved / self.ranks).float())

    def _tell(self, kind: int, *numbers: float) -> None:
        self._heard_from_rank_0(torch.tensor([kind, *numbers, *[0.0] * (4 - len(numbers))], dtype=torch.float64))

    def _state_of_rank_0(self) -> None:
        self.load_state(self._heard_from_rank_0(self.state()))

    def _heard_from_rank_0(self, values: Tensor) -> Tensor:
        with _heard():
            dist.broadcast(values, 0)
        return values

    def _gathered(self, values: Tensor) -> list[Tensor]:
        found = [torch.empty_like(values) for _ in range(self.ranks)]
        with _heard():
            dist.all_gather(found, values)
        return found


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """Errors of torch.distributed in this block, as ours."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"a rank is gone, or does not answer: {error}",
            hint="start all ranks again (torchrun --max-restarts does): a run with a folder goes on from its journal",
        ) from error


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_average(program: Program) -> None:
    """Raise `ConfigError` for a program whose ranks' steps have no meaningful mean."""
    manifest = program.manifest
    plain = manifest.rule["name"] == "sgd" and manifest.zo.clip is None
    if manifest.zo.differentiates and not plain:
        raise ConfigError(
            f"steps of the {manifest.zo.estimator} estimator have a mean over ranks with the rule sgd alone, unclipped",
            hint='compile with rule="sgd" and without clip, or with estimator="two-sided"',
        )
