"""Capture a model as a functional graph in which the number of rows is a symbol.

Given:  an `nn.Module` in eval mode and example inputs (rows first), or an `ExportedProgram` with a symbolic batch
Result: input %ids: i64[rows, 5]
          %embedding = embedding(%p_weight, %ids) : f32[rows, 5, 12]
Numbers: exact.

The symbol is what later passes reason with: it says which axis of every value carries rows. This is the front of the
pipeline and so a function, not a `Pass`: there is no program before it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ExportGraphSignature

from mobizo_compiler import facts
from mobizo_compiler.errors import CaptureError, ExampleInputError, UnsupportedGraphError
from mobizo_compiler.program import GraphProgram, flat_call_graph

ExampleInputs = Sequence[Tensor] | Mapping[str, Tensor]
MAX_ROWS = 1 << 20


def capture(model: nn.Module | ExportedProgram, example_inputs: ExampleInputs) -> GraphProgram:
    """Capture `model` with a symbolic number of rows.

    Args:
        model: A module in eval mode, or a program that was exported with a dynamic batch.
        example_inputs: A tuple of tensors, or a dict for keyword arguments; axis 0 of every tensor is rows.

    Raises:
        ExampleInputError: The inputs are not tensors with one common number of rows.
        CaptureError: The model cannot be exported, or not with a symbolic number of rows.
        UnsupportedGraphError: The graph has inputs or outputs that are not tensors, or weights that change.
    """
    _, tensors = flat_inputs(example_inputs)
    if isinstance(model, ExportedProgram):
        exported = _functional(model)
    elif isinstance(model, nn.Module):
        exported = _export(model, example_inputs, tensors)
    else:
        raise CaptureError(
            f"cannot compile a {type(model).__name__}", hint="pass an nn.Module or a torch.export.ExportedProgram"
        )
    _check(exported, tensors)
    signature = exported.graph_signature
    spec = exported.call_spec.out_spec
    assert spec is not None
    flat = ExportedProgram(
        root=nn.Module(),
        graph=exported.graph,
        graph_signature=signature,
        state_dict={name: _frozen(tensor) for name, tensor in exported.state_dict.items()},
        range_constraints=exported.range_constraints,
        module_call_graph=flat_call_graph(len(signature.user_inputs), len(signature.user_outputs)),
        constants={k: v.detach() if isinstance(v, Tensor) else v for k, v in exported.constants.items()},
        verifiers=exported.verifiers,
    )
    outputs = tuple(f"output_{position}" for position in range(len(signature.user_outputs)))
    found = frozenset({facts.FUNCTIONAL, facts.SYMBOLIC_ROWS})
    program = GraphProgram(flat, outputs=outputs, out_spec=spec, facts=found, history=("capture()",))
    if problems := facts.broken(program):
        raise CaptureError("the captured graph cannot be used:\n  - " + "\n  - ".join(problems))
    return program


def in_program_order(model: nn.Module | ExportedProgram, example_inputs: ExampleInputs) -> ExampleInputs:
    """Keyword inputs of an `ExportedProgram` in the order in which it takes them; others as they are.

    Raises:
        ExampleInputError: The program takes other keywords, or takes its inputs by position.
    """
    spec = model.call_spec.in_spec if isinstance(model, ExportedProgram) else None
    if spec is None:
        return example_inputs
    by_position, keywords = spec.child(0).num_leaves, tuple(spec.child(1).context or ())
    given = tuple(example_inputs) if isinstance(example_inputs, Mapping) else ()
    if sorted(given) != sorted(keywords) or bool(by_position) == isinstance(example_inputs, Mapping):
        taken = f"the keywords {list(keywords)}" if keywords else f"{by_position} inputs by position"
        raise ExampleInputError(f"the program was exported to take {taken}; example_inputs must be like that")
    return {name: example_inputs[name] for name in keywords} if isinstance(example_inputs, Mapping) else example_inputs


def flat_inputs(example_inputs: ExampleInputs) -> tuple[tuple[str, ...] | None, list[Tensor]]:
    """Names (None for positional inputs) and tensors of example inputs, checked."""
    if isinstance(example_inputs, Mapping):
        names, tensors = tuple(example_inputs), list(example_inputs.values())
    elif isinstance(example_inputs, (tuple, list)):
        names, tensors = None, list(example_inputs)
    else:
        raise ExampleInputError(
            f"example_inputs must be a tuple of tensors or a dict, not {type(example_inputs).__name__}"
        )
    if not tensors:
        raise ExampleInputError("example_inputs are empty")
    for position, tensor in enumerate(tensors):
        label = repr(names[position]) if names else f"#{position}"
        if not isinstance(tensor, Tensor):
            raise ExampleInputError(
                f"input {label} is a {type(tensor).__name__}, not a tensor",
                hint="bind options that are not tensors with a small wrapper module, and leave out None",
            )
        if tensor.dim() == 0 or tensor.shape[0] == 0:
            raise ExampleInputError(f"input {label} has no rows: its shape is {tuple(tensor.shape)}")
        if tensor.shape[0] != tensors[0].shape[0]:
            raise ExampleInputError(
                f"input {label} has {tensor.shape[0]} rows, the first input has {tensors[0].shape[0]}",
                hint="axis 0 of every input is the row axis; bind inputs without rows with a wrapper module",
            )
    return names, tensors


def empty_program() -> GraphProgram:
    """A program without inputs and outputs, to build small methods from."""
    exported = ExportedProgram(
        root=nn.Module(),
        graph=_empty_graph(),
        graph_signature=ExportGraphSignature([], []),
        state_dict={},
        range_constraints={},
        module_call_graph=flat_call_graph(0, 0),
        constants={},
    )
    return GraphProgram(exported, facts=frozenset({facts.FUNCTIONAL}), history=("empty_program()",))


def _empty_graph() -> fx.Graph:
    graph = fx.Graph()
    graph.output(())
    return graph


def _export(model: nn.Module, example_inputs: ExampleInputs, tensors: list[Tensor]) -> ExportedProgram:
    if model.training:
        raise CaptureError("the model is in training mode", hint="call model.eval() first: dropout must be off")
    rows = Dim("rows", min=2, max=MAX_ROWS)
    # One row would be taken for a constant (torch.export specialises sizes 0 and 1), so it is shown twice.
    doubled = [torch.cat([t, t]) if t.shape[0] == 1 else t for t in tensors]
    args: tuple[Tensor, ...] = ()
    kwargs: dict[str, Tensor] = {}
    shapes: Any = [{0: rows} for _ in doubled]
    if isinstance(example_inputs, Mapping):
        kwargs = dict(zip(example_inputs, doubled, strict=True))
        shapes = dict(zip(example_inputs, shapes, strict=True))
    else:
        args = tuple(doubled)
        shapes = _by_argument(model, tuple(shapes))
    try:
        with torch.no_grad(), _without_cache(model):
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__} with a symbolic number of rows: {error}",
            hint="check that the model runs on the example inputs, and that its code does not depend on the batch size",
        ) from error
    return _functional(exported)


def _by_argument(model: nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """One entry per parameter of the model's forward: what `*args` takes goes into one entry."""
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        fixed = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        return (*shapes[:fixed], shapes[fixed:])
    return shapes


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Ask a transformers model not to return its key-value cache, which training does not use."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is not True:
        yield
        return
    config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        config.use_cache = before  # type: ignore[union-attr]


def _frozen(tensor: Tensor) -> Tensor:
    """The same storage without a gradient; ExecuTorch takes no tensor that wants one."""
    detached = tensor.detach()
    return nn.Parameter(detached, requires_grad=False) if isinstance(tensor, nn.Parameter) else detached


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """Without in-place operators, composite operators kept whole."""
    with torch.no_grad():
        functional: ExportedProgram = exported.run_decompositions({})
    return functional


def _check(exported: ExportedProgram, tensors: list[Tensor]) -> None:
    signature = exported.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        raise UnsupportedGraphError(f"the model changes {changed} when it runs", hint="compile a model without state")
    if any(not isinstance(name, str) for name in (*signature.user_inputs, *signature.user_outputs)):
        raise UnsupportedGraphError("the model takes or returns values that are not tensors")
    placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    inputs = [placeholders[str(name)] for name in signature.user_inputs]
    if len(inputs) != len(tensors):
        raise ExampleInputError(f"the program takes {len(inputs)} tensors, example_inputs have {len(tensors)}")
    for node, tensor in zip(inputs, tensors, strict=True):
        value = node.meta["val"]
        if not isinstance(value.shape[0], torch.SymInt):
            raise CaptureError(
                f"input {node.name!r} was captured with a fixed number of rows, {value.shape[0]}",
                hint="export with a dynamic batch: dynamic_shapes={...: {0: torch.export.Dim('rows', min=2)}}",
            )
        fixed = [(a, b) for a, b in zip(value.shape[1:], tensor.shape[1:], strict=False) if isinstance(a, int)]
        if value.dim() != tensor.dim() or value.dtype != tensor.dtype or any(a != b for a, b in fixed):
            raise ExampleInputError(
                f"example input for {node.name!r} is {tensor.dtype}{list(tensor.shape)}, "
                f"the program was exported for {value.dtype}{list(value.shape)}"
            )
