"""A prompt on the graph that was captured with a cache: what `compile` compares the method `forward` with.

One call has the whole prompt. Adapters are added as in `captured_step.py`, and with adapters at zero the logits are
those of the model itself.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from mobizo_compiler.compiling.captured_step import AddAdapters, InFloat64, given_adapters, rounds, without_rounding
from mobizo_compiler.errors import CaptureError
from mobizo_compiler.format.manifest import Generation
from mobizo_compiler.format.program import Runner
from mobizo_compiler.graph.eager import EagerRunner
from mobizo_compiler.graph.pipeline import Pass, Pipeline
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.passes import Specialize
from mobizo_compiler.step.agreement import (
    ROUNDING,
    Compare,
    compare_outputs,
    largest_difference,
    root_mean_square,
)
from mobizo_compiler.step.sites import Site, initial_state

MOST_TOKENS, ONE_BY_ONE, SEED = 12, 3, 20
WRONG = 0.05  # a difference that no rounding explains, as a share of the largest logit


class CapturedForward:
    """Logits of a prompt of random tokens.

    Args:
        cached: The graph.
        sites: The adapters.
        lora_a: A of every site by path.
        store: What quantizes the base weights.
        generation: What `forward` takes.
        model: The model, where its own logits are those that are wanted; None where weights were quantized.

    Raises:
        CaptureError: The model computes something else with the cache.
    """

    def __init__(
        self,
        cached: GraphProgram,
        sites: Sequence[Site],
        lora_a: Mapping[str, Tensor],
        store: Sequence[Pass],
        generation: Generation,
        model: nn.Module | None,
    ) -> None:
        self.sites, self.lora_a, self.generation = tuple(sites), lora_a, generation
        self.program = Pipeline([AddAdapters(self.sites), Specialize(1), *store]).run(cached)
        tokens = min(MOST_TOKENS, generation.context - 1)
        generator = torch.Generator().manual_seed(SEED)
        self.tokens = torch.randint(generation.vocabulary, (1, tokens), generator=generator)
        self.positions = torch.arange(tokens)
        if model is None:
            self.at_zero = self.logits(initial_state(self.sites, lora_a))
        else:
            with torch.no_grad():
                self.at_zero = model(input_ids=self.tokens, use_cache=False).logits
        self._check_cache()

    def logits(self, trained: Tensor) -> Tensor:
        """Of every token, [1, T, vocabulary], with these trained numbers, [P]."""
        runner = EagerRunner({"forward": self.program})
        return runner.call("forward", [*self._inputs, *given_adapters(self.sites, self.lora_a, trained)])[0]

    def _check_cache(self) -> None:
        """Raise `CaptureError` if the model goes on otherwise from a cache of fixed length than from the text itself.

        Some models of transformers reckon with the length of the cache where that of the text is meant. What is wrong
        by rounding alone is for the check of the program; where activations are rounded to integers, which may move
        logits as far as a wrong cache, neither side is.
        """
        start = initial_state(self.sites, self.lora_a)
        given, count = given_adapters(self.sites, self.lora_a, start), self.tokens.shape[1]
        smooth = self._smooth()
        runner = EagerRunner({"forward": smooth.program})
        logits = self.at_zero if smooth is self else smooth.logits(start)
        for begin, end in self._pieces[1:]:
            (found,) = runner.call("forward", [self.tokens[:, begin:end], self.positions[begin:end], *given])
            wanted = logits[:, end - 1]
            if not largest_difference(found[:, -1], wanted) <= WRONG * max(1.0, float(wanted.abs().max())):
                raise CaptureError(
                    f"the model computes other logits for token {end - 1} of {count} with a cache of "
                    f"{self.generation.context} tokens than without one",
                    hint="leave generate out: evaluate gives the logits of whole rows",
                )

    @property
    def _pieces(self) -> list[tuple[int, int]]:
        """First and last tokens of calls: the whole prompt; then its end token by token, behind its beginning."""
        count = self.tokens.shape[1]
        ends = [(at, at + 1) for at in range(count - ONE_BY_ONE, count)]
        return [(0, count), (0, count - ONE_BY_ONE), *ends]

    @property
    def _inputs(self) -> list[Tensor]:
        return [self.tokens, self.positions]

    def check(self, runner: Runner, compare: Compare, at_zero: Tensor, start: Tensor) -> None:
        """Raise `LoweringError` unless `forward` gives the same logits.

        Args:
            runner: The program.
            compare: As in `agreement.py`.
            at_zero: The state [S] with adapters at zero.
            start: A state with adapters at random.
        """
        trained = start[: sum(site.trained for site in self.sites)]
        rounded = self._rounded(trained)
        for adapters, state, wanted in (
            ("without adapters", at_zero, self.at_zero),
            ("with adapters", start, self.logits(trained)),
        ):
            runner.state().copy_(state)
            for begin, end in self._pieces:
                (found,) = runner.call("forward", [self.tokens[:, begin:end].contiguous(), self.positions[begin:end]])
                first = begin if self.generation.all_logits else end - 1
                what = f"logits of tokens {first} to {end - 1} {adapters}"
                single = functools.partial(self._single_precision, trained, first, end)
                compare_outputs(compare, "forward", what, found, wanted[:, first:end], rounded, single)
            compare("forward", "state", runner.state().clone(), state, 0.0)

    def _single_precision(self, trained: Tensor, first: int, end: int) -> float:
        """How far float32 is from float64 in logits, as a root mean square."""
        given = given_adapters(self.sites, self.lora_a, trained)
        exact = InFloat64(self.program).outputs([*self._inputs, *given])[-1]
        return root_mean_square((exact.double() - self.logits(trained).double())[:, first:end])

    def _rounded(self, trained: Tensor) -> float | None:
        """How far activations that are rounded to integers move logits; None if none are."""
        smooth = self._smooth()
        if smooth is self:
            return None
        return ROUNDING * largest_difference(smooth.logits(trained), self.logits(trained))

    def _smooth(self) -> Self:
        """The same without activations that are rounded to integers; itself, if none are."""
        if not rounds(self.program):
            return self
        smooth = copy.copy(self)
        smooth.program = without_rounding(self.program)
        return smooth
