"""Which passes make which method: pipelines as data. `mobizo passes` lists them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from mobizo_compiler import passes
from mobizo_compiler.compiling.options import Options
from mobizo_compiler.errors import ConfigError
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.step.sites import Site


@dataclasses.dataclass(frozen=True)
class Parts:
    """What passes have to know besides the options: of the model, of its example inputs and of the backend.

    Args:
        rows: Rows of a batch.
        quantize: What quantizes the base weights, if anything.
        backend: The backend's own passes.
        given: A and B of every site by path, [r, in_features] and [r, out_features], where A is not drawn.
        sites: The sites of `train_step`, for the methods that share its state.
        lora_a: A of these sites by path.
    """

    rows: int = 1
    quantize: tuple[passes.Quantize, ...] = ()
    backend: tuple[Pass, ...] = ()
    given: Mapping[str, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict, repr=False)
    sites: tuple[Site, ...] = ()
    lora_a: Mapping[str, Tensor] = dataclasses.field(default_factory=dict, repr=False)


def train_step(options: Options, parts: Parts = Parts()) -> list[Pass]:
    """From the captured graph to one training step."""
    zo = options.zo
    split: list[Pass] = [passes.AfterPrefix()] if options.split_prefix else []
    step: list[Pass] = []
    if zo.differentiates:
        step += [
            passes.Specialize(parts.rows),
            passes.Canonicalize(),
            passes.DecomposeAttention(),
            passes.DifferentiateCleanLane() if zo.measures else passes.Differentiate(),
            passes.Tidy(),
            passes.Canonicalize(),
        ]
        if options.activation_memory_bytes is not None:
            step.append(passes.Recompute(options.activation_memory_bytes))
    if zo.measures:
        step += [passes.Perturb(zo), passes.DifferenceLosses(zo)]
    step.append(passes.UpdateState(options.rule, options.zo))
    return _with_own("train_step", [*_lanes(options, parts), *split, *step, *_finish(options, parts)], options)


def prefix(options: Options, parts: Parts = Parts()) -> list[Pass]:
    """From the captured graph to what no adapter reaches. It has no state that could be passed."""
    whole = dataclasses.replace(options, state="shared")
    return _with_own("prefix", [*_lanes(options, parts), passes.Prefix(), *_finish(whole, parts)], options)


def row_losses(options: Options, parts: Parts = Parts()) -> list[Pass]:
    """From the captured graph to the loss of every row from where the prefix ends, with the adapter on."""
    one_lane = _lanes(options, parts, lanes=1)
    return _with_own("row_losses", [*one_lane, passes.AfterPrefix(), *_finish(options, parts)], options)


def evaluate(options: Options, parts: Parts = Parts()) -> list[Pass]:
    """From the captured graph to what the model returns, with the adapter on."""
    adapted: list[Pass] = [
        passes.Canonicalize(),
        passes.HoistPicks(),
        passes.InsertMPLoRA(options.lora, parts.sites, parts.given, options.rule),
        passes.MergeSiblings(),
    ]
    return _with_own("evaluate", [*adapted, *_finish(options, parts)], options)


def replay(options: Options, parts: Parts = Parts()) -> list[Pass]:
    """From an empty program to the update alone."""
    alone = passes.Replay(parts.sites, options.zo, options.rule, parts.lora_a)
    return _with_own("replay", [alone, *_carry(options)], options)


def forward(options: Options, parts: Parts = Parts()) -> list[Pass]:
    """From the graph that was captured with a cache to the next token's logits, with the adapter on."""
    last = [] if options.generate is not None and options.generate.all_logits else [passes.LastToken()]
    adapted: list[Pass] = [
        passes.Canonicalize(),
        *last,
        passes.HoistPicks(),
        passes.InsertMPLoRA(options.lora, parts.sites, parts.given, options.rule),
        passes.MergeSiblings(),
    ]
    alone = dataclasses.replace(parts, rows=1)
    return _with_own("forward", [*adapted, *_finish(options, alone)], options)


METHODS: Mapping[str, Callable[[Options, Parts], list[Pass]]] = {
    "train_step": train_step,
    "evaluate": evaluate,
    "replay": replay,
    "prefix": prefix,
    "row_losses": row_losses,
    "forward": forward,
}


def methods_of(options: Options) -> tuple[str, ...]:
    """The methods that a program with these options has."""
    left_out = {
        "prefix": not options.split_prefix,
        "row_losses": not options.split_prefix,
        "replay": options.zo.differentiates,
        "forward": options.generate is None,
    }
    return tuple(name for name in METHODS if not left_out.get(name, False))


def _lanes(options: Options, parts: Parts, lanes: int | None = None) -> list[Pass]:
    """The loss of the adapted model, with the lanes side by side, or one lane that begins where they do."""
    few = [passes.SliceOutputs()] if all(step.by_row for step in parts.quantize) else []
    return [
        passes.AttachLoss(options.loss),
        passes.Canonicalize(),
        passes.FreeRows(),
        passes.HoistPicks(),
        passes.InsertMPLoRA(options.lora, given=parts.given, rule=options.rule),
        passes.MergeSiblings(),
        *few,
        *([passes.AddCleanLane(options.zo)] if options.zo.differentiates and options.zo.measures else []),
        passes.DuplicateLanes(lanes or options.zo.lanes, cut_for=lanes and options.zo.lanes),
    ]


def _finish(options: Options, parts: Parts) -> list[Pass]:
    """The number of rows, the stored weights, and what the backend wants."""
    return [
        passes.Specialize(parts.rows),
        *parts.quantize,
        passes.Canonicalize(),
        *_carry(options),
        *parts.backend,
    ]


def _carry(options: Options) -> list[Pass]:
    return [passes.PassState()] if options.state == "io" else []


def _with_own(method: str, steps: list[Pass], options: Options) -> list[Pass]:
    """The pipeline with passes of one's own: before the first, or after the last, of the passes with that name."""
    for own in options.passes:
        if method not in (own.methods or METHODS):
            continue
        names = [step.name for step in steps]
        anchor = own.before or own.after
        if anchor not in names:
            if own.methods:
                raise ConfigError(
                    f"{own.step!r} has its place at {anchor!r}, which is no pass of {method}",
                    hint=f"its passes are {', '.join(dict.fromkeys(names))}",
                )
            continue
        place = names.index(own.before) if own.before else len(names) - names[::-1].index(anchor)
        steps = [*steps[:place], own.step, *steps[place:]]
    return steps


def common(one: Sequence[Pass], other: Sequence[Pass]) -> int:
    """How many passes two pipelines begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
