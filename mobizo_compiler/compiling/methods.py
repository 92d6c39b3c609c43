"""From a model to its methods: capture, then the pipeline of each method."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.export import ExportedProgram

from mobizo_compiler import passes
from mobizo_compiler.analysis.ranges import check_lookups
from mobizo_compiler.analysis.targets import output_layers
from mobizo_compiler.backends import Backend
from mobizo_compiler.compiling import pipelines
from mobizo_compiler.compiling.exact_from import with_exact_from
from mobizo_compiler.compiling.options import Options
from mobizo_compiler.compiling.smoothing import smoothing_of
from mobizo_compiler.errors import CaptureError, UnsupportedGraphError
from mobizo_compiler.graph.example import Example
from mobizo_compiler.graph.pipeline import Observer, Pipeline, dump_to
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.quantization.weights import QuantizationConfig
from mobizo_compiler.quiet import quiet

DUMP_VARIABLE = "MOBIZO_DUMP"


class Graphs(NamedTuple):
    """A captured graph, the methods that it was rewritten to, and what stores its weights in fewer bits.

    `options` are those that were given, with what only the graph could tell; `cached` is the graph that was captured
    with a cache, where the program generates.
    """

    captured: GraphProgram
    methods: dict[str, GraphProgram]
    store: tuple[passes.Quantize, ...]
    options: Options
    cached: GraphProgram | None = None


def captured_and_rewritten(
    model: nn.Module | ExportedProgram,
    example: Example,
    options: Options,
    backend: Backend,
    given: Mapping[str, tuple[Tensor, Tensor]],
    dump_dir: str | PathLike[str] | None,
    say: Callable[[str], None],
) -> Graphs:
    """The captured graph of a model, and the methods of its program, ready for the backend to lower.

    Args:
        model: The module or exported program.
        example: Its example inputs.
        options: What the program is.
        backend: What it will run on.
        given: A and B of every site by path, where A is not drawn.
        dump_dir: Where the text after every pass is written, if anywhere.
        say: Told of every phase.
    """
    observer = functools.partial(_observer, dump_dir)

    def graphs(symbolic: bool) -> Graphs:
        say("capture")
        with quiet(message=".*LeafSpec"):  # torch warns of its own use of it
            captured = passes.capture(model, example, symbolic=symbolic)
        check_lookups(captured, example.tensors)
        say("rewrite")
        parts = pipelines.Parts(
            example.rows, _quantize_passes(captured, options.quantization, example), tuple(backend.passes()), given
        )
        known = with_exact_from(options, captured, parts, say)
        return Graphs(captured, rewritten(captured, known, parts, observer), parts.quantize, known)

    found = _symbolic_or_fixed(graphs, model, example, say)
    if options.generate is None:
        return found
    say("capture with a cache")
    with quiet():
        cached = passes.capture_cache(model, found.captured, options.generate.context)
    train_step = found.methods["train_step"]
    parts = pipelines.Parts(1, found.store, tuple(backend.passes()), given, train_step.sites, train_step.lora_a)
    say("rewrite")
    forward = Pipeline(pipelines.forward(options, parts), observer("forward")).run(cached)
    return found._replace(methods={**found.methods, "forward": forward}, cached=cached)


def _symbolic_or_fixed(
    graphs: Callable[[bool], Graphs], model: object, example: Example, say: Callable[[str], None]
) -> Graphs:
    """The graphs from a capture with a symbolic number of rows, or, for a module that resists, with a fixed one.

    A second try follows a capture that fails and a graph that is refused, and nothing else: what is wrong with other
    arguments is wrong either way, and an error in a pass is one.
    """
    if isinstance(model, ExportedProgram) or not isinstance(model, nn.Module) or model.training:
        return graphs(True)
    try:
        with quiet(logging.ERROR, message=".*LeafSpec"):  # torch logs what fails while sizes are computed
            return graphs(True)
    except (CaptureError, UnsupportedGraphError) as error:
        symbolic = error
    if any(leaf.dims for leaf in example.leaves):
        raise symbolic
    reason = symbolic.problem.strip().partition("\n")[0]
    say(f"again with {example.rows} rows, because their number cannot be a symbol: {reason}")
    try:
        return graphs(False)
    except (CaptureError, UnsupportedGraphError) as error:
        # What is wrong with the graph is said of the graph; a capture is better explained by the one that is simpler.
        if isinstance(symbolic, UnsupportedGraphError):
            raise symbolic from error
        raise error from symbolic


def rewritten(
    captured: GraphProgram,
    options: Options,
    parts: pipelines.Parts,
    observer: Callable[[str], Observer | None] = lambda method: None,
) -> dict[str, GraphProgram]:
    """The methods of a program: static graphs that share one state."""
    steps = pipelines.train_step(options, parts)
    after = pipelines.prefix(options, parts) if options.split_prefix else []
    alike = pipelines.common(steps, after)
    observe = observer("train_step")
    with_lanes = Pipeline(steps[:alike], observe).run(captured)
    train_step = Pipeline(steps[alike:], observe).run(with_lanes)
    parts = dataclasses.replace(parts, sites=train_step.sites, lora_a=train_step.lora_a)
    methods = {
        "train_step": train_step,
        "evaluate": Pipeline(pipelines.evaluate(options, parts), observer("evaluate")).run(captured),
    }
    if not options.zo.differentiates:
        alone = pipelines.replay(options, parts)
        methods["replay"] = Pipeline(alone, observer("replay")).run(passes.empty_program())
    if after:
        methods["prefix"] = Pipeline(after[alike:], observer("prefix")).run(with_lanes)
        alone = pipelines.row_losses(options, parts)
        methods["row_losses"] = Pipeline(alone, observer("row_losses")).run(captured)
    return methods


def _quantize_passes(captured: GraphProgram, quantization: Any, example: Example) -> tuple[passes.Quantize, ...]:
    """What quantizes the base weights, if anything."""
    if quantization is None:
        return ()
    outputs = output_layers(captured)
    smoothing: dict[str, Tensor] = {}
    if isinstance(quantization, QuantizationConfig):
        smoothing = smoothing_of(captured, example.tensors, quantization, outputs)
    return (passes.Quantize(quantization, outputs, smoothing),)


def _observer(dump_dir: str | PathLike[str] | None, method: str) -> Observer | None:
    folder = dump_dir or os.environ.get(DUMP_VARIABLE)
    return dump_to(Path(folder), method) if folder else None
