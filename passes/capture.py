"""Capture a model as a functional graph; where it can be, with a symbolic number of rows.

Given:  an `nn.Module` in eval mode or an `ExportedProgram`, and example inputs
Result: input %ids: i64[rows, 5]
          %embedding = embedding(%p_weight, %ids) : f32[rows, 5, 12]
Numbers: exact.

A model whose code fixes the number of rows can be captured with the rows of the example; `free_rows.py` then makes
the graph right for any number. Operators that the axis analysis has no rule for are decomposed as far as torch can.
This is the front of the pipeline and so a function, not a `Pass`: there is no program before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, ExportGraphSignature

from mobizo_compiler.analysis.axes import has_rule
from mobizo_compiler.errors import CaptureError, ExampleInputError, MobizoError, UnsupportedGraphError
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.example import HALVES, Example, Leaf, doubled, flat_names
from mobizo_compiler.graph.nodes import operator_name, source_line
from mobizo_compiler.graph.program import DynamicSize, GraphProgram, Nesting, flat_call_graph
from mobizo_compiler.passes.full_precision import in_float32, restored
from mobizo_compiler.upstream import OpOverload, pytree

aten = torch.ops.aten
MAX_ROWS = 1 << 20


def capture(model: nn.Module | ExportedProgram, example: Example, *, symbolic: bool = True) -> GraphProgram:
    """Capture `model` with a symbolic number of rows, or with the rows of the example.

    Args:
        model: A module in eval mode, or an exported program.
        example: Its inputs; see `bind_example`.
        symbolic: Whether the number of rows of a module is a symbol.

    Raises:
        ExampleInputError: An exported program takes other inputs.
        CaptureError: The model cannot be exported.
        UnsupportedGraphError: The graph has inputs or outputs that are not tensors, or weights that change.
    """
    originals: dict[int, Tensor] = {}
    if isinstance(model, ExportedProgram):
        exported = functional(model)
    elif isinstance(model, nn.Module):
        _check_weights(model)
        with in_float32(model) as originals:
            exported = functional(_export(model, example, symbolic), own=True)
    else:
        raise CaptureError(
            f"cannot compile a {type(model).__name__}", hint="pass an nn.Module or a torch.export.ExportedProgram"
        )
    for node in exported.graph.nodes:
        dropout = node.target in (torch.ops.aten.dropout.default, torch.ops.aten.native_dropout.default)
        if dropout and node.args[1] and node.args[2] is not False:
            raise CaptureError(
                "the program was exported in training mode: it has dropout in it",
                where=source_line(node),
                hint="call model.eval() before torch.export.export",
            )
        if operator_name(node).startswith("quantized_decomposed::"):
            raise CaptureError(
                "the program was quantized by PT2E: its layers have no weights of their own that an adapter could be "
                "added to, and activations are rounded for all rows at once",
                where=source_line(node),
                hint='compile the model as it was before, with quantization="8da8w" or another recipe',
            )
        if node.op == "get_attr":
            reader = next(iter(node.users), node)
            raise UnsupportedGraphError(
                f"the graph has graphs of its own, which {reader.target} runs and no pass reaches into",
                where=source_line(reader),
                hint="compile a model whose path does not depend on the values (no torch.cond, while_loop or map)",
            )
    old = exported.graph_signature
    if old.buffers_to_mutate or old.user_inputs_to_mutate:
        changed = [*old.buffers_to_mutate.values(), *old.user_inputs_to_mutate.values()]
        raise UnsupportedGraphError(f"the model changes {changed} when it runs", hint="compile a model without state")
    signature, nesting = _only_tensors(exported)
    leaves = _leaves(exported, signature, example)
    flat = ExportedProgram(
        root=nn.Module(),
        graph=exported.graph,
        graph_signature=signature,
        state_dict={name: restored(frozen(tensor), originals) for name, tensor in exported.state_dict.items()},
        range_constraints=exported.range_constraints,
        module_call_graph=flat_call_graph(len(signature.user_inputs), len(signature.user_outputs)),
        constants={k: v.detach() if isinstance(v, Tensor) else v for k, v in exported.constants.items()},
        verifiers=exported.verifiers,
    )
    outputs = tuple(f"output_{position}" for position in range(len(signature.user_outputs)))
    program = GraphProgram(
        flat,
        outputs=outputs,
        nesting=nesting,
        rows={name: leaf.row_axis for name, leaf in leaves.items() if leaf.row_axis is not None},
        dynamic=_dynamic(exported, leaves),
        facts=frozenset({facts.FUNCTIONAL}),
        history=("capture()",),
    )
    if program.fixed_rows is None:
        program = program.with_facts(facts.ANY_ROWS)
    if problems := facts.broken(program):
        raise CaptureError("the captured graph cannot be used:\n  - " + "\n  - ".join(problems))
    return program


def unwrapped(model: object) -> object:
    """The model inside of what `torch.compile` and data parallelism wrap around one; anything else as it is."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(model, nn.Module) and isinstance(model._modules.get("_orig_mod"), nn.Module):
            model = model._modules["_orig_mod"]
        else:
            return model


def _check_weights(model: nn.Module) -> None:
    """Raise `CaptureError` for a model without weights, or with adapters of peft in its layers."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft.tuners."):
            raise CaptureError(
                f"the model has adapters of peft in it: {name or 'the model itself'} is a {type(module).__name__}",
                hint="model.merge_and_unload() puts them into the weights; or save them, and compile the base model "
                "with adapter=folder",
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CaptureError(
                f"the model has no weights: {name!r} is on the meta device",
                hint="load them, with from_pretrained for example, before compiling",
            )


def outputs_of(model: nn.Module, example: Example, in_half: bool = False) -> list[Tensor]:
    """What a module returns for the example inputs: the tensors, in flat order.

    Args:
        model: The module.
        example: Its inputs.
        in_half: Give it inputs of the dtype of its weights, which are of half precision.
    """
    args, kwargs = ((), dict(example.inputs)) if isinstance(example.inputs, Mapping) else (tuple(example.inputs), {})
    if in_half:
        dtype = next(weight.dtype for weight in model.parameters() if weight.dtype in HALVES)
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, (args, kwargs)
        )
    with torch.no_grad(), _without_cache(model):
        outputs = model(*args, **kwargs)
    return [leaf.contiguous() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


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


def _export(model: nn.Module, example: Example, symbolic: bool) -> ExportedProgram:
    if model.training:
        graph = isinstance(model, fx.GraphModule)
        raise CaptureError(
            "the model is in training mode" + (", as modules of exported programs are" if graph else ""),
            hint="pass an ExportedProgram: the one that it came from, or torch.export.export(model, example_inputs)"
            if graph
            else "call model.eval() first: dropout must be off",
        )
    rows = (example.rows_dim or Dim("mobizo_rows", min=2, max=MAX_ROWS)) if symbolic else None
    try:
        return _export_once(model, example, rows)
    except MobizoError:
        raise
    except Exception as error:
        how = " with a symbolic number of rows" if symbolic else ""
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}{how}: {error}",
            hint="check that the model runs on the example inputs; what torch.export needs of a model is written at "
            "https://docs.pytorch.org/docs/stable/export.html",
        ) from error


def _export_once(model: nn.Module, example: Example, rows: Any) -> ExportedProgram:
    def sizes(leaf: Leaf) -> dict[int, Any]:
        return dict(leaf.dims) if leaf.row_axis is None else {**leaf.dims, leaf.row_axis: rows}

    given = example.mapped(doubled if rows is not None else lambda leaf: leaf.tensor)
    shapes = None if rows is None else _shapes(example.mapped(sizes), example.inputs)
    args, kwargs = ((), dict(given)) if isinstance(given, Mapping) else (tuple(given), {})
    if isinstance(shapes, tuple):
        shapes = _by_argument(model, shapes)
    with torch.no_grad(), _without_cache(model):
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
        except Exception as error:
            if "not a known type" not in str(error):
                raise
            outputs = model(*args, **kwargs)
            registered = _register_dataclasses(outputs)
            _check_outputs(outputs)
            if not registered:
                raise
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)


def _register_dataclasses(outputs: Any) -> bool:
    """Tell torch how to take dataclasses of the user apart; whether there was one that it did not know."""
    found = False
    for leaf in pytree.tree_leaves(outputs):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            cls = type(leaf)
            torch.export.register_dataclass(cls, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")
            _register_dataclasses([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
            found = True
    return found


def _check_outputs(outputs: Any) -> None:
    """Raise `CaptureError` for an output that torch cannot take apart, as a cache of keys and values is."""
    for name, leaf in flat_names(outputs):
        if not isinstance(leaf, (Tensor, int, float, bool, str, type(None))):
            place = f" as output {name!r}" if name else ""
            raise CaptureError(
                f"the model returns a {type(leaf).__name__}{place}, which is no tensor",
                hint="return the logits alone; a step uses no cache of keys and values: leave use_cache=True out",
            )


def _shapes(shapes: Any, inputs: Any) -> Any:
    """The structure of the inputs with the dynamic sizes of tensors, and None for other values."""
    if isinstance(inputs, Tensor):
        return shapes
    if isinstance(inputs, Mapping):
        return {name: _shapes(shapes[name], value) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_shapes(s, value) for s, value in zip(shapes, inputs, strict=True))
    return None


def _by_argument(model: nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """One entry per parameter of the model's forward: what `*args` takes goes into one entry."""
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        fixed = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        return (*shapes[:fixed], shapes[fixed:])
    return shapes


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Ask models of transformers, also inside of others, not to return a key-value cache: training uses none."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    asking = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    for config in asking:
        config.use_cache = False
    try:
        yield
    finally:
        for config in asking:
            config.use_cache = True


def frozen(tensor: Tensor) -> Tensor:
    """The same storage without a gradient; ExecuTorch takes no tensor that wants one."""
    detached = tensor.detach()
    return nn.Parameter(detached, requires_grad=False) if isinstance(tensor, nn.Parameter) else detached


def functional(exported: ExportedProgram, first: Sequence[Any] = (), *, own: bool = False) -> ExportedProgram:
    """Without in-place operators; composite operators are kept whole where the axis analysis knows them.

    Args:
        exported: The program.
        first: Operators that are known not to be kept, so that they are not looked for.
        own: Whether the program may be returned as it is, where it is that already; else the result is another one.
    """
    with torch.no_grad():
        table = torch.export.default_decompositions()
        wanted, done = {*first, *_without_rule(exported, table)}, set[Any]()
        if own and not wanted and _all_known(exported.graph):
            return exported
        while True:
            exported = exported.run_decompositions({target: table[target] for target in wanted})
            done |= wanted
            wanted = _without_rule(exported, table) - done
            if not wanted:
                return exported


def _without_rule(exported: ExportedProgram, table: Mapping[Any, Any]) -> set[Any]:
    """Operators of the program that torch can decompose and the axis analysis does not know."""
    calls = [node for node in exported.graph.nodes if node.op == "call_function" and not has_rule(node)]
    return {node.target for node in calls if node.target in table}


def _all_known(graph: fx.Graph) -> bool:
    """Whether the axis analysis knows every operator, and none changes what it is given or runs a graph of its own."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if any(node.op == "get_attr" for node in graph.nodes) or not all(has_rule(node) for node in calls):
        return False
    operators = [node.target for node in calls if isinstance(node.target, OpOverload)]
    return not any(target._schema.is_mutable or target is aten.lift_fresh_copy.default for target in operators)


def _only_tensors(exported: ExportedProgram) -> tuple[ExportGraphSignature, Nesting]:
    """Take inputs and outputs that are no tensors out of the graph: the capture fixed their values."""
    signature, graph = exported.graph_signature, exported.graph
    spec = exported.call_spec.out_spec
    assert spec is not None
    constants = {s.arg.name for s in signature.input_specs if isinstance(s.arg, ConstantArgument)}
    for node in [node for node in graph.nodes if node.op == "placeholder" and node.name in constants]:
        graph.erase_node(node)
    inputs = [s for s in signature.input_specs if s.arg.name not in constants]
    fixed = {
        position: s.arg.value
        for position, s in enumerate(signature.output_specs)
        if isinstance(s.arg, ConstantArgument)
    }
    output = graph.output_node()
    results = [value for position, value in enumerate(output.args[0]) if position not in fixed]
    output.args = (tuple(results),)
    values = [node.meta["val"] for node in results] + [
        node.meta.get("val") for node in graph.nodes if node.op == "placeholder" and node.name in signature.user_inputs
    ]
    if not all(isinstance(value, Tensor) for value in values):
        raise UnsupportedGraphError("the model takes or returns sizes that are not tensors")
    outputs = [s for position, s in enumerate(signature.output_specs) if position not in fixed]
    return ExportGraphSignature(inputs, outputs), Nesting(spec, fixed)


def _leaves(exported: ExportedProgram, signature: ExportGraphSignature, example: Example) -> dict[str, Leaf]:
    """The example tensor of every user input, checked against what the program takes."""
    placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    names = [str(name) for name in signature.user_inputs]
    if len(names) != len(example.leaves):
        raise ExampleInputError(f"the program takes {len(names)} tensors, example_inputs have {len(example.leaves)}")
    leaves = dict(zip(names, example.leaves, strict=True))
    for name, leaf in leaves.items():
        value = placeholders[name].meta["val"]
        fixed = [(a, b) for a, b in zip(value.shape, leaf.tensor.shape, strict=False) if isinstance(a, int)]
        if value.dim() != leaf.tensor.dim() or value.dtype != leaf.tensor.dtype or any(a != b for a, b in fixed):
            raise ExampleInputError(
                f"example input for {name!r} is {leaf.tensor.dtype}{list(leaf.tensor.shape)}, "
                f"the program was exported for {value.dtype}{list(value.shape)}"
            )
    symbolic = {
        name: isinstance(placeholders[name].meta["val"].shape[leaf.row_axis], torch.SymInt)
        for name, leaf in leaves.items()
        if leaf.row_axis is not None
    }
    if len(set(symbolic.values())) > 1:
        raise UnsupportedGraphError(
            f"the number of rows is symbolic in some inputs and fixed in others: {symbolic}",
            hint="export with one Dim for the row axis of all inputs",
        )
    return leaves


def _dynamic(exported: ExportedProgram, leaves: Mapping[str, Leaf]) -> dict[str, DynamicSize]:
    """What stands behind the symbols of the sizes that the user declared dynamic."""
    placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    found = {}
    for name, leaf in leaves.items():
        for axis, dim in leaf.dims.items():
            size = placeholders[name].meta["val"].shape[axis]
            if not isinstance(size, torch.SymInt):
                raise CaptureError(f"the model fixes axis {axis} of input {name!r} to {size}; it cannot be dynamic")
            low = 1 if axis == leaf.row_axis else max(1, dim.min)
            found[str(size.node.expr)] = DynamicSize(dim.__name__, low, int(dim.max))
    return found
