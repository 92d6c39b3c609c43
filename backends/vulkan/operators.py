"""Operators by kind, as the passes of this backend need them."""

from __future__ import annotations

from torch import fx

POINTWISE = frozenset(
    (
        "abs",
        "add",
        "clamp",
        "cos",
        "div",
        "exp",
        "gelu",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "log",
        "log10",
        "maximum",
        "minimum",
        "mul",
        "neg",
        "pow",
        "relu",
        "round",
        "rsqrt",
        "rsub",
        "sigmoid",
        "silu",
        "sin",
        "sqrt",
        "square",
        "sub",
        "tanh",
        "where",
    )
)
REDUCTIONS = frozenset(("mean", "sum", "amax", "amin"))
# A network is where these are; what is in front of all of them is cheap.
PRODUCTS = frozenset(("addmm", "baddbmm", "bmm", "convolution", "linear", "matmul", "mm"))


def name_of(node: fx.Node) -> str:
    """The name of the operator that a node calls, without namespace and overload; of either dialect."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.rpartition("::")[2] if schema is not None else getattr(node.target, "__name__", "")
    return str(name).removesuffix("_copy")
