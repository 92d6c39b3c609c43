"""Facts about a program that passes rely on, and the check behind each. What is not checked is not a fact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mobizo_compiler.graph.nodes import source_line
from mobizo_compiler.graph.program import LABELS_INPUT, STATE, STATE_INPUT, GraphProgram
from mobizo_compiler.upstream import OpOverload

FUNCTIONAL = "functional"
ANY_ROWS = "any-rows"
CANONICAL = "canonical"
LOSS = "loss"
SITES = "sites"
LANES = "lanes"
CLEAN_LANE = "clean-lane"
GRADIENT = "gradient"
PERTURBED = "perturbed"
DIFFERENCED = "differenced"
UPDATED = "updated"
STATIC = "static"
STATE_PASSED = "state-passed"


def _functional(program: GraphProgram) -> Iterator[str]:
    for node in program.graph.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            yield f"{source_line(node)} changes its input in place"


def _any_rows(program: GraphProgram) -> Iterator[str]:
    if not program.rows:
        yield "no input has rows"
    inputs = program.inputs
    for name, axis in program.rows.items():
        if name not in inputs or axis >= inputs[name].dim():
            yield f"input {name!r} is said to have its rows in axis {axis}"
    if program.fixed_rows is not None and not any(step.startswith("FreeRows") for step in program.history):
        yield f"the number of rows is fixed to {program.fixed_rows}"


def _canonical(program: GraphProgram) -> Iterator[str]:
    for node in program.graph.nodes:
        if node.target in (torch.ops.aten.alias.default, torch.ops.aten.view.default):
            yield f"{source_line(node)} is not in canonical form"


def _differenced(program: GraphProgram) -> Iterator[str]:
    wanted = ("loss", "lane_losses", "projected_gradient")
    if program.outputs not in (wanted, (*wanted, "gradient"), (*wanted, "row_losses")):
        yield f"the outputs are {program.outputs}, not {wanted}"


def _clean_lane(program: GraphProgram) -> Iterator[str]:
    if "exact" not in program.values:
        yield "no node is named 'exact'"


def _gradient(program: GraphProgram) -> Iterator[str]:
    if "gradient" not in program.outputs:
        yield f"the outputs are {program.outputs}, without a gradient"


def _loss(program: GraphProgram) -> Iterator[str]:
    if LABELS_INPUT not in program.inputs:
        yield f"there is no input {LABELS_INPUT!r}"
    if program.outputs == ("row_loss", "row_weight"):
        shapes = [tuple(map(str, node.meta["val"].shape)) for node in program.output_nodes.values()]
        if shapes[0] != shapes[1] or len(shapes[0]) != 1:
            yield f"row_loss and row_weight must both be [rows], not {shapes}"


def _sites(program: GraphProgram) -> Iterator[str]:
    if not program.sites:
        yield "there is no adapter site"
    end = 0
    for site in program.sites:
        if site.offset != end:
            yield f"site {site.fqn} starts at {site.offset}, not at {end}"
        end = site.offset + site.size
    for site in program.sites:
        if site.a_offset is not None:
            if site.a_offset != end:
                yield f"A of site {site.fqn} starts at {site.a_offset}, not at {end}"
            end = site.a_offset + site.r * site.in_features
    nodes = {node.name: node for node in program.graph.nodes}
    if "lanes" not in program.values:
        yield "no node is named 'lanes'"
    elif (value := nodes[program.values["lanes"]].meta["val"]).shape[1] != end:
        yield f"'lanes' is {tuple(value.shape)}, but the sites have {end} parameters"
    if f"b_{STATE}" not in nodes:
        yield "there is no state"


def _lanes(program: GraphProgram) -> Iterator[str]:
    nodes = {node.name: node for node in program.graph.nodes}
    lanes = nodes[program.values["lanes"]].meta["val"]
    if lanes.dim() != 2:
        yield f"'lanes' is {tuple(lanes.shape)}, not [lanes, parameters]"


def _perturbed(program: GraphProgram) -> Iterator[str]:
    nodes = {node.name: node for node in program.graph.nodes}
    if (count := nodes[program.values["lanes"]].meta["val"].shape[0]) < 2:
        yield f"there is nothing to compare {count} lane with"


def _updated(program: GraphProgram) -> Iterator[str]:
    if STATE not in program.exported.graph_signature.buffers_to_mutate.values():
        yield "no value is written to the state"


def _static(program: GraphProgram) -> Iterator[str]:
    def symbolic(value: Any) -> bool:
        if isinstance(value, Tensor):
            return any(isinstance(size, torch.SymInt) for size in value.shape)
        return isinstance(value, torch.SymInt)

    for node in program.graph.nodes:
        if symbolic(node.meta.get("val")) and not program.dynamic:
            yield f"{source_line(node)} has a symbolic size"


def _state_passed(program: GraphProgram) -> Iterator[str]:
    if list(program.inputs)[-1:] != [STATE_INPUT]:
        yield f"the last input is not {STATE_INPUT!r}"
    if STATE in program.exported.graph_signature.inputs_to_buffers.values():
        yield "there is a state that is no input"


CHECKS: dict[str, Callable[[GraphProgram], Iterator[str]]] = {
    FUNCTIONAL: _functional,
    ANY_ROWS: _any_rows,
    CANONICAL: _canonical,
    LOSS: _loss,
    SITES: _sites,
    LANES: _lanes,
    PERTURBED: _perturbed,
    CLEAN_LANE: _clean_lane,
    GRADIENT: _gradient,
    DIFFERENCED: _differenced,
    UPDATED: _updated,
    STATIC: _static,
    STATE_PASSED: _state_passed,
}


def broken(program: GraphProgram) -> list[str]:
    """What contradicts the facts that the program claims."""
    return [f"{fact}: {problem}" for fact in sorted(program.facts) for problem in CHECKS[fact](program)]
