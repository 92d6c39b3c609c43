"""`check_pass`: the contract of a pass, as a check that authors of passes run on small programs."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobizo_compiler.errors import PassContractError, ProgramTextError
from mobizo_compiler.graph.parser import parse, random_tensor
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.printer import ROWS_SYMBOL, Printer, program_text
from mobizo_compiler.graph.program import STATE, STATE_INPUT, GraphProgram
from mobizo_compiler.testing.oracle import FLOAT32_ROUNDING, ROUNDING_FACTOR

ACCEPT_VARIABLE = "MOBIZO_ACCEPT"
MOST_LINES = 60  # of a golden text, so that a person reads it
ROWS, OTHER_SIZES = 3, (5, 7, 11, 13)  # what stands for symbols when a program is run
LEAST_SIGNAL = 100  # results must be so many times larger than what may differ


def check_pass(
    step: Pass,
    program: GraphProgram | str,
    *,
    golden: str | PathLike[str] | None = None,
    accept: bool | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> GraphProgram:
    """Run a pass on a small program, and hold it to what it says of itself.

    Checks that the pass is a frozen dataclass; what the pipeline checks of every pass (facts, values, inputs and
    outputs that are kept); that the program before and its weights stay as they were, and a second run gives the same;
    the golden text; that results have the shapes and dtypes that the graph says; and the numbers, where the pass says
    that they are exact or the same up to rounding.

    Numbers: both programs are run on the same random inputs, weights and state, and results of one name compared: bit
    for bit, or up to 8 times of what the program before shows if its inputs and weights move by one unit in the last
    place. Where the pass puts other inputs in place of those that there were, there is nothing to compare, and its
    tests must say what it keeps.

    Args:
        step: The pass.
        program: A program that it changes, or its text (see `mobizo_compiler.graph.parse`).
        golden: A file with the text before and after: lines of both begin with a space, lines of the first alone with
            a minus, of the second alone with a plus. At most 60 lines.
        accept: Whether to write that file; if None, what the environment variable MOBIZO_ACCEPT says.
        inputs: Values of inputs, where random ones do not do.

    Returns:
        The program after the pass.

    Raises:
        PassContractError: The pass does not keep the contract.
        ProgramTextError: The text is no program.

    >>> from mobizo_compiler.passes import Canonicalize
    >>> after = check_pass(Canonicalize(), "input %x: f32[rows, 3]\\n%y = alias(%x)\\n%z = tanh(%y)\\nreturn z = %z")
    >>> print(program_text(after), end="")
    input  %x: f32[rows, 3]
      %z = tanh(%x) : f32[rows, 3]
    return z = %z
    """
    if not dataclasses.is_dataclass(step) or not step.__dataclass_params__.frozen:
        raise PassContractError(f"pass {step.name} is no frozen dataclass", hint="@dataclasses.dataclass(frozen=True)")
    before = parse(program) if isinstance(program, str) else program
    text, tensors = program_text(before), before.tensors()
    kept = {name: tensor.detach().clone() for name, (_, tensor) in tensors.items()}
    after = step(before)
    if program_text(before) != text or any(not torch.equal(kept[name], tensors[name][1]) for name in kept):
        raise PassContractError(f"pass {step.name} changed the program that it was given, or a weight in place")
    found = program_text(after)
    if program_text(step(before)) != found:
        raise PassContractError(f"pass {step.name} makes another program when it runs again")
    if golden is not None:
        accepted = bool(os.environ.get(ACCEPT_VARIABLE)) if accept is None else accept
        check_golden(Path(golden), difference(text, found), accepted)
    _check_results(step, before, after, dict(inputs or {}))
    return after


def difference(before: str, after: str) -> str:
    """Two texts in one: lines of both behind a space, of the first alone behind a minus, of the second behind a plus.

    >>> print(difference("a\\nb\\n", "a\\nc\\n"), end="")
     a
    -b
    +c
    """
    old, new = before.splitlines(), after.splitlines()
    lines: list[str] = []
    for kind, *ends in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        first, last, start, end = ends
        if kind == "equal":
            lines += [f" {line}" for line in old[first:last]]
        else:
            lines += [*(f"-{line}" for line in old[first:last]), *(f"+{line}" for line in new[start:end])]
    return "\n".join(lines) + "\n"


def sides(text: str) -> tuple[str, str]:
    """The two texts that `difference` made one of.

    >>> sides(difference("a\\nb\\n", "a\\nc\\n"))
    ('a\\nb\\n', 'a\\nc\\n')
    """
    lines = text.splitlines()
    before, after = ("".join(f"{line[1:]}\n" for line in lines if line[:1] in (" ", sign)) for sign in "-+")
    return before, after


def check_golden(path: Path, text: str, accept: bool) -> None:
    """Compare a text with a file, or write the file.

    Raises:
        PassContractError: They differ; the message has the difference.
    """
    lines = text.count("\n")
    if lines > MOST_LINES:
        raise PassContractError(f"{path.name} has {lines} lines, which nobody reads", hint="make the program smaller")
    if accept:
        path.write_text(text)
    if not path.exists():
        raise PassContractError("there is no golden text", where=str(path), hint=f"{ACCEPT_VARIABLE}=1, then read it")
    if (wanted := path.read_text()) != text:
        changes = difflib.unified_diff(wanted.splitlines(), text.splitlines(), "golden", "found", n=1, lineterm="")
        raise PassContractError(
            "the golden text is another one:\n" + "\n".join(changes),
            where=str(path),
            hint=f"{ACCEPT_VARIABLE}=1, then read what changed",
        )


# -- numbers -----------------------------------------------------------------------------------------------------------


def _check_results(step: Pass, before: GraphProgram, after: GraphProgram, given: dict[str, Tensor]) -> None:
    values = _values(before, after, given)
    found = _run(step, after, values)
    for name, result in found.items():
        if name in after.outputs:
            said = after.output_nodes[name].meta["val"]
            numbers = _numbers(after, _rows(before, after))
            shape = tuple(_number(size, numbers) for size in said.shape)
            if (tuple(result.shape), result.dtype) != (shape, said.dtype):
                raise PassContractError(
                    f"output {name!r} after pass {step.name} is {result.dtype}{list(result.shape)}, and the graph says "
                    f"{said.dtype}{list(shape)}",
                    hint="call edit.refresh() where a rewrite changes shapes or dtypes",
                )
    one_contains_the_other = before.inputs.keys() <= after.inputs.keys() or after.inputs.keys() <= before.inputs.keys()
    if not one_contains_the_other:
        return
    wanted = _run(step, before, values)
    if step.outputs == "kept":
        described = [
            {name: f"{result.dtype}{list(result.shape)}" for name, result in results.items() if name in program.outputs}
            for results, program in ((wanted, before), (found, after))
        ]
        if described[0] != described[1]:
            raise PassContractError(
                f"pass {step.name} says that it keeps the outputs, and makes {described[1]} of {described[0]}",
                hint='outputs = "changed" if that is what it is for',
            )
    moved = _run(step, before, values, moved=True) if step.numbers == "rounding" else wanted
    for name in wanted if step.numbers != "changed" else ():
        if name in found and wanted[name].shape == found[name].shape:
            _compare(step, name, found[name], wanted[name], moved[name])


def _compare(step: Pass, name: str, found: Tensor, wanted: Tensor, moved: Tensor) -> None:
    if not bool(torch.isfinite(wanted).all()):
        raise PassContractError(
            f"output {name!r} is not finite before pass {step.name} on these inputs, which shows nothing",
            hint="check_pass(..., inputs={name: tensor}), or parse(..., tensors={name: tensor})",
        )
    error = float((found.double() - wanted.double()).abs().max()) if found.numel() else 0.0
    if step.numbers == "exact":
        if not torch.equal(found, wanted):
            raise PassContractError(
                f"pass {step.name} says that its numbers are exact, and output {name!r} is off by {error:.3g}",
                hint='numbers = "rounding" if that is all it is',
            )
        return
    if not wanted.is_floating_point():
        if bool(((found != wanted) & (moved == wanted)).any()):
            raise PassContractError(f"output {name!r}, whole numbers, is another one after pass {step.name}")
        return
    # A rewrite that rounds otherwise is like other inputs within their own rounding; and no engine hits the last place.
    size = float(wanted.abs().max()) if wanted.numel() else 0.0
    unit = FLOAT32_ROUNDING if wanted.dtype == torch.float32 else 2 * torch.finfo(wanted.dtype).eps
    shown = float((moved.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
    tolerance = ROUNDING_FACTOR * max(shown, unit * max(1.0, size))
    if size < LEAST_SIGNAL * tolerance:
        raise PassContractError(
            f"output {name!r} is at most {size:.3g} where rounding explains {tolerance:.3g}, which shows nothing",
            hint="check_pass(..., inputs={name: tensor}), or parse(..., tensors={name: tensor})",
        )
    if not error <= tolerance:
        raise PassContractError(
            f"pass {step.name} says that its numbers are the same up to rounding, and output {name!r} is off by "
            f"{error:.3g} where rounding explains {tolerance:.3g}"
        )


def _rows(*programs: GraphProgram) -> int:
    """The number of rows to run the programs with: that of one that fixes it, or a few."""
    return next((program.fixed_rows for program in reversed(programs) if program.fixed_rows is not None), ROWS)


def _numbers(program: GraphProgram, rows: int) -> dict[str, int]:
    """A number for every symbol."""
    printer = Printer(program)
    list(printer.lines())  # names the symbols
    others = iter(OTHER_SIZES * len(printer.symbols))
    return {symbol: rows if name == ROWS_SYMBOL else next(others) for symbol, name in printer.symbols.items()}


def _number(size: Any, numbers: Mapping[str, int]) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression.subs({symbol: numbers[str(symbol)] for symbol in expression.free_symbols}))


def _values(before: GraphProgram, after: GraphProgram, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of both programs, and a state that both start from if the first has one."""
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Tensor] = {}
    for program in (after, before):
        numbers = _numbers(program, _rows(before, after))
        for name, value in program.inputs.items():
            if name not in values:
                shape = [_number(size, numbers) for size in value.shape]
                random = random_tensor(shape, value.dtype, generator)
                values[name] = given.pop(name, random)
    if given:
        raise ProgramTextError(
            f"values are given for inputs that there are not: {', '.join(given)}",
            hint=f"the inputs are {', '.join(values)}",
        )
    states = [tensor for path, tensor in before.tensors().values() if path == STATE]
    if states:
        values.setdefault(STATE_INPUT, 0.3 * torch.randn(states[0].shape, generator=generator))
    return values


def _run(step: Pass, program: GraphProgram, values: Mapping[str, Tensor], moved: bool = False) -> dict[str, Tensor]:
    """Results by name; the state that a call leaves is one."""
    generator = torch.Generator().manual_seed(1)
    tensors = program.tensors()
    arguments = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            path, tensor = tensors.get(node.name, (None, None))
            value = (
                values.get(STATE_INPUT, tensor) if path == STATE else values[node.name] if tensor is None else tensor
            )
            if value is not None:
                arguments.append(_moved(value, generator) if moved else value)
    signature = program.exported.graph_signature
    names = [STATE_INPUT if path == STATE else path for path in signature.buffers_to_mutate.values()]
    try:
        with torch.no_grad():
            results = program.exported.graph_module(*arguments)
    except Exception as error:
        side = "after" if program.history[-1:] == (repr(step),) else "before"
        raise PassContractError(f"the program {side} pass {step.name} cannot be run: {error}") from error
    return dict(zip([*names, *program.outputs], results, strict=True))


def _moved(value: Tensor, generator: torch.Generator) -> Tensor:
    """The numbers beside those that are given; whole numbers, and numbers of few bits, stay."""
    if value.dtype not in (torch.float32, torch.float64):
        return value
    signs = 2 * torch.randint(0, 2, value.shape, generator=generator) - 1
    return value * (1 + torch.finfo(value.dtype).eps * signs.to(value.dtype))
