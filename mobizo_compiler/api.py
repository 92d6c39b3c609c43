"""`compile` and `load`: from a model to a program that trains itself, and from a file back to that program."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from mobizo_compiler import passes
from mobizo_compiler.artifact import Program
from mobizo_compiler.backends import Backend, get_backend
from mobizo_compiler.backends.eager import EagerBackend
from mobizo_compiler.cache import cached
from mobizo_compiler.config import LoraConfig, ZOConfig
from mobizo_compiler.errors import BackendRefusedError, ConfigError, NotSupportedYetError
from mobizo_compiler.losses import CausalLMLoss, Loss
from mobizo_compiler.manifest import Manifest, tensor_spec
from mobizo_compiler.passes.capture import ExampleInputs, flat_inputs, in_program_order
from mobizo_compiler.pipeline import Observer, Pass, Pipeline, dump_to
from mobizo_compiler.program import EPS, LABELS, LEARNING_RATE, SEED, GraphProgram
from mobizo_compiler.verify import check_program

TESTED_SET = ("torch", "executorch", "torchao", "transformers", "networkx")
DUMP_VARIABLE = "MOBIZO_DUMP"
Progress = Callable[[str], None]


def compile(
    model: nn.Module | ExportedProgram,
    example_inputs: ExampleInputs,
    lora: LoraConfig | None = None,
    zo: ZOConfig | None = None,
    loss: Loss | None = None,
    quantization: None = None,
    backend: str | Backend = "xnnpack",
    dynamic_shapes: None = None,
    *,
    dump_dir: str | PathLike[str] | None = None,
    cache_dir: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Program:
    """Compile a model into a program that fine-tunes itself with forward passes only.

    Args:
        model: A module in eval mode, or a `torch.export.ExportedProgram` with a dynamic batch.
        example_inputs: A tuple of tensors, or a dict for keyword arguments; axis 0 of each is rows. Their shapes are
            the shapes that the program takes.
        lora: Which layers are adapted; `LoraConfig()` if None.
        zo: How the gradient is estimated; `ZOConfig()` if None.
        loss: `CausalLMLoss()` if None.
        quantization: Not built yet: None.
        backend: Name of an installed backend, or a backend.
        dynamic_shapes: Not built yet: None.
        dump_dir: Write the program text after every pass here; the environment variable MOBIZO_DUMP does the same.
        cache_dir: Reuse a program compiled before from the same graph, weights, options and versions.
        progress: Called with a line of text when a phase begins: capture, rewrite, lower, check.

    Raises:
        MobizoError: See `errors.py`; nothing has been written then.

    >>> model = nn.Sequential(nn.Embedding(11, 12), nn.Linear(12, 11)).eval()
    >>> program = compile(
    ...     model, (torch.zeros(2, 5, dtype=torch.long),), LoraConfig(r=2, target_modules=("1",)), backend="eager"
    ... )
    >>> program.sites
    (Site(fqn='1', offset=0, r=2, in_features=12, out_features=11, scaling=8.0),)
    """
    say = progress or (lambda line: None)
    lora, zo, loss = lora or LoraConfig(), zo or ZOConfig(), loss or CausalLMLoss()
    _check_options(lora, zo, loss, quantization, dynamic_shapes)
    target = get_backend(backend)
    if cache_dir is not None and isinstance(target, EagerBackend):
        raise ConfigError("programs of the eager backend cannot be cached: they have no file format")
    example_inputs = in_program_order(model, example_inputs)
    names, tensors = flat_inputs(example_inputs)

    say("capture")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch warns of its own use of it
        captured = passes.capture(model, example_inputs)
    observer = functools.partial(_observer, dump_dir)
    say("rewrite")
    methods = rewrite(captured, tensors[0].shape[0], lora, zo, loss, target, observer)
    manifest = _manifest(captured, methods, names, lora, zo, loss, target)
    if reasons := [f"{method}: {reason}" for method, p in methods.items() for reason in target.unsupported(p)]:
        raise BackendRefusedError(f"backend {target.name!r} cannot run this program:\n  - " + "\n  - ".join(reasons))

    def compile_anew() -> Program:
        say("lower")
        program = Program(manifest, target.lower(methods, manifest), methods["train_step"].lora_a, methods)
        say("check")
        check_program(program, loss, tensors)
        return program

    if cache_dir is None:
        return compile_anew()
    return cached(Path(cache_dir), methods, manifest, say, compile_anew)


def rewrite(
    captured: GraphProgram,
    rows: int,
    lora: LoraConfig,
    zo: ZOConfig,
    loss: Loss,
    backend: Backend,
    observer: Callable[[str], Observer | None] = lambda method: None,
) -> dict[str, GraphProgram]:
    """The three methods of a program: static graphs that share one state, ready for the backend to lower."""
    finish: list[Pass] = [passes.Specialize(rows), passes.Canonicalize(), *backend.passes()]
    train: list[Pass] = [
        passes.Canonicalize(),
        passes.AttachLoss(loss),
        passes.SliceLabels(),
        passes.InsertMPLoRA(lora),
        passes.DuplicateLanes(zo.lanes),
        passes.Perturb(zo.noise),
        passes.DifferenceLosses(),
        passes.UpdateState(),
    ]
    train_step = Pipeline([*train, *finish], observer("train_step")).run(captured)
    evaluate = Pipeline([passes.Canonicalize(), passes.InsertMPLoRA(lora), *finish], observer("evaluate")).run(captured)
    replay = passes.Replay(train_step.sites, zo.queries, zo.noise)
    return {
        "train_step": train_step,
        "evaluate": evaluate,
        "replay": Pipeline([replay], observer("replay")).run(passes.empty_program()),
    }


def load(path: str | PathLike[str]) -> Program:
    """Load a program file.

    Raises:
        ArtifactError: There is no such file, or it is truncated, damaged, or not a program of this compiler.
    """
    from mobizo_compiler.backends.lowering import load_program_file

    artifact, manifest, lora_a = load_program_file(Path(path))
    return Program(manifest, artifact, lora_a)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that are pinned as one tested set."""
    versions = {}
    for package in TESTED_SET:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _observer(dump_dir: str | PathLike[str] | None, method: str) -> Observer | None:
    folder = dump_dir or os.environ.get(DUMP_VARIABLE)
    return dump_to(Path(folder), method) if folder else None


def _check_options(lora: object, zo: object, loss: object, quantization: object, dynamic_shapes: object) -> None:
    for name, value, kind in (("lora", lora, LoraConfig), ("zo", zo, ZOConfig), ("loss", loss, Loss)):
        if not isinstance(value, kind):
            raise ConfigError(f"{name} must be a {kind.__name__}, not {type(value).__name__}")
    if not dataclasses.is_dataclass(loss):
        raise ConfigError(f"loss must be a frozen dataclass, so that it can be named in the program; got {loss!r}")
    if quantization is not None:
        raise NotSupportedYetError("quantization is not built yet", hint="use quantization=None")
    if dynamic_shapes is not None:
        raise NotSupportedYetError(
            "dynamic shapes are not built yet",
            hint="use dynamic_shapes=None and pad inputs to the shape of example_inputs",
        )


def _manifest(
    captured: GraphProgram,
    methods: Mapping[str, GraphProgram],
    names: tuple[str, ...] | None,
    lora: LoraConfig,
    zo: ZOConfig,
    loss: Loss,
    backend: Backend,
) -> Manifest:
    train_step, evaluate = methods["train_step"], methods["evaluate"]
    inputs = {n: v for n, v in train_step.inputs.items() if n not in (LABELS, SEED, EPS, LEARNING_RATE)}
    public = names or tuple(inputs)
    assert captured.out_spec is not None
    fakes = [node.meta["val"] for node in evaluate.output_nodes.values()]
    labels = loss.label_spec(pytree.tree_unflatten(fakes, captured.out_spec))
    try:
        out_spec: str | None = pytree.treespec_dumps(captured.out_spec)
    except NotImplementedError:
        out_spec = None
    limits = _vocabulary(captured)
    return Manifest(
        backend=backend.name,
        versions=installed_versions(),
        inputs=tuple(
            tensor_spec(name, value, **limits.get(inner, {}))
            for name, (inner, value) in zip(public, inputs.items(), strict=True)
        ),
        keywords=names is not None,
        labels=tensor_spec(
            "labels",
            train_step.inputs[LABELS],
            low=labels.low,
            high=labels.high,
            also=labels.ignore_index,
            choices=labels.choices,
        ),
        outputs=tuple(tensor_spec(name, node.meta["val"]) for name, node in evaluate.output_nodes.items()),
        out_spec=out_spec,
        sites=train_step.sites,
        lora=lora,
        zo=zo,
        loss=repr(loss),
        first_label=labels.first,
        max_labels=labels.max_labels,
    )


def _vocabulary(captured: GraphProgram) -> dict[str, dict[str, int | None]]:
    """Range of the values of every input that is looked up in an embedding table."""
    limits: dict[str, dict[str, int | None]] = {}
    for node in captured.graph.nodes:
        if node.target is torch.ops.aten.embedding.default and node.args[1].op == "placeholder":
            entries = int(node.args[0].meta["val"].shape[0])
            name = node.args[1].name
            if name in captured.inputs:
                known = limits.get(name, {}).get("high")
                limits[name] = {"low": 0, "high": entries - 1 if known is None else min(known, entries - 1)}
    return limits
