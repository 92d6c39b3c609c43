"""Adapter sites: the adapted layers, and where their numbers lie in the flat state."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted layer, and where its B lies in the flat state.

    Args:
        fqn: Path of the module in the user's model.
        offset: First element of B in the state; B is `state[offset:offset + r * width].view(r, width)`.
        r: Rank.
        in_features: Width of the layer's input; channels for a convolution.
        out_features: Width of the layer's output; channels for a convolution.
        scaling: Factor of the branch, `lora_alpha / r`.
        kernel: Window of a convolution; empty for a linear layer.
        a_offset: First element of A in the state where A is trained too, as [in_features, r]; None where it is frozen.
        outputs: The outputs that are adapted, ascending; empty for all. The columns of B for others are zero, and not
            in the state.
    """

    fqn: str
    offset: int
    r: int
    in_features: int
    out_features: int
    scaling: float
    kernel: tuple[int, ...] = ()
    a_offset: int | None = None
    outputs: tuple[int, ...] = ()

    @property
    def block(self) -> int | None:
        """The first number in the path: which of the model's blocks it lies in, where blocks have numbers.

        >>> Site("model.layers.3.mlp.up_proj", 0, 8, 16, 32, 2.0).block
        3
        """
        found = re.search(r"[._](\d+)(?:\.|$)", f".{self.fqn}")
        return int(found.group(1)) if found else None

    @property
    def width(self) -> int:
        """Number of outputs that are adapted."""
        return len(self.outputs) or self.out_features

    @property
    def a_shape(self) -> tuple[int, ...]:
        """Shape of A: [r, in_features], followed by the window of a convolution."""
        return (self.r, self.in_features, *self.kernel)

    @property
    def size(self) -> int:
        """Number of elements of B in the state."""
        return self.r * self.width

    @property
    def trained(self) -> int:
        """Number of elements that are trained: B, and A where it is not frozen."""
        return self.size + (0 if self.a_offset is None else self.r * self.in_features)

    def lora_b(self, state: Tensor) -> Tensor:
        """B in a flat state [..., S], as [..., r, out_features]; an alias where all outputs are adapted."""
        part = state[..., self.offset : self.offset + self.size].reshape(*state.shape[:-1], self.r, self.width)
        if not self.outputs:
            return part
        whole = part.new_zeros(*part.shape[:-1], self.out_features)
        return whole.index_copy(-1, torch.tensor(self.outputs, device=part.device), part)

    def lora_a(self, state: Tensor) -> Tensor:
        """A in a flat state [..., S], where it is trained, as [..., r, in_features]."""
        assert self.a_offset is not None, "A of this site is frozen"
        part = state[..., self.a_offset : self.a_offset + self.r * self.in_features]
        return part.reshape(*state.shape[:-1], self.in_features, self.r).transpose(-1, -2)


def initial_state(sites: Sequence[Site], lora_a: Mapping[str, Tensor], memory: Tensor | None = None) -> Tensor:
    """The flat state before the first step, float32 [S].

    Every B, which is zero; then every A that is trained; then what the update rule remembers.

    Args:
        sites: The sites, in the order of their offsets.
        lora_a: A of every site by path, [r, in_features].
        memory: What the rule remembers, [numbers]; nothing if None.
    """
    parts = [torch.zeros(sum(site.size for site in sites))]
    parts += [lora_a[site.fqn].t().reshape(-1) for site in sites if site.a_offset is not None]
    return torch.cat(parts if memory is None else [*parts, memory])


def trained_before(sites: Sequence[Site], first: int) -> int:
    """How many numbers the sites before number `first` have."""
    return sum(site.trained for site in sites[:first])


def in_their_places(numbers_QM: Tensor, sites: Sequence[Site], first: int) -> Tensor:
    """Numbers of the sites before number `first`, where they lie among those of all sites, and zeros: [Q, P].

    >>> sites = [Site("0", 0, 1, 2, 1, 1.0, a_offset=2), Site("1", 1, 1, 2, 1, 1.0, a_offset=4)]
    >>> in_their_places(torch.tensor([[7.0, 8.0, 9.0]]), sites, 1)
    tensor([[7., 0., 8., 9., 0., 0.]])
    """
    if first >= len(sites):
        return numbers_QM
    all_b, b = sum(site.size for site in sites), sum(site.size for site in sites[:first])
    all_a, a = sum(site.trained for site in sites) - all_b, trained_before(sites, first) - b
    queries = numbers_QM.shape[0]
    of_b, of_a = torch.split(numbers_QM, [b, a], dim=1) if all_a else (numbers_QM, None)
    parts = [of_b, numbers_QM.new_zeros(queries, all_b - b)]
    if of_a is not None:
        parts += [of_a, numbers_QM.new_zeros(queries, all_a - a)]
    return torch.cat(parts, dim=1)
