"""Runs rewritten graphs operator by operator in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_compiler.errors import NotSupportedYetError
from mobizo_compiler.graph.paging import put_back
from mobizo_compiler.graph.program import STATE, STATE_INPUT, GraphProgram, as_read

EAGER = "eager"  # name of the backend that runs these graphs as they are


class EagerArtifact:
    """Graphs in memory."""

    cannot_run = None

    def __init__(self, methods: dict[str, GraphProgram]) -> None:
        self.methods = methods

    def runner(self) -> EagerRunner:
        """A runner with a state of its own."""
        return EagerRunner(self.methods)

    def exact_runner(self) -> EagerRunner:
        """The same: nothing is rounded that the graphs do not round."""
        return self.runner()

    def planned_bytes(self, method: str) -> None:
        """Nothing is planned."""

    def save(self, path: Path) -> None:
        """Refused: this backend has no file format."""
        raise NotSupportedYetError(
            "a program of the eager backend lives in memory and has no file format",
            where=str(path),
            hint='compile with backend="portable" or backend="xnnpack"',
        )


class Interpreter(fx.Interpreter):
    """Runs a graph, and makes weights of half precision float32 one at a time, for the call that reads them."""

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """Arguments with values in place of nodes."""
        return fx.node.map_arg(args, lambda node: _as_read(node, self.env[node]))


class _SideBySide(fx.Interpreter):
    """Runs a graph for several lists of arguments at a time, node by node.

    A value is a list: one for all, or one for each. A weight is made float32 once, and what depends on no argument that
    differs, such as the decoding of a weight, is computed once.
    """

    def outputs(self, arguments: Sequence[Sequence[Any]], count: int) -> list[list[Tensor]]:
        """What the graph returns for each list; `arguments` has the values of each placeholder, one or `count`."""
        given, values = iter(arguments), dict[fx.Node, Sequence[Any]]()
        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
                continue
            read = {
                operand: [_as_read(operand, value) for value in values[operand]] for operand in node.all_input_nodes
            }
            if node.op == "output":
                return [list(_one_of(read, index, node.args[0])) for index in range(count)]
            times = max((len(found) for found in read.values()), default=1)
            values[node] = [self._call(node, read, index) for index in range(times)]
            for operand in self.user_to_last_uses.get(node, ()):
                for value in values.pop(operand):
                    if _is_given(operand, value):
                        put_back(value)
        raise AssertionError("a graph ends with its output")

    def _call(self, node: fx.Node, read: Mapping[fx.Node, Sequence[Any]], index: int) -> Any:
        args, kwargs = _one_of(read, index, (node.args, node.kwargs))
        return getattr(self, node.op)(node.target, args, kwargs)


def _is_given(node: fx.Node, value: Any) -> bool:
    """Whether a value is a tensor that the graph was given."""
    return node.op == "placeholder" and isinstance(value, Tensor)


def _as_read(node: fx.Node, value: Any) -> Any:
    return as_read(value, node.meta["val"]) if _is_given(node, value) else value


def _one_of(read: Mapping[fx.Node, Sequence[Any]], index: int, arguments: Any) -> Any:
    """Arguments with values in place of nodes: the one that all share, or one of several."""
    return fx.node.map_arg(arguments, lambda node: read[node][index % len(read[node])])


def run_side_by_side(program: GraphProgram, inputs: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """What a program that keeps nothing returns for each of several lists of inputs: the same bits as one by one."""
    tensors = program.tensors()
    given = iter(zip(*inputs, strict=True))
    arguments: list[Sequence[Any]] = []
    for name in program.placeholders:
        if name in tensors:
            arguments.append(tensors[name][1:])
        else:
            values = next(given)
            arguments.append(values[:1] if all(value is values[0] for value in values) else values)
    with torch.no_grad():
        found = _SideBySide(program.exported.graph_module).outputs(arguments, len(inputs))
    return [[value.clone() for value in results] for results in found]


class EagerRunner:
    """Calls graph modules with their tensors, and carries the state between calls."""

    def __init__(self, methods: dict[str, GraphProgram]) -> None:
        self._methods = methods
        self._state = _initial_state(methods.values())
        self._tensors = {name: self._placeholders(program) for name, program in methods.items()}
        self._calls = {name: _call(program) for name, program in methods.items()}

    def _placeholders(self, program: GraphProgram) -> list[Tensor | None]:
        """What each placeholder stands for: a tensor, the live state, or None for a user input."""
        kept = set(program.exported.graph_signature.buffers_to_mutate.values()) - {STATE}
        known = {
            name: self._state if path == STATE else value.clone() if path in kept else value
            for name, (path, value) in program.tensors().items()
        }
        return [known.get(name) for name in program.placeholders]

    def state(self) -> Tensor:
        """The live state."""
        return self._state

    def call(self, method: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run one method."""
        program = self._methods[method]
        given = iter([*inputs, self._state] if STATE_INPUT in program.inputs else inputs)
        arguments = [next(given) if tensor is None else tensor for tensor in self._tensors[method]]
        with torch.no_grad():
            results = list(self._calls[method](*arguments))
        signature = program.exported.graph_signature
        kept = {spec.target: tensor for spec, tensor in zip(signature.input_specs, arguments, strict=True)}
        for buffer in signature.buffers_to_mutate.values():
            kept[buffer].copy_(results.pop(0))
        if STATE_INPUT in program.outputs:
            self._state.copy_(results.pop())
        return [result.clone() for result in results]


def _call(program: GraphProgram) -> Callable[..., Any]:
    """The graph as a function of its placeholders."""
    module, values = program.exported.graph_module, program.placeholders
    as_stored = all(tensor.dtype == values[name].dtype for name, (_, tensor) in program.tensors().items())
    call: Callable[..., Any] = module if as_stored else Interpreter(module).run
    return call


def _initial_state(methods: Iterable[GraphProgram]) -> Tensor:
    """What the state starts from; zeros where it is passed in and out, and nothing where no method has one."""
    for program in methods:
        for name, tensor in program.tensors().values():
            if name == STATE:
                return tensor.clone()
        if STATE_INPUT in program.inputs:
            return torch.zeros(tuple(program.inputs[STATE_INPUT].shape))
    return torch.zeros(0)
