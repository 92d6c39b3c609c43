"""Runs rewritten graphs operator by operator in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_compiler.errors import NotSupportedYetError
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

        def value(node: fx.Node) -> Any:
            found = self.env[node]
            weight = node.op == "placeholder" and isinstance(found, Tensor)
            return as_read(found, node.meta["val"]) if weight else found

        return fx.node.map_arg(args, value)


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
