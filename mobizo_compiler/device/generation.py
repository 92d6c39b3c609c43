"""Tokens one after the other: from logits to the next token, and a loop over the method `forward`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Generator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mobizo_compiler.device.scalars import float32, whole
from mobizo_compiler.errors import InputError, TokenRangeError
from mobizo_compiler.format.manifest import Generation
from mobizo_compiler.options import MAX_SEED

Ending = Literal["end", "limit", "length"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: Logits are divided by it before one is drawn; 0 takes the most likely token.
        top_k: Draw among so many of the most likely tokens; 0 for all.
        top_p: Draw among the most likely tokens that have this share of the probability together.
        seed: 0..2^31-1; the same seed draws the same tokens from the same logits.

    Raises:
        InputError: A number is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if float32("temperature", self.temperature) < 0:
            raise InputError(f"temperature is {self.temperature}; it must be 0 or more")
        if not 0 < float32("top_p", self.top_p) <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0, and at most 1")
        whole("top_k", self.top_k, 0, MAX_SEED)
        whole("seed", self.seed, 0, MAX_SEED)

    def generator(self) -> torch.Generator:
        """What `choose` draws with."""
        return torch.Generator().manual_seed(self.seed)

    def choose(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """The next token, from logits [vocabulary].

        >>> Sampling().choose(torch.tensor([0.0, 2.0, 1.0]), Sampling().generator())
        1
        """
        if not self.temperature:
            return int(logits_V.argmax())
        values, tokens = (logits_V.double() / self.temperature).sort(descending=True, stable=True)
        if self.top_k:
            values, tokens = values[: self.top_k], tokens[: self.top_k]
        shares = F.softmax(values, dim=-1)
        before = shares.cumsum(0) - shares
        shares = shares[before < self.top_p]
        return int(tokens[torch.multinomial(shares, 1, generator=generator)])


MOST_LIKELY = Sampling()


def prompt_of(tokens: Sequence[int] | Tensor, generation: Generation) -> Tensor:
    """The tokens of a prompt as `forward` takes them, int64 [1, T].

    Raises:
        InputError: They are no token ids of one row, or so many that there is no room for another one.
        TokenRangeError: One is outside of the vocabulary.
    """
    try:
        given = torch.as_tensor(tokens).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the prompt must be token ids: {error}") from None
    if given.dtype.is_floating_point or given.dtype == torch.bool or given.dim() not in (1, 2) or not given.numel():
        raise InputError(f"the prompt must be token ids [T] or [1, T], not {given.dtype}{list(given.shape)}")
    if given.dim() == 2 and given.shape[0] != 1:
        raise InputError(
            f"the cache is for one row; the prompt has {given.shape[0]}", hint="one prompt after the other"
        )
    ids = given.reshape(1, -1).to(torch.int64).contiguous()
    if ids.shape[1] >= generation.context:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens, and the cache has room for {generation.context}, of which one is "
            "to be generated",
            hint="shorten it, or compile with a larger GenerateConfig(context=...)",
        )
    outside = (ids < 0) | (ids >= generation.vocabulary)
    if bool(outside.any()):
        raise TokenRangeError(
            f"the prompt has the token {int(ids[outside][0])}, outside 0..{generation.vocabulary - 1}"
        )
    return ids


def continued(
    forward: Callable[[Tensor, Tensor], Tensor],
    prompt: Tensor,
    context: int,
    most: int,
    sampling: Sampling,
    stops: Container[int],
) -> Generator[int, None, Ending]:
    """The tokens that go on with a prompt; the result of the generator says why there are no more.

    Args:
        forward: Logits [1, *, vocabulary] of tokens [1, T] at positions [T].
        prompt: Token ids [1, T].
        context: Tokens that the cache has room for.
        most: Most tokens to add.
        sampling: How one is chosen.
        stops: Tokens that end the text; they are not handed out.
    """
    generator, tokens, start = sampling.generator(), prompt, 0
    for _ in range(most):
        logits = forward(tokens, torch.arange(start, start + tokens.shape[1]))
        start += tokens.shape[1]
        token = sampling.choose(logits[0, -1], generator)
        if token in stops:
            return "end"
        yield token
        if start == context:
            return "length"
        tokens = torch.tensor([[token]])
    return "limit"
