"""Where the compiler takes a shorter way than torch and ExecuTorch, it arrives at the same."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, EdgeProgramManager, to_edge_transform_and_lower
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.pass_base import ExportPass
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mobizo_compiler.backends.executorch.delegate_results import known_results
from mobizo_compiler.backends.executorch.edge import few_interpretations
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.example import bind_example
from mobizo_compiler.graph.shapes import key_of, value_of_call
from mobizo_compiler.graph.sources import written_when_asked_for
from mobizo_compiler.passes import capture
from mobizo_compiler.testing import TokenWise
from mobizo_compiler.upstream import FakeTensorMode

aten = torch.ops.aten


# -- the edge dialect ----------------------------------------------------------------------------------------------


class _Calls(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(6, 6))
        self.register_buffer("empty", torch.zeros(2, 0))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "views": lambda m, x: x.view(3, 4).t().unsqueeze(0).expand(2, 4, 3).permute(2, 0, 1)[1:].squeeze(),
    "numbers": lambda m, x: (x * 2 + 1) / 3 - x.pow(2) * True,
    "mixed dtypes": lambda m, x: x * torch.arange(6) + (x > 0) * x.half() - torch.arange(6) / 2,
    "copies": lambda m, x: x.to(torch.float32).clone() + x.half().to(torch.float32) + x[:, :].contiguous(),
    "an empty one": lambda m, x: torch.cat([x, m.empty], dim=1),
    "layers": lambda m, x: F.layer_norm(F.linear(x, m.weight).softmax(-1), (6,)),
    "memory formats": lambda m, x: x.view(1, 2, 2, 3).to(memory_format=torch.channels_last).clone() * 2.0,
    "several results": lambda m, x: (*x.split(3, dim=1), x.max(dim=1)),
    "made from nothing": lambda m, x: torch.full_like(x, 2) + torch.zeros(6) + torch.arange(6),
}


OF_2 = ("views", "memory formats", "an empty one")  # those that take two rows and no others


def _listing(edge: EdgeProgramManager) -> list[str]:
    """Everything that a graph says: operators, arguments, values, constants, what is input and output."""
    program = edge.exported_program("forward")
    lines = [str(program.graph_signature), *(f"{n}: {v.tolist()}" for n, v in program.constants.items())]
    for node in program.graph.nodes:
        values = node.meta["val"] if isinstance(node.meta.get("val"), (list, tuple)) else [node.meta.get("val")]
        shapes = [(v.dtype, str(v.shape), str(v.stride())) if isinstance(v, Tensor) else str(v) for v in values]
        lines.append(f"{node.name} {node.target} {node.args} {node.kwargs} {shapes}")
    return lines


def _edge(exported: ExportedProgram) -> EdgeProgramManager:
    return to_edge_transform_and_lower(exported, compile_config=EdgeCompileConfig(_check_ir_validity=False))


@contextlib.contextmanager
def _counted() -> Iterator[list[str]]:
    """The passes that interpret a program in this block."""
    found, original = list[str](), ExportPass.call_submodule

    def counting(self: ExportPass, *rest: Any) -> Any:
        found.append(type(self).__name__)
        return original(self, *rest)

    ExportPass.call_submodule = counting
    try:
        yield found
    finally:
        ExportPass.call_submodule = original


@pytest.mark.parametrize(
    ("what", "rows"),
    [*((what, "fixed") for what in FUNCTIONS), *((what, "any") for what in FUNCTIONS if what not in OF_2)],
)
def test_the_edge_dialect_is_the_same_in_two_interpretations(what: str, rows: str) -> None:
    dynamic = {"x": {0: Dim("rows", min=2, max=9)}} if rows == "any" else None
    model = _Calls(FUNCTIONS[what]).eval()

    def exported() -> ExportedProgram:
        return export(model, (torch.randn(2, 6),), dynamic_shapes=dynamic)

    with _counted() as long:
        wanted = _listing(_edge(exported()))
    with few_interpretations(), _counted() as short:
        found = _listing(_edge(exported()))
    assert found == wanted
    assert len(short) == 2 < len(long), f"{long} are {short}"


def test_what_exports_afterwards_is_not_changed() -> None:
    from executorch.exir.program import _program

    upstream = _program._generate_edge_program
    with pytest.raises(ZeroDivisionError), few_interpretations():
        assert _program._generate_edge_program is not upstream
        1 / 0  # noqa: B018
    assert _program._generate_edge_program is upstream


# -- delegates -----------------------------------------------------------------------------------------------------


def _of_delegates(program: ExportedProgram) -> list[Any]:
    """What delegates return when the program is interpreted."""
    found = []
    for node in program.graph.nodes:
        if "executorch_call_delegate" in str(node.target):
            _, *args = (argument.meta.get("val") for argument in node.args)
            with args[0].fake_mode:
                found.append(node.target(getattr(program.graph_module, node.args[0].target), *args))
    assert found
    return found


@pytest.mark.parametrize("rows", ["fixed", "any"])
def test_what_a_delegate_returns_is_known(rows: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6), nn.Softmax(-1)).eval()
    dynamic = ({0: Dim("rows", min=2, max=9)},) if rows == "any" else None
    exported = export(model, (torch.randn(4, 6),), dynamic_shapes=dynamic)
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).exported_program()
    (delegate,) = (m for m in program.graph_module.children() if isinstance(m, LoweredBackendModule))
    wanted, before = _of_delegates(program), delegate.original_module.module
    with known_results([program]):
        assert (delegate.original_module.module == before) == (rows == "any")
        found = _of_delegates(program)
    assert delegate.original_module.module == before, "only in the block"
    for some, others in zip(wanted, found, strict=True):
        assert type(some) is type(others)
        assert _parts(some) == _parts(others)
        assert all(value.fake_mode is not None for value in others)


# -- sources of graph modules --------------------------------------------------------------------------------------


SOURCE = 'getattr(self, "1")'


def _module() -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))


def test_a_graph_module_is_written_when_it_is_called_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    traced, x = _module(), torch.randn(2, 3)
    written: list[fx.Graph] = []
    original = fx.Graph.python_code

    def counting(self: fx.Graph, *rest: Any, **named: Any) -> Any:
        written.append(self)
        return original(self, *rest, **named)

    monkeypatch.setattr(fx.Graph, "python_code", counting)
    with written_when_asked_for():
        again = fx.GraphModule(traced, traced.graph)
        for _ in range(3):
            again.graph = again.graph
            again.recompile()
        assert not written
        assert torch.equal(again(x), traced(x)) and len(written) == 1
        assert torch.equal(again(x), traced(x)) and len(written) == 1
        again.recompile()
        assert torch.equal(again(x), traced(x)) and len(written) == 2
    assert torch.equal(again(x), traced(x)) and len(written) == 2
    again.recompile()
    assert len(written) == 3


def test_it_is_what_its_graph_is_at_that_time() -> None:
    traced, x = _module(), torch.randn(2, 3)
    with written_when_asked_for():
        changed = fx.GraphModule(traced, copy.deepcopy(traced.graph))
        last = changed.graph.output_node()
        with changed.graph.inserting_before(last):
            last.args = (changed.graph.call_function(torch.neg, (last.args[0],)),)
        changed.recompile()
        assert "torch.neg" in changed.code and changed.code == changed.code
        assert "torch.neg" in changed.recompile().src
        copied, packed = copy.deepcopy(changed), pickle.dumps(changed)
        unpacked = pickle.loads(packed)
        forward = changed.forward
    for module in (changed, copied, unpacked, pickle.loads(pickle.dumps(changed)), forward, forward):
        assert torch.equal(module(x), -traced(x))
    for module in (changed, copied, unpacked):
        assert "torch.neg" in module.code and "torch.neg" in module.print_readable(print_output=False)
        module.recompile()
        assert torch.equal(module(x), -traced(x)) and "torch.neg" in module.code and "torch.neg" in str(module)


def test_a_module_with_a_signature_is_written_at_once() -> None:
    exported = export(nn.Linear(3, 4), (torch.randn(2, 3),))
    with written_when_asked_for():
        module = exported.module()
        with pytest.raises((RuntimeError, AssertionError, ValueError)):
            module(torch.randn(5, 5))
    assert tuple(module(torch.randn(2, 3)).shape) == (2, 4)


def test_what_looks_at_a_module_finds_what_torch_would_have_written() -> None:
    traced, x = _module(), torch.randn(2, 3)

    def made() -> fx.GraphModule:
        with written_when_asked_for():
            return fx.GraphModule(traced, traced.graph)

    names = list(inspect.signature(traced.forward).parameters)
    assert list(inspect.signature(made().forward).parameters) == names == ["input"]
    assert len(fx.symbolic_trace(made()).graph.nodes) == len(traced.graph.nodes)
    assert SOURCE in inspect.getsource(made().forward)
    kept = made()
    assert SOURCE in inspect.getsource(type(kept).forward)
    assert made()._lineno_map == traced._lineno_map and made()._prologue_start == traced._prologue_start
    named = export(made(), (x,), dynamic_shapes={"input": {0: Dim("rows", min=2, max=9)}})
    assert named.graph_signature.user_inputs == ("input",)
    compiled = torch.compile(made(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), traced(x))
    assert torch.equal(torch.jit.trace(made(), (x,))(x), traced(x))


def test_submodules_are_made_current_with_their_parent() -> None:
    x = torch.randn(2, 3)
    with written_when_asked_for():
        parent = fx.GraphModule({"inner": _module()}, fx.Graph())
        inner = parent.inner = fx.GraphModule(_module(), _module().graph)
        before = inner(x)
        last = inner.graph.output_node()
        with inner.graph.inserting_before(last):
            last.args = (inner.graph.call_function(torch.neg, (last.args[0],)),)
        parent.recompile()
    assert torch.equal(inner(x), -before)


def test_modules_that_write_themselves_are_left_alone() -> None:
    class Own(fx.GraphModule):
        def __reduce__(self) -> Any:
            return (int, (7,))

    with written_when_asked_for():
        lazy = torch.fx._lazy_graph_module._LazyGraphModule(_module(), _module().graph)
        own = Own(_module(), _module().graph)
        assert pickle.loads(pickle.dumps(own)) == 7
        x = torch.randn(2, 3)
        assert tuple(pickle.loads(pickle.dumps(lazy))(x).shape) == tuple(own(x).shape) == (2, 4)


def test_other_threads_do_not_notice() -> None:
    written: list[str] = []

    def other() -> None:
        written.append(_module().__dict__["_code"])

    with written_when_asked_for():
        assert "_code" not in fx.GraphModule(_module(), _module().graph).__dict__
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert SOURCE in written[0]


def test_the_first_call_may_come_from_several_threads() -> None:
    traced, x = _module(), torch.randn(2, 3)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(40):
            with written_when_asked_for():
                module = fx.GraphModule(traced, traced.graph)
            with ThreadPoolExecutor(4) as pool:
                results = list(pool.map(lambda _, module=module: (module(x), module.code), range(4)))
            assert all(torch.equal(found, traced(x)) and SOURCE in code for found, code in results)
    finally:
        sys.setswitchinterval(interval)


def test_a_patch_of_somebody_else_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], fx.GraphModule.recompile

    def patched(self: fx.GraphModule) -> Any:
        calls.append(self)
        return original(self)

    monkeypatch.setattr(fx.GraphModule, "recompile", patched)
    with written_when_asked_for():
        export(nn.Linear(3, 4), (torch.randn(2, 3),)).module()
    assert fx.GraphModule.recompile is patched and calls
    with written_when_asked_for():
        monkeypatch.undo()
    assert fx.GraphModule.recompile is original


def test_graph_modules_are_as_ever_after_the_last_block() -> None:
    original = fx.GraphModule.recompile
    with pytest.raises(ZeroDivisionError), written_when_asked_for():
        with written_when_asked_for():
            assert fx.GraphModule.recompile is not original
        assert fx.GraphModule.recompile is not original
        1 / 0  # noqa: B018
    assert fx.GraphModule.recompile is original


# -- shapes of calls -----------------------------------------------------------------------------------------------

_SIZES = st.lists(st.integers(1, 4), min_size=2, max_size=3)
_CALLS: dict[str, Callable[[Any, Any], tuple[Any, tuple[Any, ...]]]] = {
    "add": lambda x, y: (aten.add.Tensor, (x, y)),
    "mul by a number": lambda x, y: (aten.mul.Tensor, (x, 2.0)),
    "compare": lambda x, y: (aten.gt.Scalar, (x, 1)),
    "permute": lambda x, y: (aten.permute.default, (x, list(reversed(range(x.dim()))))),
    "slice": lambda x, y: (aten.slice.Tensor, (x, 1, 1, None)),
    "flatten": lambda x, y: (aten.reshape.default, (x, [-1])),
    "sum": lambda x, y: (aten.sum.dim_IntList, (x, [0])),
    "chunk": lambda x, y: (aten.chunk.default, (x, 2)),
    "max": lambda x, y: (aten.max.dim, (x, 1)),
    "cat": lambda x, y: (aten.cat.default, ([x, y], 1)),
    "to": lambda x, y: (aten._to_copy.default, (x,)),
    "size": lambda x, y: (aten.sym_size.int, (x, 0)),
}


@settings(max_examples=30, deadline=None)
@given(sizes=_SIZES, symbolic=st.booleans(), turned=st.booleans())
@pytest.mark.parametrize("name", _CALLS)
def test_a_result_from_memory_is_like_the_one_that_torch_makes(
    name: str, sizes: list[int], symbolic: bool, turned: bool
) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    tensor = torch.randn(*sizes)
    tensor = tensor.transpose(0, 1) if turned else tensor
    x, y = (mode.from_tensor(tensor.clone(), static_shapes=not symbolic) for _ in range(2))
    target, args = _CALLS[name](x, y)
    made = []

    def call() -> Any:
        made.append(target)
        with mode:
            return target(*args)

    first, second = (value_of_call(target, (args, {}), mode, None, call) for _ in range(2))
    fresh = call()
    assert _parts(second) == _parts(fresh) == _parts(first)
    assert len(made) == (2 if key_of(fresh) is not None else 3)


def _leaves(value: Any) -> list[Any]:
    return list(torch.utils._pytree.tree_leaves(value))


def _parts(value: Any) -> list[Any]:
    return [
        (str(v.shape), str(v.stride()), v.dtype, v.device, v.layout) if isinstance(v, Tensor) else (type(v), str(v))
        for v in _leaves(value)
    ]


def _some_rows() -> Any:
    """An operator that says of itself nothing but what it returns: some rows, how many only the data says."""

    @torch.library.custom_op("shortcuts::some_rows", mutates_args=())
    def some_rows(x: Tensor) -> Tensor:
        return x[x[:, 0] > 0].clone()

    @some_rows.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(torch.library.get_ctx().new_dynamic_size(), x.shape[1])

    return torch.ops.shortcuts.some_rows.default


def test_what_a_call_writes_or_reads_off_its_data_is_not_remembered() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.randn(3, 4))
    with mode:
        number = aten.nonzero.default(x).shape[0]
        part = aten.slice.Tensor(x, 0, number, None)
    calls = [
        (aten.add_.Tensor, (x, x)),
        (aten.nonzero.default, (x,)),
        (aten.neg.default, (part,)),
        (_some_rows(), (x,)),
    ]
    for target, args in calls:
        found = []

        def call(target: Any = target, args: Any = args, found: list[Any] = found) -> Any:
            with mode:
                found.append(target(*args))
            return found[-1]

        for _ in range(2):
            assert value_of_call(target, (args, {}), mode, None, call) is found[-1]
        assert len(found) == 2, target


def test_a_call_that_needs_a_gradient_still_does() -> None:
    mode = FakeTensorMode()
    x = mode.from_tensor(torch.randn(3, 4, requires_grad=True))
    for _ in range(3):
        value = value_of_call(aten.t.default, ((x,), {}), mode, None, lambda: aten.t.default(x))
        assert value.requires_grad


def test_numbers_that_are_equal_and_of_other_types_are_told_apart() -> None:
    assert len({key_of((1,)), key_of((1.0,)), key_of((True,)), key_of([1])}) == 4


def test_a_value_that_stays_the_same_stays_the_same_object() -> None:
    edit = Editor(capture(TokenWise().eval(), bind_example(None, (torch.zeros(2, 5, dtype=torch.int64),))))
    before = {node: node.meta["val"] for node in edit.graph.nodes if node.op == "call_function"}
    edit.refresh()
    edit.refresh()
    kept = [node for node, value in before.items() if node.meta["val"] is value]
    assert len(kept) > len(before) / 2


def test_functions_that_are_alike_are_traced_once_for_each_shape() -> None:
    traced = []
    edit = Editor(capture(TokenWise().eval(), bind_example(None, (torch.zeros(2, 5, dtype=torch.int64),))))

    def half(x: Tensor) -> Tensor:
        traced.append(tuple(x.shape))
        return x / 2

    nodes = [n for n in edit.graph.nodes if n.op == "call_function" and n.meta["val"].dtype == torch.float32]
    with edit.graph.inserting_before(edit.graph.output_node()):
        for _ in range(2):
            for node in nodes:
                new = edit.inline(half, node, alike="half")
                assert key_of(new.meta["val"]) == key_of(node.meta["val"])
        assert len(traced) == len({key_of(node.meta["val"]) for node in nodes}) < 2 * len(nodes)
        edit.inline(half, nodes[0])
        assert len(traced) == len({key_of(node.meta["val"]) for node in nodes}) + 1


def test_what_is_remembered_of_a_mode_goes_with_it() -> None:
    mode = FakeTensorMode()
    x = mode.from_tensor(torch.randn(2, 3))
    value_of_call(aten.neg.default, ((x,), {}), mode, None, lambda x=x: x)
    gone = weakref.ref(mode)
    del mode, x
    gc.collect()
    assert gone() is None
