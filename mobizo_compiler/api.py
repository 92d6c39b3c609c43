"""`compile`: from a model to a program that trains itself."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, nn
from torch.export import ExportedProgram

from mobizo_compiler import passes
from mobizo_compiler.analysis.targets import heads, resolve_targets
from mobizo_compiler.backends import Backend, get_backend
from mobizo_compiler.compiling.cache import cached
from mobizo_compiler.compiling.described import described_program
from mobizo_compiler.compiling.model_config import answer_names, padding_of
from mobizo_compiler.compiling.smoothing import smoothing_of
from mobizo_compiler.compiling.verify import check_program
from mobizo_compiler.config import LoraConfig, ZOConfig
from mobizo_compiler.errors import (
    BackendRefusedError,
    BackendUnavailableError,
    CaptureError,
    ConfigError,
    ExampleInputError,
    LossError,
    MobizoError,
    NoMatchingTargetError,
    UnsupportedGraphError,
)
from mobizo_compiler.format.peft import read_peft
from mobizo_compiler.format.program import Program
from mobizo_compiler.graph.example import DynamicShapes, Example, ExampleInputs, RowAxes, bind_example
from mobizo_compiler.graph.pipeline import Observer, Pass, Pipeline, dump_to
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.quantization.weights import RECIPES, QuantizationConfig, Recipe
from mobizo_compiler.step.losses import CallableLoss, CausalLMLoss, Loss
from mobizo_compiler.step.rules import PLAIN, UpdateRule, get_rule

DUMP_VARIABLE = "MOBIZO_DUMP"
Progress = Callable[[str], None]
LossFunction = Callable[[Any, Tensor], Tensor]
_Graphs = tuple[GraphProgram, dict[str, GraphProgram]]


@contextlib.contextmanager
def _seldom_collected() -> Iterator[None]:
    """Let Python's garbage collector run seldom: a graph is many objects, and each collection visits them all."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


@_seldom_collected()
def compile(
    model: nn.Module | ExportedProgram,
    example_inputs: ExampleInputs,
    lora: LoraConfig | None = None,
    zo: ZOConfig | None = None,
    loss: Loss | LossFunction | None = None,
    quantization: str | QuantizationConfig | object | None = None,
    backend: str | Backend = "xnnpack",
    dynamic_shapes: DynamicShapes | None = None,
    *,
    state: str = "shared",
    row_axes: RowAxes | None = None,
    adapter: str | PathLike[str] | None = None,
    rule: str | UpdateRule = "sgd",
    split_prefix: bool = False,
    example_labels: Tensor | None = None,
    answers: Sequence[str] | None = None,
    base_model: str | None = None,
    dump_dir: str | PathLike[str] | None = None,
    cache_dir: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Program:
    """Compile a model into a program that fine-tunes itself with forward passes only.

    Args:
        model: A module in eval mode, or a `torch.export.ExportedProgram`.
        example_inputs: A tuple, or a dict for keyword arguments, nested as the model wants it. Their shapes are the
            shapes that the program takes. Values that are no tensors are fixed by the capture.
        lora: Which layers are adapted; `LoraConfig()` if None.
        zo: How the gradient is estimated; `ZOConfig()` if None.
        loss: `CausalLMLoss()` if None; a loss of `mobizo_compiler`, or a traceable function of the model's outputs and
            the labels to one loss per row, [rows].
        quantization: How the frozen base weights are stored: a recipe ("fp16", "8da8w", "8da4w", "int8", "int4" or
            "nf4"), a `QuantizationConfig`, or a configuration of torchao for all linear layers. None leaves them as
            they are, also if torchao quantized the model before.
        backend: Name of an installed backend, or a backend.
        dynamic_shapes: Sizes that may differ from call to call, as in `torch.export`: for each input (by name or
            position) a dict from axis to `torch.export.Dim(name, max=...)`. The row axis may be among them.
        answers: Names of the classes, or of the choices of a `ChoiceLoss`, in their order, kept in the program for
            those who have rows with names; if None, classes have the names that the model's configuration gives.
        base_model: Name or folder of the model, kept in the program for those who load its tokenizer or the adapter.
        dump_dir: Write the program text after every pass here; the environment variable MOBIZO_DUMP does the same.
        cache_dir: Reuse a program compiled before from the same graph, weights, options and versions.
        state: "shared": a buffer that all methods share, which the Python and C++ runtimes do; it starts at zero.
            "data": the same, but it starts from a data file (`.ptd`) that the runtime is given beside the program;
            sessions write such files, and need none. "io": the last input of every method and the last output of
            those that change it, for Android and iOS.
        row_axes: The axis of the rows of an input, by name or position, where it is not axis 0; None for an input
            without rows, which all lanes share. An input without axes, or with a first axis of 1 where the first
            input has more rows, has none anyway.
        adapter: Folder of a LoRA that peft saved, in place of `lora`: its layers are adapted, with its A.
            `Session.import_adapter` starts from its B.
        rule: What a step does with the estimate: "sgd", "momentum", "sign", "adam", "scalar-adam", or an `UpdateRule`.
        split_prefix: Make what no adapter reaches a method of its own, whose results a `Session` can keep on disk; for
            adapters in the last blocks (`LoraConfig.layers_to_transform`).
        example_labels: Labels for a loss that is a function; the first axis is rows.
        progress: Called with a line of text when a phase begins: capture, rewrite, lower, check.

    Raises:
        MobizoError: See `errors.py`; nothing has been written then.

    >>> import torch
    >>> model = nn.Sequential(nn.Embedding(11, 12), nn.Linear(12, 11)).eval()
    >>> program = compile(
    ...     model, (torch.zeros(2, 5, dtype=torch.long),), LoraConfig(r=2, target_modules=("1",)), backend="eager"
    ... )
    >>> program.sites
    (Site(fqn='1', offset=0, r=2, in_features=12, out_features=11, scaling=8.0, kernel=(), a_offset=None, outputs=()),)
    """
    say = progress or (lambda line: None)
    given: Mapping[str, tuple[Tensor, Tensor]] = {}
    if adapter is not None:
        if lora is not None:
            raise ConfigError("lora and adapter are both given", hint="the adapter says which layers, and how")
        found = read_peft(Path(adapter))
        lora, given = found.lora, {fqn: (found.a[fqn], found.b[fqn]) for fqn in found.a}
    lora, zo = lora or LoraConfig(), zo or ZOConfig()
    row_loss = _loss(loss, example_labels)
    recipe = _quantization(quantization)
    update_rule = get_rule(rule)
    _check_options(lora, zo, row_loss, state)
    target = get_backend(backend)
    if reason := target.unavailable():
        raise BackendUnavailableError(f"backend {target.name!r} cannot be used on this machine: {reason}")
    suffix = target.suffix
    if cache_dir is not None and suffix is None:
        raise ConfigError(f"programs of backend {target.name!r} cannot be cached: they have no file format")
    example = bind_example(model, example_inputs, row_axes, dynamic_shapes)
    if split_prefix and dynamic_shapes:
        raise ConfigError("split_prefix and dynamic_shapes exclude each other", hint="pad rows to one length")

    observer = functools.partial(_observer, dump_dir)

    def graphs(symbolic: bool) -> tuple[GraphProgram, dict[str, GraphProgram]]:
        say("capture")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch warns of its own use of it
            captured = passes.capture(model, example, symbolic=symbolic)
        say("rewrite")
        store = _store(captured, recipe, example)
        return captured, rewrite(
            captured, example.rows, lora, zo, row_loss, target, update_rule, split_prefix, state, store, given, observer
        )

    captured, methods = _symbolic_or_fixed(graphs, model, example)
    manifest = described_program(
        captured, methods, example, lora, zo, row_loss, target, update_rule, state, recipe, base_model
    )
    manifest = dataclasses.replace(
        manifest, answers=answer_names(answers, model, manifest), padding=padding_of(model, manifest)
    )
    if state == "data" and not target.data_files:
        raise BackendRefusedError(
            f"programs of backend {target.name!r} cannot look up their state in a data file",
            hint='state="shared", and Session.import_ptd',
        )
    if reasons := [f"{method}: {reason}" for method, p in methods.items() for reason in target.unsupported(p)]:
        raise BackendRefusedError(f"backend {target.name!r} cannot run this program:\n  - " + "\n  - ".join(reasons))

    def compile_anew() -> Program:
        say("lower")
        program = Program(manifest, target.lower(methods, manifest), methods["train_step"].lora_a, methods)
        say("check")
        if reason := check_program(program, row_loss, example.tensors):
            say(f"not run: {reason}; the program can be saved, but was not compared with its graphs")
        return program

    if cache_dir is None or suffix is None:
        return compile_anew()
    return cached(Path(cache_dir), methods, manifest, suffix, say, compile_anew)


def _symbolic_or_fixed(graphs: Callable[[bool], _Graphs], model: object, example: Example) -> _Graphs:
    """The graphs from a capture with a symbolic number of rows, or, for a module that resists, with a fixed one.

    What is wrong with the user's own arguments is wrong either way, and said at once.
    """
    if isinstance(model, ExportedProgram) or not isinstance(model, nn.Module) or model.training:
        return graphs(True)
    before = logging.root.manager.disable
    try:
        logging.disable(logging.ERROR)  # torch logs what fails while sizes are computed
        return graphs(True)
    except (LossError, NoMatchingTargetError, ExampleInputError):
        raise
    except Exception as error:
        symbolic = error
    finally:
        logging.disable(before)
    if any(leaf.dims for leaf in example.leaves):
        if isinstance(symbolic, MobizoError):
            raise symbolic
        raise CaptureError(f"the model cannot be compiled with these dynamic shapes: {symbolic}") from symbolic
    try:
        return graphs(False)
    except Exception as error:
        if isinstance(symbolic, UnsupportedGraphError) or not isinstance(error, MobizoError):
            error, symbolic = symbolic, error
        if isinstance(error, MobizoError):
            raise error from symbolic
        raise CaptureError(f"the captured graph cannot be rewritten: {error}") from symbolic


def rewrite(
    captured: GraphProgram,
    rows: int,
    lora: LoraConfig,
    zo: ZOConfig,
    loss: Loss,
    backend: Backend,
    rule: UpdateRule = PLAIN,
    split_prefix: bool = False,
    state: str = "shared",
    store: Sequence[passes.Quantize] = (),
    given: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({}),
    observer: Callable[[str], Observer | None] = lambda method: None,
) -> dict[str, GraphProgram]:
    """The methods of a program: static graphs that share one state, ready for the backend to lower."""
    carry: list[Pass] = [passes.PassState()] if state == "io" else []
    finish: list[Pass] = [passes.Specialize(rows), *store, passes.Canonicalize(), *carry, *backend.passes()]
    front: list[Pass] = [passes.AttachLoss(loss), passes.Canonicalize(), passes.FreeRows(), passes.SliceLabels()]
    observe = observer("train_step")
    with_loss = Pipeline(front, observe).run(captured)
    lora = resolve_targets(with_loss, lora)
    lanes: list[Pass] = [
        passes.InsertMPLoRA(lora, given=given, rule=rule),
        passes.MergeSiblings(),
        *([passes.SliceOutputs()] if all(step.by_row for step in store) else []),
        passes.DuplicateLanes(zo.lanes),
    ]
    step: list[Pass] = [passes.Perturb(zo), passes.DifferenceLosses(zo), passes.UpdateState(rule)]
    with_lanes = Pipeline(lanes, observe).run(with_loss)
    split: list[Pass] = [passes.AfterPrefix()] if split_prefix else []
    train_step = Pipeline([*split, *step, *finish], observe).run(with_lanes)
    adapted: list[Pass] = [
        passes.Canonicalize(),
        passes.SliceLabels(),
        passes.InsertMPLoRA(lora, train_step.sites, given, rule),
        passes.MergeSiblings(),
    ]
    evaluate = Pipeline([*adapted, *finish], observer("evaluate")).run(captured)
    replay = passes.Replay(train_step.sites, zo, rule, train_step.lora_a)
    methods = {
        "train_step": train_step,
        "evaluate": evaluate,
        "replay": Pipeline([replay, *carry], observer("replay")).run(passes.empty_program()),
    }
    if split_prefix:
        whole = [step for step in finish if step not in carry]
        methods["prefix"] = Pipeline([passes.Prefix(), *whole], observer("prefix")).run(with_lanes)
    return methods


def _store(captured: GraphProgram, quantization: Any, example: Example) -> list[passes.Quantize]:
    """What quantizes the base weights, if anything."""
    if quantization is None:
        return []
    output_layers = heads(captured)
    smoothing: dict[str, Tensor] = {}
    if isinstance(quantization, QuantizationConfig):
        smoothing = smoothing_of(captured, example.tensors, quantization, output_layers)
    return [passes.Quantize(quantization, output_layers, smoothing)]


def _observer(dump_dir: str | PathLike[str] | None, method: str) -> Observer | None:
    folder = dump_dir or os.environ.get(DUMP_VARIABLE)
    return dump_to(Path(folder), method) if folder else None


def _loss(loss: object, example_labels: Tensor | None) -> Any:
    """The loss as the passes want it: a function with example labels becomes one."""
    if loss is None or isinstance(loss, Loss) or not callable(loss):
        if example_labels is not None:
            raise ConfigError("example_labels are only for a loss that is a function", hint="leave them out")
        return CausalLMLoss() if loss is None else loss
    if not isinstance(example_labels, Tensor) or not example_labels.dim():
        raise ConfigError(
            f"the loss {loss!r} is a function, so example_labels must be a tensor with rows in its first axis",
            hint="compile(..., loss=function, example_labels=labels of one batch)",
        )
    return CallableLoss(loss, tuple(example_labels.shape[1:]), example_labels.dtype)


def _quantization(quantization: object) -> Any:
    """The option as the pass wants it: None, a `QuantizationConfig`, or a torchao configuration."""
    from torchao.core.config import AOBaseConfig

    if isinstance(quantization, str):
        return QuantizationConfig(cast(Recipe, quantization))
    if quantization is None or isinstance(quantization, (QuantizationConfig, AOBaseConfig)):
        return quantization
    raise ConfigError(
        f"quantization is {quantization!r}",
        hint=f"use None, one of {', '.join(RECIPES)}, a QuantizationConfig, or a configuration of torchao",
    )


def _check_options(lora: object, zo: object, loss: object, state: object) -> None:
    for name, value, kind in (("lora", lora, LoraConfig), ("zo", zo, ZOConfig), ("loss", loss, Loss)):
        if not isinstance(value, kind):
            raise ConfigError(f"{name} must be a {kind.__name__}, not {type(value).__name__}")
    if not dataclasses.is_dataclass(loss):
        raise ConfigError(f"loss must be a frozen dataclass, so that it can be named in the program; got {loss!r}")
    if state not in ("shared", "data", "io"):
        raise ConfigError(f"state is {state!r}", hint='use state="shared", state="data" or state="io"')
