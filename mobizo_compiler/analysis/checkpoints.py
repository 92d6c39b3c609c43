"""Which values of a forward pass are kept for its backward pass, and which are computed again, within a bound of bytes.

The forward pass is cut into segments where few bytes cross (Chen et al. 2016, arXiv 1604.06174); what crosses is kept.
In each segment a minimum cut (networkx; Jain et al. 2020, arXiv 1910.02653, take an integer program) chooses what else
is kept: a value costs its bytes, one that is computed again its work, times a price. The price decides between memory
and time; of two prices that a bound lies between, the lower is paid in the first segments, whose values wait longest.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import networkx as nx
from torch import fx

from mobizo_compiler.analysis.costs import tensor_bytes, work_bytes

# Bytes that are kept rather than doing the work of one byte again; 0 for as few bytes as there can be.
PRICES = (4.0, 1.0, 0.25, 0.06, 0.0)
PARTS = (2, 4, 8, 16, 32, 64, 128)  # into which the bytes that are needed are divided, one after the other


# The backward pass, in order: bytes of a value, and the positions of the forward and backward values that it reads.
Backward = Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of the forward pass.

    Args:
        bytes: Its size.
        work: What computing it costs, in bytes.
        inputs: Positions of the values that it is made of.
        needed: Whether the backward pass reads it.
    """

    bytes: int
    work: int
    inputs: tuple[int, ...]
    needed: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to compute again.

    Args:
        again: For each segment, the positions of the values that are computed again, in order.
        peak: The most bytes that are live at a time.
        work: The work that is done again, in bytes.
    """

    again: tuple[tuple[int, ...], ...]
    peak: int
    work: int


def plan(values: Sequence[Value], backward: Backward, most: int) -> Plan:
    """The least work that keeps the live bytes of both passes below a bound.

    Args:
        values: The forward pass, in order.
        backward: The backward pass.
        most: The bound in bytes.

    Returns:
        The plan; if none keeps the bound, the one with the lowest peak.

    >>> chain = [Value(8, 16, (i - 1,) if i else (), True) for i in range(6)]
    >>> backward = [(8, (5 - i,), (i - 1,) if i else ()) for i in range(6)]
    >>> plan(chain, backward, 64), plan(chain, backward, 40).peak
    (Plan(again=(), peak=56, work=0), 40)
    """
    best = Plan((), peak_bytes(values, backward, ()), 0)
    if best.peak <= most:
        return best
    for again in _candidates(values):
        work = sum(values[position].work for part in again for position in part)
        if best.peak > most or work < best.work:
            best = _better(best, Plan(again, peak_bytes(values, backward, again), work), most)
    return best


def _better(one: Plan, other: Plan, most: int) -> Plan:
    fits = [candidate for candidate in (one, other) if candidate.peak <= most]
    return min(fits, key=lambda p: p.work) if fits else min(one, other, key=lambda p: p.peak)


def _candidates(values: Sequence[Value]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Ways to compute again, for several lengths of segments and several prices, and for pairs of prices."""
    needed = sum(value.bytes for value in values if value.needed)
    seen = set()
    for parts in PARTS:
        cuts = tuple(segments(values, needed // parts))
        if cuts in seen or len(cuts) < 3:
            continue
        seen.add(cuts)
        # What is behind the last cut is read at once; computing it again would free nothing.
        ranges = list(itertools.pairwise(cuts))[:-1]
        least = functools.cache(_least)
        priced: list[list[tuple[int, ...]]] = [[()] * len(ranges)]
        priced += [[_again(values, start, stop, price, least) for start, stop in ranges] for price in PRICES]
        for dear, cheap in itertools.pairwise(priced):
            for first in _shares(len(ranges)):
                yield (*cheap[:first], *dear[first:])


def _shares(count: int) -> list[int]:
    """How many of the first segments: all numbers of a few, and sixteen of many."""
    return sorted({round(count * sixteenth / 16) for sixteenth in range(1, 17)} - {0})


# -- segments ----------------------------------------------------------------------------------------------------------


def segments(values: Sequence[Value], most: int) -> list[int]:
    """Where to cut, with the two ends, so that the fewest bytes cross and each part has at most so many needed bytes.

    >>> chain = [Value(1, 1, (i - 1,) if i else (), True) for i in range(6)]
    >>> segments(chain, 2)
    [0, 2, 4, 6]
    """
    count = len(values)
    crossing = _crossing(values)
    before = [0, *itertools.accumulate(value.bytes if value.needed else 0 for value in values)]
    cost, last = [0] + [0] * count, [0] * (count + 1)
    window: list[int] = [0]  # candidates for the cut before, of ascending cost
    start = 0
    for end in range(1, count + 1):
        while start < len(window) - 1 and before[end] - before[window[start]] > most:
            start += 1
        last[end] = window[start]
        cost[end] = cost[last[end]] + crossing[end] + 1
        while len(window) > start and cost[window[-1]] >= cost[end]:
            window.pop()
        window.append(end)
        start = min(start, len(window) - 1)
    cuts = [count]
    while cuts[-1]:
        cuts.append(last[cuts[-1]])
    return cuts[::-1]


def _crossing(values: Sequence[Value]) -> list[int]:
    """For each place between two values, the bytes that are made before it and read behind it."""
    change = [0] * (len(values) + 2)
    for position, end in _last_reads(values).items():
        change[position + 1] += values[position].bytes
        change[end + 1] -= values[position].bytes
    return list(itertools.accumulate(change[: len(values) + 1]))


def _last_reads(values: Sequence[Value]) -> dict[int, int]:
    return {inner: reader for reader, value in enumerate(values) for inner in value.inputs}


# -- the cut of one segment --------------------------------------------------------------------------------------------

_Network = tuple[tuple[int, int, tuple[int, ...], bool, bool], ...]


def _again(
    values: Sequence[Value], start: int, stop: int, price: float, cut: Callable[[_Network, float], tuple[int, ...]]
) -> tuple[int, ...]:
    """The values of a segment that are computed again. Equal segments are cut once."""
    read_behind = {inner for value in values[stop:] for inner in value.inputs if start <= inner < stop}
    network = tuple(
        (
            values[position].bytes,
            values[position].work,
            tuple(inner - start for inner in values[position].inputs if inner >= start),
            values[position].needed,
            position in read_behind,
        )
        for position in range(start, stop)
    )
    return tuple(start + index for index in cut(network, price))


def _least(network: _Network, price: float) -> tuple[int, ...]:
    graph = nx.DiGraph()
    graph.add_nodes_from(["there", "read"])
    for index, (size, work, inputs, needed, kept) in enumerate(network):
        if kept:
            graph.add_edge("there", ("made", index))
        else:
            graph.add_edge("there", ("made", index), capacity=price * work + 1)
        graph.add_edge(("made", index), index, capacity=size + 1)
        for inner in inputs:
            graph.add_edge(inner, ("made", index))
        if needed:
            graph.add_edge(index, "read")
    _, (_, behind) = nx.minimum_cut(graph, "there", "read")
    return tuple(index for index in range(len(network)) if ("made", index) in behind)


# -- what is live ------------------------------------------------------------------------------------------------------


def order(backward: Backward, again: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Before which calls of the backward pass which values are computed again: before the first that reads one."""
    segment = {position: number for number, part in enumerate(again) for position in part}
    places: dict[int, int] = {}
    for index, (_, reads, _) in enumerate(backward):
        for position in reads:
            if position in segment:
                places.setdefault(segment[position], index)
    found: dict[int, list[int]] = {}
    for number, index in sorted(places.items()):
        found.setdefault(index, []).extend(again[number])
    return found


def peak_bytes(
    values: Sequence[Value],
    backward: Backward,
    again: Sequence[Sequence[int]],
) -> int:
    """The most bytes that are live at a time, in both passes."""
    sizes: list[int] = []
    last: list[int] = []
    where: dict[int, int] = {}  # of a forward value, its place in time as the backward pass reads it
    of_backward: list[int] = []

    def make(size: int, reads: Sequence[int]) -> int:
        for moment in reads:
            last[moment] = len(sizes)
        sizes.append(size)
        last.append(len(sizes) - 1)
        return len(sizes) - 1

    for position, value in enumerate(values):
        where[position] = make(value.bytes, [where[inner] for inner in value.inputs])
    copies = order(backward, again)
    for index, (size, reads, inner) in enumerate(backward):
        for position in copies.get(index, ()):
            where[position] = make(values[position].bytes, [where[i] for i in values[position].inputs])
        of_backward.append(make(size, [*(where[p] for p in reads), *(of_backward[i] for i in inner)]))
    freed = [0] * (len(sizes) + 1)
    for moment, end in enumerate(last):
        freed[end + 1] += sizes[moment]
    live = itertools.accumulate(size - gone for size, gone in zip(sizes, freed, strict=False))
    return max(live, default=0)


# -- of a graph --------------------------------------------------------------------------------------------------------


def value_of(node: fx.Node, inputs: tuple[int, ...], needed: bool) -> Value:
    """What a call of the forward pass costs to keep and to make."""
    read = (inner for inner in node.all_input_nodes if inner.op != "placeholder")
    return Value(tensor_bytes(node), work_bytes(node, read), inputs, needed)
