"""The manifest of a compilation: what a program says about itself."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mobizo_compiler.analysis.outline import outline
from mobizo_compiler.analysis.ranges import input_ranges
from mobizo_compiler.analysis.targets import short_names
from mobizo_compiler.compiling.options import Options
from mobizo_compiler.config import ALL_LINEAR
from mobizo_compiler.errors import ConfigError
from mobizo_compiler.format.checksum import add_tensor, of_values
from mobizo_compiler.format.manifest import Manifest, nesting_to_json, tensor_spec
from mobizo_compiler.graph.example import Example
from mobizo_compiler.graph.program import LABELS_INPUT, PREFIX, STATE_INPUT, GraphProgram, as_read
from mobizo_compiler.quantization.weights import default_eps, described
from mobizo_compiler.step.losses import LOSSES
from mobizo_compiler.step.rules import RULES, UpdateRule, initial_memory

TESTED_SET = ("torch", "executorch", "torchao", "transformers", "networkx")
HISTORY_WIDTH = 200
MOST_RUNS = 1000


def installed_versions() -> dict[str, str]:
    """Versions of the packages that are pinned as one tested set."""
    versions = {}
    for package in TESTED_SET:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def described_program(
    captured: GraphProgram,
    methods: Mapping[str, GraphProgram],
    example: Example,
    options: Options,
    backend: str,
    base_model: str | None,
) -> Manifest:
    """The manifest of the methods that a captured graph was rewritten to."""
    lora = options.lora
    train_step, evaluate = methods["train_step"], methods["evaluate"]
    sites = [site.fqn for site in train_step.sites]
    names = short_names(sites, sites) if lora.target_modules in (None, ALL_LINEAR) else lora.target_modules
    inputs = {n: v for n, v in evaluate.inputs.items() if n != STATE_INPUT}
    public = [leaf.name for leaf in example.leaves] if example.keywords else list(inputs)
    assert captured.nesting is not None
    labels = options.loss.label_spec(
        captured.nesting.unflatten([n.meta["val"] for n in evaluate.output_nodes.values()])
    )
    ranges, dynamic = input_ranges(captured), captured.dynamic
    memory, (model, weights) = initial_memory(options.rule, train_step.parameters), _identity(captured)
    return Manifest(
        backend=backend,
        versions=installed_versions(),
        inputs=tuple(
            tensor_spec(name, value, dynamic, **dict(zip(("low", "high"), ranges.get(inner, ()), strict=False)))
            for name, (inner, value) in zip(public, inputs.items(), strict=True)
        ),
        keywords=example.keywords,
        fixed={name: repr(value) for name, value in example.fixed.items()},
        sizes=tuple(dynamic.values()),
        labels=tensor_spec(
            "labels",
            train_step.inputs[LABELS_INPUT],
            dynamic,
            low=labels.low,
            high=labels.high,
            also=labels.ignore_index,
            choices=labels.choices,
        ),
        outputs=tuple(tensor_spec(name, node.meta["val"], dynamic) for name, node in evaluate.output_nodes.items()),
        nesting=nesting_to_json(captured.nesting),
        sites=train_step.sites,
        lora=dataclasses.replace(lora, target_modules=names),
        zo=options.zo,
        loss=LOSSES.described(options.loss),
        lanes=options.zo.lanes,
        prefix=tuple(
            tensor_spec(name.removeprefix("mobizo_"), value, dynamic)
            for name, value in train_step.inputs.items()
            if name.startswith(PREFIX)
        ),
        rule=RULES.described(options.rule),
        memory=memory.numel(),
        memory_start=_runs(options.rule, memory),
        model=model,
        weights=weights,
        state=options.state,
        quantization=described(options.quantization),
        activation_memory_bytes=options.activation_memory_bytes,
        eps=default_eps(options.quantization),
        first_label=labels.first,
        max_labels=labels.max_labels,
        base_model=base_model,
        history={name: tuple(map(_shortened, method.history)) for name, method in methods.items()},
        outline=outline(captured, methods, example.rows),
    )


def _runs(rule: UpdateRule, memory: Tensor) -> tuple[tuple[int, float], ...]:
    """The memory before the first step as runs of equal numbers; nothing for zeros."""
    if not bool(memory.any()):
        return ()
    values, counts = torch.unique_consecutive(memory, return_counts=True)
    if len(values) > MOST_RUNS:
        raise ConfigError(
            f"{rule!r}: what init returns has {len(values)} runs of equal numbers, more than {MOST_RUNS}",
            hint="begin with zeros or other constants, and let the first update make the rest",
        )
    return tuple(zip(counts.tolist(), values.tolist(), strict=True))


def _shortened(step: str) -> str:
    """A step of the history; one that lists every site is cut."""
    return step if len(step) <= HISTORY_WIDTH else step[: HISTORY_WIDTH - 3] + "..."


def _identity(captured: GraphProgram) -> tuple[str, dict[str, int]]:
    """What says which model this is: SHA-256 of its weights, and a checksum of each by name.

    By the first, steps of one model are not replayed on another; by the second, a model can be compared with the one
    that was compiled, and the weight named that differs.
    """
    digest, weights = hashlib.sha256(), dict[str, int]()
    values = captured.placeholders
    tensors = ((path, stored, values[name]) for name, (path, stored) in captured.tensors().items())
    for path, stored, value in sorted(tensors, key=lambda item: item[0]):
        tensor = as_read(stored, value)
        add_tensor(digest, path, tensor)
        if path in captured.exported.state_dict and type(tensor) in (Tensor, nn.Parameter):
            weights[path] = of_values(tensor)
    return digest.hexdigest(), weights
