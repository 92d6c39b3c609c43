"""Program text: a stable, readable print of a `GraphProgram`, used by golden tests, dumps and messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.upstream import OpOverload

DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
ROWS_SYMBOL = "rows"
_WORDS = frozenset(("True", "False", "None", "end", "inf", "nan"))


def program_text(program: GraphProgram) -> str:
    """The program as text: tensors, inputs, one line a call with the type of its result, outputs.

    The symbol for the number of rows prints as `rows`, other symbols as `s0`, `s1`, ... in order of appearance.
    """
    printer = Printer(program)
    return "\n".join(printer.lines()) + "\n"


class Printer:
    """Prints parts of a program, with one name for each symbol."""

    def __init__(self, program: GraphProgram) -> None:
        self.program = program
        self.symbols: dict[str, str] = {}
        self.symbols |= {symbol: size.name for symbol, size in program.dynamic.items()}
        inputs = program.inputs
        for name, axis in program.rows.items():
            size = inputs[name].shape[axis]
            if isinstance(size, torch.SymInt):
                self.symbols |= dict.fromkeys(map(str, size.node.expr.free_symbols), ROWS_SYMBOL)

    def lines(self) -> Iterator[str]:
        """All lines of the program."""
        signature = self.program.exported.graph_signature  # every property of it walks over all inputs
        user_inputs, buffers = set(signature.user_inputs), dict(signature.inputs_to_buffers)
        updates = dict(signature.buffers_to_mutate)
        changed = set(updates.values())
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                kind = "input" if node.name in user_inputs else "tensor"
                if buffers.get(node.name) in changed:
                    kind = "state"
                yield f"{kind:6} %{node.name}: {self.type(node.meta['val'])}"
            elif node.op == "call_function":
                arguments = [self.argument(a) for a in node.args]
                arguments += [f"{name}={self.argument(a)}" for name, a in node.kwargs.items()]
                call = f"{_operator(node)}({', '.join(arguments)})"
                yield f"  %{node.name} = {call} : {self.type(node.meta.get('val'))}"
        for node_name, buffer in updates.items():
            yield f"update %b_{buffer.replace('.', '_')} <- %{node_name}"
        for name, node in self.program.output_nodes.items():
            yield f"return {name} = %{node.name}"

    def type(self, value: Any) -> str:
        """Dtype and sizes of a tensor, the types of several values, or a number."""
        if isinstance(value, Tensor):
            dtype = DTYPES.get(value.dtype, str(value.dtype).removeprefix("torch."))
            return f"{dtype}[{', '.join(self.size(s) for s in value.shape)}]"
        if isinstance(value, (tuple, list)):
            return "(" + ", ".join(self.type(v) for v in value) + ")"
        return self.size(value)

    def size(self, value: Any) -> str:
        """A number, or an expression whose terms are in the order of the names that are printed."""
        if not isinstance(value, torch.SymInt):
            return str(value)
        import sympy  # takes as long to load as PyTorch

        names = {}
        for symbol in sorted(value.node.expr.free_symbols, key=str):
            name = self.symbols.setdefault(str(symbol), f"s{len(self.symbols)}")
            names[symbol] = sympy.Symbol(name, integer=True, positive=True)
        return str(value.node.expr.xreplace(names))

    def argument(self, value: Any) -> str:
        """An argument of a call; text is quoted where it could be taken for something else."""
        if isinstance(value, fx.Node):
            return f"%{value.name}"
        if isinstance(value, (tuple, list)):
            return "[" + ", ".join(self.argument(v) for v in value) + "]"
        if isinstance(value, torch.dtype):
            return DTYPES.get(value, str(value).removeprefix("torch."))
        if value == torch.iinfo(torch.int64).max:
            return "end"
        if isinstance(value, str) and (not value.isidentifier() or value in _WORDS):
            return repr(value)
        return str(value).removeprefix("torch.")


def _operator(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, OpOverload):
        name = target._schema.name.removeprefix("aten::").replace("::", ".")
        return name if target._overloadname in ("default", "") else f"{name}.{target._overloadname}"
    return getattr(target, "__name__", str(target))
