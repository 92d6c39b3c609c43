"""`check_pass` finds what a pass does not keep of what it says, each with a pass that breaks just that."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mobizo_compiler import testing
from mobizo_compiler.errors import PassContractError, ProgramTextError
from mobizo_compiler.graph import Editor, Pass, operand, program_text
from mobizo_compiler.testing import check_pass
from mobizo_compiler.testing.passes import check_golden

aten = torch.ops.aten
TEXT = """
tensor %p_up_weight: f32[8, 6]
input  %x: f32[rows, 6]
  %linear = linear(%x, %p_up_weight)
  %tanh = tanh(%linear)
return output_0 = %tanh
"""


@dataclasses.dataclass(frozen=True)
class Scale(Pass):
    """Multiply every tanh by a number."""

    by: float

    def rewrite(self, edit: Editor) -> None:
        for node in edit.calls(aten.tanh.default):
            with edit.graph.inserting_after(node):
                product = edit.call(aten.mul.Tensor, node, self.by)
            edit.replace(node, product, keep=product)


@dataclasses.dataclass(frozen=True)
class AboutScale(Scale):
    """The same, and says that this is rounding."""

    numbers = "rounding"


@dataclasses.dataclass(frozen=True)
class AnyScale(Scale):
    """The same, and says that numbers change."""

    numbers = "changed"


def test_a_pass_that_keeps_its_word() -> None:
    assert "mul.Tensor(%tanh, 1.0)" in program_text(check_pass(Scale(1.0), TEXT))
    check_pass(AboutScale(1.0 + 2.0**-23), TEXT)
    check_pass(AnyScale(2.0), TEXT)
    check_pass(AnyScale(2.0), TEXT, inputs={"x": torch.full((3, 6), float("nan"))})


@dataclasses.dataclass(frozen=True)
class Stale(Pass):
    """Change what a call returns, and not what the graph says of it."""

    numbers = "changed"

    def rewrite(self, edit: Editor) -> None:
        node = edit.calls(aten.tanh.default)[0]
        node.target, node.args = aten.sum.dim_IntList, (operand(node), [-1], True)


@dataclasses.dataclass(frozen=True)
class Cut(Pass):
    """Return less than before."""

    numbers = "changed"

    def rewrite(self, edit: Editor) -> None:
        node = edit.outputs["output_0"]
        with edit.graph.inserting_after(node):
            few = edit.call(aten.slice.Tensor, node, -1, 0, 2)
        edit.set_outputs({"output_0": few})


@dataclasses.dataclass(frozen=True)
class Heavy(Pass):
    """Change a weight that other programs share."""

    numbers = "changed"

    def rewrite(self, edit: Editor) -> None:
        for tensor in edit.tensors.values():
            tensor.mul_(2)


@dataclasses.dataclass(frozen=True)
class Fickle(Scale):
    """Do something else every time."""

    numbers = "changed"
    _count = itertools.count()

    def rewrite(self, edit: Editor) -> None:
        Scale(next(self._count)).rewrite(edit)


@dataclasses.dataclass
class Thawed(Pass):
    """Options that can be changed after the program's history was written."""

    def rewrite(self, edit: Editor) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Failing(Pass):
    """A result that no inputs give."""

    def rewrite(self, edit: Editor) -> None:
        node = edit.calls(aten.tanh.default)[0]
        with edit.graph.inserting_before(node):
            wide = edit.call(aten.reshape.default, operand(node), [-1, 8])
            node.args = (wide,)
        wide.args = (operand(wide), [7, -1, 5])


BROKEN: dict[str, tuple[Pass, str]] = {
    "exact, but off": (Scale(1.0 + 2.0**-23), "says that its numbers are exact, and output 'output_0' is off"),
    "rounding, but off": (
        AboutScale(1.001),
        "the same up to rounding, and output 'output_0' is off by 0.001 where rounding explains",
    ),
    "another shape than the graph says": (
        Stale(),
        r"and the graph says torch.float32.3, 8.(.|\n)*refresh",
    ),
    "another output": (Cut(), r"broke what it must keep(.|\n)*output"),
    "a weight in place": (Heavy(), "or a weight in place"),
    "another program every time": (Fickle(1.0), "another program when it runs again"),
    "not frozen": (Thawed(), "no frozen dataclass"),
    "a graph that does not run": (Failing(), "the program after pass test_check_pass cannot be run"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_pass_that_does_not(case: str) -> None:
    step, message = BROKEN[case]
    with pytest.raises(PassContractError, match=message):
        check_pass(step, TEXT)


def test_a_check_that_could_not_fail_is_refused() -> None:
    with pytest.raises(PassContractError, match=r"at most 0 where rounding explains(.|\n)*shows nothing"):
        check_pass(AboutScale(5.0), TEXT, inputs={"x": torch.zeros(3, 6)})
    with pytest.raises(PassContractError, match="not finite before pass"):
        check_pass(AboutScale(5.0), TEXT, inputs={"x": torch.full((3, 6), float("nan"))})
    with pytest.raises(ProgramTextError, match="inputs that there are not: y"):
        check_pass(Scale(1.0), TEXT, inputs={"y": torch.zeros(3, 6)})
    with pytest.raises(ProgramTextError, match="line 2"):
        check_pass(Scale(1.0), TEXT.replace("tensor %p", "tensor %q"))


def test_the_golden_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "scale.txt"
    with pytest.raises(PassContractError, match=r"there is no golden text(.|\n)*MOBIZO_ACCEPT=1"):
        check_pass(Scale(1.0), TEXT, golden=file)
    check_pass(Scale(1.0), TEXT, golden=file, accept=True)
    assert file.read_text().splitlines()[3:] == [
        "   %tanh = tanh(%linear) : f32[rows, 8]",
        "-return output_0 = %tanh",
        "+  %mul = mul.Tensor(%tanh, 1.0) : f32[rows, 8]",
        "+return output_0 = %mul",
    ]
    check_pass(Scale(1.0), TEXT, golden=file)
    with pytest.raises(PassContractError, match=r"another one:(.|\n)*\n-\+  %mul.*1.0(.|\n)*\n\+\+  %mul.*2.0"):
        check_pass(AnyScale(2.0), TEXT, golden=file)
    monkeypatch.setenv("MOBIZO_ACCEPT", "1")
    check_pass(AnyScale(2.0), TEXT, golden=file)
    assert "2.0" in file.read_text()
    with pytest.raises(PassContractError, match="61 lines, which nobody reads"):
        check_golden(file, "x\n" * 61, accept=True)


def test_checks_are_there_without_asserts() -> None:
    """Under python -O, which drops the statement."""
    for path in Path(testing.__file__).parent.glob("*.py"):
        asserts = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert not asserts, f"{path.name}, line {asserts}"
    code = "import tests.test_check_pass as t; t.check_pass(t.Scale(1.5), t.TEXT)"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert "says that its numbers are exact" in done.stderr
