"""`parse`: from program text back to a `GraphProgram`, so that the test of a pass is text in, text out.

    tensor %p_up_weight: f32[20, 12]
    input  %x: f32[rows, 12]
      %linear = linear(%x, %p_up_weight) : f32[rows, 20]
    return output_0 = %linear

It is the inverse of `program_text`: what is printed can be read, and prints the same again. The type behind a call may
be left out, as it is computed; if it is there it must be right. Empty lines and lines that begin with `#` are nothing.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

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
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.node import map_arg

from mobizo_compiler.errors import ProgramTextError
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.printer import DTYPES, ROWS_SYMBOL, Printer
from mobizo_compiler.graph.program import DynamicSize, GraphProgram, Nesting, flat_call_graph
from mobizo_compiler.step.sites import Site
from mobizo_compiler.upstream import ConstantSource, FakeTensorMode, pytree

MAX_SIZE = 1 << 20
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_KINDS = {"p_": InputKind.PARAMETER, "b_": InputKind.BUFFER, "c_": InputKind.CONSTANT_TENSOR}
_PLACEHOLDER = re.compile(r"(tensor|input|state)\s+%(\w+):\s*(\w+)\[(.*)\]")
_CALL = re.compile(r"%(\w+) = ([\w.]+)\((.*?)\)(?: : (.+))?")
_UPDATE = re.compile(r"update %(\w+) <- %(\w+)")
_RETURN = re.compile(r"return ([\w.]+) = %(\w+)")
_NUMBERED = re.compile(r"s\d+")  # how sizes print that are symbols without a name
_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
# What an analysis would have to find out, and a text does not say: these facts are given by the caller, or not at all.
_READ = frozenset(facts.CHECKS) - {facts.SITES, facts.LANES, facts.PERTURBED}


def parse(
    text: str,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    rows: Mapping[str, int] | None = None,
    sites: Sequence[Site] = (),
    lora_a: Mapping[str, Tensor] | None = None,
    values: Mapping[str, str] | None = None,
    also: Iterable[str] = (),
    seed: int = 0,
) -> GraphProgram:
    """Read program text.

    Tensors are called `p_` for parameters, `b_` for buffers and `c_` for constants. The path of `p_up_weight` in the
    model is `up.weight`; names that end in neither `_weight` nor `_bias` are paths themselves. A size is a number, a
    name, or a sum, product or whole quotient of these. `rows` is the number of rows; other names are dynamic sizes.
    The program has every fact that its text shows to hold.

    Args:
        text: The program.
        tensors: Values of tensors by name (`p_up_weight`); the others are random, see `random_tensor`.
        rows: The axis of the rows of inputs that have a fixed number of them, by name.
        sites: Adapter sites, for a program that has some.
        lora_a: A of every site, by its path.
        values: Names for inner values that passes need, such as `lanes`, and the nodes that they mean.
        also: Further facts, which are checked.
        seed: Of random tensors.

    Raises:
        ProgramTextError: The text is no program; the message has the line and its number.

    >>> from mobizo_compiler.graph.printer import program_text
    >>> print(program_text(parse("input %x: f32[rows, 3]\\n%y = tanh(%x)\\nreturn output_0 = %y")), end="")
    input  %x: f32[rows, 3]
      %y = tanh(%x) : f32[rows, 3]
    return output_0 = %y
    """
    reader = _Reader(dict(tensors or {}), torch.Generator().manual_seed(seed))
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.strip().startswith("#"):
            reader.read(number, line.strip())
    return reader.program(dict(rows or {}), tuple(sites), dict(lora_a or {}), dict(values or {}), frozenset(also))


def random_tensor(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A tensor that any program can work on: normal numbers, and whole ones that are indices into what has two entries.

    int8 and uint8 are codes of quantized weights: -8 to 7, and 0 to 255.
    """
    if dtype.is_floating_point:
        return torch.randn(tuple(shape), generator=generator).to(dtype)
    low, high = {torch.int8: (-8, 8), torch.uint8: (0, 256)}.get(dtype, (0, 2))
    return torch.randint(low, high, tuple(shape), generator=generator).to(dtype)


class _Reader:
    """The graph so far, and the line that is being read."""

    def __init__(self, given: dict[str, Tensor], generator: torch.Generator) -> None:
        self.given, self.generator = given, generator
        self.environment = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.environment)
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.inputs: list[InputSpec] = []
        self.tensors: dict[str, Tensor] = {}
        self.constants: dict[str, Any] = {}
        self.sizes: dict[str, Any] = {}
        self.rows: dict[str, int] = {}
        self.state: dict[str, str] = {}  # name of a placeholder that is written to, to the line that says so
        self.updates: dict[str, str] = {}  # name of a placeholder to the node that it becomes
        self.outputs: dict[str, str] = {}
        self.printed: list[tuple[str, fx.Node, str]] = []  # place, call, and the type that is written behind it
        self.place = ""

    def fail(self, problem: str, hint: str | None = None) -> NoReturn:
        raise ProgramTextError(problem, where=self.place, hint=hint)

    def read(self, number: int, line: str) -> None:
        """One line."""
        self.place = f"line {number}: {line}"
        if match := _PLACEHOLDER.fullmatch(line):
            self._placeholder(*match.groups())
        elif match := _CALL.fullmatch(line):
            self._call(*match.groups())
        elif match := _UPDATE.fullmatch(line):
            self._update(*match.groups())
        elif match := _RETURN.fullmatch(line):
            name, node = match.groups()
            if name in self.outputs:
                self.fail(f"output {name!r} is there twice")
            self.outputs[name] = self.node(node).name
        else:
            self.fail(
                "this is no line of a program",
                "tensor %name: f32[2, 3]   input %name: ...   state %name: ...   %name = operator(arguments) : type   "
                "update %state <- %name   return name = %name",
            )

    def node(self, name: str) -> fx.Node:
        """The node of that name."""
        if name not in self.nodes:
            self.fail(f"there is no %{name} above this line")
        return self.nodes[name]

    # -- placeholders ----------------------------------------------------------------------------------------------

    def _placeholder(self, kind: str, name: str, dtype_name: str, sizes: str) -> None:
        if any(node.op == "call_function" for node in self.nodes.values()):
            self.fail(f"%{name} must stand above the first call")
        dtype = _dtype(dtype_name) or self.fail(
            f"there is no dtype {dtype_name!r}", f"for example {', '.join(_DTYPES)}"
        )
        shape = [self._size(text, kind == "input") for text in _split(sizes)]
        node = self._add(name, self.graph.placeholder(name))
        if kind == "input":
            with self.mode:
                node.meta["val"] = torch.empty(shape, dtype=dtype)
            self.inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(name), None))
            axes = (a for a, size in enumerate(_split(sizes)) if re.findall(r"[a-z_]\w*", size) == [ROWS_SYMBOL])
            if (axis := next(axes, None)) is not None:
                self.rows[name] = axis
            return
        if name[:2] not in _KINDS:
            self.fail(f"%{name} is called neither p_ (parameter), b_ (buffer) nor c_ (constant)")
        if kind == "state":
            if name[:2] != "b_":
                self.fail(f"%{name} cannot be state: only buffers (b_) can")
            self.state[name] = self.place
        node.meta["val"] = self._tensor(name, shape, dtype)

    def _tensor(self, name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
        """Keep the tensor behind a placeholder; the fake one that stands for it."""
        tensor = self.given.pop(name, None)
        if tensor is None:
            tensor = random_tensor(shape, dtype, self.generator)
        elif list(tensor.shape) != shape or tensor.dtype != dtype:
            self.fail(f"the tensor that is given for %{name} is {_described(tensor)}")
        kind, path = _KINDS[name[:2]], re.sub(r"_(weight|bias)$", r".\1", name[2:])
        if kind is InputKind.PARAMETER:
            tensor = torch.nn.Parameter(tensor.detach(), requires_grad=False)
        (self.constants if kind is InputKind.CONSTANT_TENSOR else self.tensors)[path] = tensor
        persistent = True if kind is InputKind.BUFFER else None
        self.inputs.append(InputSpec(kind, TensorArgument(name), path, persistent))
        fake: Tensor = self.mode.from_tensor(tensor, static_shapes=True)
        return fake

    def _size(self, text: str, symbolic: bool) -> Any:
        """A number, or an expression of symbols, which are made where they are first named."""
        try:
            size = self._evaluated(ast.parse(text.strip(), mode="eval").body)
        except SyntaxError:
            self.fail(f"{text!r} is no size")
        if not symbolic and not isinstance(size, int):
            self.fail(f"size {text!r} of a tensor must be a number")
        return size

    def _evaluated(self, tree: ast.expr) -> Any:
        if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
            return tree.value
        if isinstance(tree, ast.Name):
            if tree.id not in self.sizes:
                source = ConstantSource(f"mobizo_{tree.id}")
                hint = 5 + 2 * len(self.sizes)
                symbol = self.environment.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
                self.sizes[tree.id] = self.environment.create_symintnode(symbol, hint=hint, source=source)
            return self.sizes[tree.id]
        if isinstance(tree, ast.BinOp) and type(tree.op) in _ARITHMETIC:
            return _ARITHMETIC[type(tree.op)](self._evaluated(tree.left), self._evaluated(tree.right))
        self.fail(f"{ast.unparse(tree)!r} is no size", "a size is a number, a name, or of these with +, -, * and //")

    # -- calls -----------------------------------------------------------------------------------------------------

    def _call(self, name: str, target_name: str, given: str, written: str | None) -> None:
        texts = _split(given)
        pairs = [re.match(r"([a-zA-Z_]\w*)=(.*)", text, re.DOTALL) for text in texts]
        nodes = [self.node(inner) for inner in re.findall(r"%(\w+)", given)]
        target = self._target(target_name, nodes)
        schema = getattr(target, "_schema", None)
        types = {} if schema is None else {argument.name: str(argument.type) for argument in schema.arguments}
        by_position = list(types.values())
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for text, pair in zip(texts, pairs, strict=True):
            if pair:
                kwargs[pair[1]] = self._argument(pair[2], types.get(pair[1], ""))
            elif kwargs:
                self.fail(f"argument {text!r} without a name behind one with a name")
            else:
                args.append(self._argument(text, by_position[len(args)] if len(args) < len(by_position) else ""))
        node = self._add(name, self.graph.create_node("call_function", target, tuple(args), kwargs, name=name))
        values = map_arg((node.args, node.kwargs), lambda inner: inner.meta["val"])
        try:
            with self.mode, torch.no_grad():
                node.meta["val"] = target(*values[0], **values[1])
        except Exception as error:
            self.fail(f"{target_name} does not take these arguments: {str(error).strip() or type(error).__name__}")
        if written is not None:
            self.printed.append((self.place, node, written))

    def _target(self, name: str, nodes: list[fx.Node]) -> Any:
        """The operator that prints as that: of aten or of a namespace that is named; of Python, for whole numbers."""
        first, *rest = name.split(".")
        places = (operator, math, *((torch,) if first.startswith("sym_") else ()))
        python = next((getattr(place, first) for place in places if hasattr(place, first)), None)
        of_numbers = nodes and not any(isinstance(node.meta["val"], Tensor) for node in nodes)
        overloads = [("aten", first, rest)] + ([(first, rest[0], rest[1:])] if rest else [])
        if not rest and python is not None and of_numbers:
            return python
        for namespace, operator_, overload in overloads:
            packet = getattr(getattr(torch.ops, namespace), operator_, None)
            if packet is not None and len(overload) < 2 and (*overload, "default")[0] in packet.overloads():
                return getattr(packet, (*overload, "default")[0])
        self.fail(
            f"there is no operator {name!r}",
            "operators of aten are written as add.Tensor or tanh, others with their namespace, which must be imported",
        )

    def _argument(self, text: str, kind: str) -> Any:
        """A value, by its text and the type that the operator's schema has for it."""
        text = text.strip()
        if text.startswith("["):
            if not text.endswith("]"):
                self.fail(f"{text!r} has no end")
            return [self._argument(part, kind) for part in _split(text[1:-1])]
        if re.fullmatch(r"%\w+", text):
            return self.node(text[1:])
        if text[:1] in ("'", '"'):
            return self._literal(text)
        if kind in ("str", "Optional[str]") and text != "None":
            return text
        if text == "end":
            return torch.iinfo(torch.int64).max
        if re.fullmatch(r"-?(inf|nan)", text):
            return float(text)
        if re.fullmatch(r"True|False|None|-?[\d.]+(e[+-]?\d+)?", text):
            return self._literal(text)
        constant = _dtype(text) or getattr(torch, text, None)
        if isinstance(constant, (torch.dtype, torch.memory_format, torch.layout)):
            return constant
        if re.fullmatch(r"(cpu|cuda|meta)(:\d+)?", text):
            return torch.device(text)
        self.fail(f"{text!r} is no argument", "text is written in quotes, nodes with %")

    def _literal(self, text: str) -> Any:
        try:
            return ast.literal_eval(text)
        except (SyntaxError, ValueError):
            self.fail(f"{text!r} is no argument")

    def _add(self, name: str, node: fx.Node) -> fx.Node:
        if name in self.nodes:
            self.fail(f"%{name} is there twice")
        node.name = name  # fx gives names of Python's builtins another one
        self.nodes[name] = node
        return node

    # -- the end ---------------------------------------------------------------------------------------------------

    def _update(self, name: str, node: str) -> None:
        if self.state.pop(name, None) is None:
            self.fail(f"%{name} is no state, or has its value already", "declare it: state %name: ...")
        self.updates[name] = self.node(node).name

    def program(
        self,
        rows: dict[str, int],
        sites: tuple[Site, ...],
        lora_a: dict[str, Tensor],
        values: dict[str, str],
        also: frozenset[str],
    ) -> GraphProgram:
        """The whole."""
        for name, place in self.state.items():
            raise ProgramTextError(
                f"%{name} is state, and no line says what it becomes", where=place, hint=f"update %{name} <- %new"
            )
        self.place = "the end"
        if self.given:
            self.fail(f"tensors are given that the text does not have: {', '.join(self.given)}")
        for kind, names in (("rows", rows), ("values", values.values())):
            for name in names:
                if name not in self.nodes:
                    self.fail(f"{kind} name %{name}, which the text does not have")
        results = [*self.updates.values(), *self.outputs.values()]
        self.graph.output(tuple(self.nodes[name] for name in results))
        paths = {spec.arg.name: spec.target for spec in self.inputs}
        outputs = [OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(n), paths[b]) for b, n in self.updates.items()]
        outputs += [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name), None) for name in self.outputs.values()]
        symbols = {name: size.node.expr for name, size in self.sizes.items()}
        user_inputs = [spec for spec in self.inputs if spec.kind is InputKind.USER_INPUT]
        try:
            self.graph.lint()
            exported = ExportedProgram(
                root=torch.nn.Module(),
                graph=self.graph,
                graph_signature=ExportGraphSignature(self.inputs, outputs),
                state_dict=self.tensors,
                range_constraints={s: self.environment.var_to_range[s] for s in symbols.values()},
                module_call_graph=flat_call_graph(len(user_inputs), len(self.outputs)),
                constants=self.constants,
            )
        except Exception as error:
            self.fail(f"torch does not take this graph: {error}")
        named = {n: s for n, s in symbols.items() if n != ROWS_SYMBOL and not _NUMBERED.fullmatch(n)}
        program = GraphProgram(
            exported,
            outputs=tuple(self.outputs),
            nesting=Nesting(pytree.tree_structure(0 if len(self.outputs) == 1 else (0,) * len(self.outputs))),
            rows=self.rows | rows,
            dynamic={str(symbol): DynamicSize(name, 2, MAX_SIZE) for name, symbol in named.items()},
            sites=sites,
            lora_a=lora_a,
            values=values,
            history=("parse()",),
        )
        return self._checked(program, also)

    def _checked(self, program: GraphProgram, also: frozenset[str]) -> GraphProgram:
        """The program with the facts that hold, if the types are those that are written."""
        printer = Printer(program)
        for place, node, written in self.printed:
            if (found := printer.type(node.meta["val"])) != written:
                raise ProgramTextError(f"%{node.name} is {found}, not {written}", where=place)
        program = program.with_facts(*(fact for fact in _READ if not list(facts.CHECKS[fact](program))), *also)
        if problems := facts.broken(program):
            self.fail("what is said of this program is not so: " + "; ".join(problems))
        return program


def _dtype(name: str) -> torch.dtype | None:
    found = _DTYPES.get(name, getattr(torch, name, None))
    return found if isinstance(found, torch.dtype) else None


def _described(tensor: Tensor) -> str:
    return f"{DTYPES.get(tensor.dtype, tensor.dtype)}{list(tensor.shape)}"


def _split(text: str) -> list[str]:
    """The parts between commas that are inside of neither brackets nor quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for index, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote and text[index - 1] != "\\" else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "," and not depth:
            parts.append(text[start:index].strip())
            start = index + 1
        else:
            depth += (letter in "([") - (letter in ")]")
    return [*parts, text[start:].strip()] if text.strip() else []
