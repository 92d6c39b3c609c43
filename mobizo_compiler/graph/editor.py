"""`Editor`: how a pass changes a program. It works on a private copy of the graph; weights are shared, not copied."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from mobizo_compiler.errors import PassContractError, UnsupportedGraphError
from mobizo_compiler.graph.nodes import operand, source_line
from mobizo_compiler.graph.program import ROWS, STATE, STATE_INPUT, GraphProgram, as_read, flat_call_graph
from mobizo_compiler.graph.shapes import key_of, value_of_call
from mobizo_compiler.upstream import FakeTensor, FakeTensorMode, pytree

aten = torch.ops.aten


class Editor:
    """A private, editable copy of a program's graph. Passes use this and nothing else to change a program.

    Every node that the editor makes gets `meta["val"]`, so shapes are known at once and stay right.

    Args:
        program: The program to start from; it is not changed.
    """

    def __init__(self, program: GraphProgram) -> None:
        self.before = program
        self.graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        results = self.graph.graph_copy(program.graph, copies)
        self.graph.output(results)
        for old, copy in copies.items():
            copy.name = old.name  # a copy of an input named like a Python builtin would get another name
        signature = program.exported.graph_signature
        self._input_specs = {spec.arg.name: spec for spec in signature.input_specs}
        self._tensors = {**program.exported.constants, **program.exported.state_dict}
        nodes = {node.name: node for node in self.graph.nodes}
        self._of_tensor: dict[str, fx.Node] = {
            s.target: nodes[s.arg.name] for s in signature.input_specs if s.target is not None
        }
        self._mutated = {buffer: nodes[name] for name, buffer in dict(signature.buffers_to_mutate).items()}
        self._outputs = {name: nodes[node.name] for name, node in program.output_nodes.items()}
        self.values = {name: nodes[node] for name, node in program.values.items()}
        self.sites = program.sites
        self.lora_a = dict(program.lora_a)
        self.nesting = program.nesting
        self.rows = dict(program.rows)
        self.mode = _fake_mode(self.graph)
        self._anchor: fx.Node | None = None
        self._traced: dict[Hashable, fx.GraphModule] = {}

    # -- looking ---------------------------------------------------------------------------------------------------

    def node(self, name: str) -> fx.Node:
        """The node of that name."""
        for node in self.graph.nodes:
            if node.name == name:
                return cast(fx.Node, node)
        raise PassContractError(f"the graph has no node {name!r}", where=str(self.before.history[-1:]))

    def calls(self, *targets: Any) -> list[fx.Node]:
        """All calls of the given operators, in order."""
        found = {node for target in targets for node in self.graph.find_nodes(op="call_function", target=target)}
        return sorted(found)

    @property
    def inputs(self) -> dict[str, fx.Node]:
        """User inputs by name."""
        return {n.name: n for n in self._placeholders() if self._input_specs[n.name].kind is InputKind.USER_INPUT}

    @property
    def outputs(self) -> dict[str, fx.Node]:
        """User outputs by name; assign with `set_outputs`."""
        return dict(self._outputs)

    @property
    def state(self) -> fx.Node:
        """The placeholder of the flat state."""
        if STATE not in self._of_tensor:
            raise PassContractError("the program has no state", where=str(self.before.history[-1:]))
        return self._of_tensor[STATE]

    @property
    def new_state(self) -> fx.Node | None:
        """What the state becomes, also where it is passed out; None in a method that keeps it."""
        return self._mutated.get(STATE) or self._outputs.get(STATE_INPUT)

    def tensor(self, node: fx.Node) -> Tensor | None:
        """The tensor behind a placeholder, as the graph reads it; None for user inputs and inner nodes."""
        spec = self._input_specs.get(node.name)
        if spec is None or spec.target is None:
            return None
        return as_read(self._tensors[spec.target], node.meta["val"])

    @property
    def tensors(self) -> Mapping[fx.Node, Tensor]:
        """The tensors behind placeholders, each as `tensor` gives it."""
        return _Tensors(self, [node for node in self._placeholders() if self.tensor_name(node) is not None])

    def tensor_name(self, node: fx.Node) -> str | None:
        """The path in the user's model of the tensor behind a placeholder."""
        spec = self._input_specs.get(node.name)
        return None if spec is None else spec.target

    def is_weight(self, node: fx.Node) -> bool:
        """Whether a placeholder stands for a parameter, or for a buffer or constant in place of one."""
        spec = self._input_specs.get(node.name)
        return spec is not None and spec.kind is InputKind.PARAMETER

    # -- adding ----------------------------------------------------------------------------------------------------

    def add_input(
        self,
        name: str,
        shape: Iterable[Any],
        dtype: torch.dtype,
        *,
        before: fx.Node | None = None,
        row_axis: int | None = None,
    ) -> fx.Node:
        """Add a user input, before another one or at the end; a dimension may be a `SymInt` of the program."""
        with self.mode:
            value = torch.empty(tuple(shape), dtype=dtype)
        placeholders = self._placeholders()
        anchor = before or (placeholders[-1].next if placeholders else next(iter(self.graph.nodes)))
        self._anchor = None
        node = self._placeholder(name, value, anchor)
        self._input_specs[node.name] = InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None)
        if row_axis is not None:
            self.rows[node.name] = row_axis
        return node

    def remove_input(self, node: fx.Node) -> None:
        """Remove a user input; what was made of it must not be needed any more."""
        self._drop_dead_code()
        alive = set(self.graph.nodes)
        self.values = {name: value for name, value in self.values.items() if value in alive}
        self.rows.pop(node.name, None)
        self._anchor = None
        self.graph.erase_node(node)

    def drop_state(self) -> None:
        """Remove the state, the sites, and what was made of them."""
        self._mutated.clear()
        self._drop_dead_code()
        self.graph.erase_node(self._of_tensor.pop(STATE))
        self.values, self.sites, self.lora_a = {}, (), {}

    def add_constant(self, name: str, tensor: Tensor) -> fx.Node:
        """Add a tensor that no method changes."""
        value = self.mode.from_tensor(tensor, static_shapes=True)
        node = self._placeholder(f"b_{name}".replace(".", "_"), value, self._first_input())
        self._input_specs[node.name] = InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True)
        self._tensors[name], self._of_tensor[name] = tensor, node
        return node

    def shared_constant(self, name: str, tensor: Tensor) -> fx.Node:
        """The tensor of that name, which is added if it is not there."""
        return self._of_tensor.get(name) or self.add_constant(name, tensor)

    def some_rows(self, node: fx.Node, rows: Sequence[int]) -> fx.Node:
        """A placeholder for some rows of the tensor behind another one, of the same kind."""
        whole = self._input_specs[node.name]
        assert whole.target is not None
        name = f"{whole.target}{ROWS}{hashlib.sha256(repr(rows).encode()).hexdigest()[:8]}"
        if (known := self._of_tensor.get(name)) is not None:
            return known
        tensor = as_read(self._tensors[whole.target].detach()[list(rows)], node.meta["val"])
        if whole.kind is InputKind.PARAMETER:
            tensor = torch.nn.Parameter(tensor, requires_grad=False)
        value = self.mode.from_tensor(tensor, static_shapes=True)
        few = self._placeholder(f"{node.name}_rows", value, node.next)
        self._input_specs[few.name] = dataclasses.replace(whole, arg=TensorArgument(few.name), target=name)
        self._tensors[name], self._of_tensor[name] = tensor, few
        return few

    def add_state(self, initial: Tensor) -> fx.Node:
        """Add the flat state, float32 [S], with what it is at the start."""
        return self.add_constant(STATE, initial)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call at the insertion point."""
        name = getattr(target, "_schema", target).name.rpartition("::")[2]
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta["val"] = self._compute(node)
        return node

    def sizes(self, node: fx.Node) -> list[Any]:
        """The sizes of a tensor as arguments of a call: numbers, and nodes where they are symbolic."""
        shape = node.meta["val"].shape
        return [s if isinstance(s, int) else self.call(aten.sym_size.int, node, axis) for axis, s in enumerate(shape)]

    def inline(self, function: Callable[..., Any], *args: fx.Node, alike: Hashable = None) -> Any:
        """Trace a function of tensors and insert its operators at the insertion point.

        Args:
            function: Takes one tensor per node; returns a tensor or a tuple or dict of tensors. It must not create
                tensors from Python data (`torch.tensor`), which would become hidden constants.
            args: Its arguments.
            alike: What functions have in common that do the same with arguments of the same shapes, and so are traced
                once; None for a function that is like no other.

        Returns:
            What the function returns, with nodes for tensors.
        """
        shapes = None if alike is None else key_of([node.meta["val"] for node in args])
        if shapes is None:
            return self.insert(self.trace(function, *args), *args)
        key = (alike, shapes, self.mode)
        if key not in self._traced:
            self._traced[key] = self.trace(function, *args)
        return self.insert(self._traced[key], *args)

    def trace(
        self,
        function: Callable[..., Any],
        *args: fx.Node,
        decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    ) -> fx.GraphModule:
        """The operators of a function of tensors, as `inline` takes it, to be inserted once or many times.

        Args:
            function: The function.
            args: Arguments of the shapes, dtypes and strides that it is traced for.
            decompositions: If given, the function is traced below autograd, so that it may differentiate, with these in
                place of operators.
        """
        above: dict[str, Any] = {"pre_dispatch": True} if decompositions is None else {}
        values = [node.meta["val"] for node in args]
        with self.mode, torch.no_grad():
            # One fake tensor may be the value of several nodes, which must be several arguments.
            values = [
                torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
                if isinstance(value, Tensor)
                else value
                for value in values
            ]
            traced: fx.GraphModule = make_fx(
                function, tracing_mode="real", _allow_fake_constant=True, decomposition_table=decompositions, **above
            )(*values)
        return traced

    def insert(self, traced: fx.GraphModule, *args: fx.Node, known: Mapping[int, fx.Node] | None = None) -> Any:
        """Insert what `trace` returned at the insertion point.

        Args:
            traced: The operators.
            args: The arguments.
            known: Results that the program has already, by their position: they are not computed again.

        Returns:
            What the function returns, with nodes for tensors.
        """
        environment: dict[fx.Node, fx.Node] = {}
        results: Any = traced.graph.output_node().args[0]
        if known:
            environment = {results[position]: node for position, node in known.items()}
        needed = _made_of(results, environment)
        for node in traced.graph.nodes:
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable and operand(node) in needed:
                raise UnsupportedGraphError(f"a traced function writes into a value, with {node.target}")
        given = iter(args)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                environment.setdefault(node, next(given))
            elif node.op == "call_function":
                if node in environment or node not in needed:
                    continue
                copy = self.graph.node_copy(node, lambda inner: environment[inner])
                copy.meta = {"val": node.meta["val"]} if "val" in node.meta else {"val": self._compute(copy)}
                environment[node] = copy
            elif node.op != "output" and node in needed:
                raise PassContractError(f"a traced function made a hidden constant {node.target!r}")
        return pytree.tree_map_only(fx.Node, lambda inner: environment[inner], results)

    def set_outputs(self, outputs: Mapping[str, fx.Node]) -> None:
        """Replace the user outputs."""
        self._outputs = dict(outputs)

    def mutate_state(self, node: fx.Node) -> None:
        """At the end of a call, the state takes the value of `node`."""
        self._mutated[STATE] = node

    def pass_state(self) -> None:
        """Make the state the last user input, and what a call makes of it the last user output."""
        old = self.state
        given = self.add_input(STATE_INPUT, old.meta["val"].shape, old.meta["val"].dtype)
        self.replace(old, given)
        self.graph.erase_node(self._of_tensor.pop(STATE))
        if STATE in self._mutated:
            self._outputs[STATE_INPUT] = self._mutated.pop(STATE)

    def replace(self, old: fx.Node, new: fx.Node, keep: fx.Node | None = None) -> None:
        """Let all users of `old`, except the node `keep`, and all names for it, mean `new`."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not keep)
        for table in (self._outputs, self._mutated, self.values):
            for name, node in table.items():
                if node is old:
                    table[name] = new

    def refresh(self, inputs: Mapping[str, Any] | None = None, *, fold: bool = False) -> None:
        """Recompute the value of every node, after something above changed shape.

        Args:
            inputs: New fake tensors for user inputs, by name; their mode becomes the mode of the program.
            fold: Replace size computations that became plain numbers by those numbers.
        """
        if inputs:
            self.mode = next(iter(inputs.values())).fake_mode
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                if inputs and node.name in inputs:
                    node.meta["val"] = inputs[node.name]
                elif inputs and (path := self.tensor_name(node)) is not None:
                    stored, dtype = self._tensors[path], node.meta["val"].dtype
                    node.meta["val"] = self.mode.from_tensor(stored, static_shapes=True)
                    if stored.dtype != dtype:
                        with self.mode:
                            node.meta["val"] = node.meta["val"].to(dtype)
            elif node.op == "call_function":
                value = node.meta["val"] = self._recompute(node)
                if fold and isinstance(value, (int, float, bool)):
                    _fold(node, value)
                    self.graph.erase_node(node)

    # -- finishing -------------------------------------------------------------------------------------------------

    def finish(self, facts: frozenset[str], history: tuple[str, ...]) -> GraphProgram:
        """The edited program, without dead code and unused tensors."""
        mutated, user = list(self._mutated.items()), list(self._outputs.items())
        self._drop_dead_code()
        for node in reversed(self._placeholders()):
            unused_tensor = not node.users and self._input_specs[node.name].kind is not InputKind.USER_INPUT
            if unused_tensor and self._input_specs[node.name].target != STATE:
                self.graph.erase_node(node)
        placeholders = self._placeholders()
        tensors = {target: self._tensors[target] for n in placeholders if (target := self._input_specs[n.name].target)}
        output_specs = [OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(n.name), name) for name, n in mutated]
        output_specs += [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for _, node in user]
        alive = {node.name for node in self.graph.nodes}
        symbols = _symbols(self.inputs.values())
        old = self.before.exported
        exported = ExportedProgram(
            root=torch.nn.Module(),
            graph=self.graph,
            graph_signature=ExportGraphSignature([self._input_specs[n.name] for n in placeholders], output_specs),
            state_dict={name: t for name, t in tensors.items() if name not in old.constants},
            range_constraints={symbol: ends for symbol, ends in old.range_constraints.items() if symbol in symbols},
            module_call_graph=flat_call_graph(len(self.inputs), len(user)),
            constants={name: t for name, t in tensors.items() if name in old.constants},
            verifiers=old.verifiers,
        )
        return GraphProgram(
            exported=exported,
            outputs=tuple(name for name, _ in user),
            nesting=self.nesting,
            rows=self.rows,
            dynamic=self.before.dynamic,
            sites=self.sites,
            lora_a=self.lora_a,
            values={name: node.name for name, node in self.values.items() if node.name in alive},
            facts=facts,
            history=history,
        )

    def _drop_dead_code(self) -> None:
        self.graph.output_node().args = ((*self._mutated.values(), *self._outputs.values()),)
        _drop_dead_code(self.graph)

    def _placeholders(self) -> list[fx.Node]:
        return list(self.graph.find_nodes(op="placeholder"))

    def _first_input(self) -> fx.Node:
        """Where constants are put: before the first user input, or before everything. Looked for once."""
        if self._anchor is None:
            self._anchor = next(iter(self.inputs.values()), None)
        return self._anchor or next(iter(self.graph.nodes))

    def _placeholder(self, name: str, value: Any, anchor: fx.Node) -> fx.Node:
        with self.graph.inserting_before(anchor):
            node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def _compute(self, node: fx.Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda inner: inner.meta["val"])

        def call() -> Any:
            with self.mode, torch.no_grad():
                return node.target(*args, **kwargs)  # type: ignore[operator]

        return value_of_call(node.target, (args, kwargs), self.mode, node.meta.get("val"), call)

    def _recompute(self, node: fx.Node) -> Any:
        """The value of a call for other sizes, for which torch's own shape rules may refuse symbols."""
        try:
            return self._compute(node)
        except Exception as error:
            if not any(_is_symbolic(inner.meta["val"]) for inner in node.all_input_nodes):
                raise
            raise UnsupportedGraphError(
                f"torch cannot say what shape {node.target} returns for symbolic sizes: {error}",
                where=source_line(node),
            ) from error


class _Tensors(Mapping[fx.Node, Tensor]):
    """The tensors behind placeholders, read when they are asked for."""

    def __init__(self, edit: Editor, nodes: Sequence[fx.Node]) -> None:
        self._edit, self._nodes = edit, dict.fromkeys(nodes)

    def __getitem__(self, node: fx.Node) -> Tensor:
        if node not in self._nodes:
            raise KeyError(node)
        return cast(Tensor, self._edit.tensor(node))

    def __contains__(self, node: object) -> bool:
        return node in self._nodes

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)


def _made_of(results: Any, known: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """The nodes that have to be there for some results, without those behind what is known."""
    pending = [node for node in pytree.tree_leaves(results) if isinstance(node, fx.Node)]
    found = set(pending)
    while pending:
        node = pending.pop()
        for inner in node.all_input_nodes if node not in known else []:
            if inner not in found:
                found.add(inner)
                pending.append(inner)
    return found


def _is_symbolic(value: Any) -> bool:
    sizes = value.shape if isinstance(value, Tensor) else (value,)
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _fake_mode(graph: fx.Graph) -> FakeTensorMode:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode()


def _symbols(nodes: Iterable[fx.Node]) -> set[Any]:
    """The symbols in the shapes of inputs: those that a call gives a number."""
    sizes = (size for node in nodes for size in node.meta["val"].shape if isinstance(size, torch.SymInt))
    return {symbol for size in sizes for symbol in size.node.expr.free_symbols}


def _fold(node: fx.Node, number: float) -> None:
    """Write the number into the arguments of all users of the node."""

    def fold(argument: fx.Node) -> Any:
        return number if argument is node else argument

    for user in list(node.users):
        user.args, user.kwargs = map_arg((user.args, user.kwargs), fold)


def _drop_dead_code(graph: fx.Graph) -> None:
    """Remove calls without users; the graph is functional, so none of them has an effect."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
