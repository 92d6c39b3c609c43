"""The contract of a pass, and the pipeline that holds every pass to it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from mobizo_compiler.errors import ConfigError, MobizoError, PassContractError, PassOrderError
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.facts import CHECKS, broken
from mobizo_compiler.graph.nodes import numbered_shapes
from mobizo_compiler.graph.printer import program_text
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.graph.sources import written_when_asked_for

Observer = Callable[["Pass", GraphProgram, str], None]
Numbers = Literal["exact", "rounding", "changed"]


class Pass(abc.ABC):
    """One rewrite of a program. Subclasses are frozen dataclasses; their fields are their options.

    A pass declares the facts it `needs`, `gives` and `breaks` (see `facts.py`). The pipeline refuses a wrong order
    before it runs anything, gives `rewrite` a private copy, and checks the result: no dead code, a graph that torch
    accepts with a value at every call, every fact that is claimed, and inputs and outputs that have the shapes,
    dtypes and row axes that they had, unless it says that they change.

    `inputs`: "kept"; "added", if there are others beside those that there were; "changed".
    `outputs`: "kept" or "changed".
    `numbers`: what is computed is "exact" what it was, or the same up to "rounding", or "changed". A pipeline does not
    run programs: the tests of a pass do, before and after it.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()
    inputs: ClassVar[Literal["kept", "added", "changed"]] = "kept"
    outputs: ClassVar[Literal["kept", "changed"]] = "kept"
    numbers: ClassVar[Numbers] = "exact"

    @property
    def name(self) -> str:
        """The name of its file."""
        return type(self).__module__.rpartition(".")[2]

    @abc.abstractmethod
    def rewrite(self, edit: Editor) -> None:
        """Change the private copy in `edit`; raise an error of `errors.py` to refuse the program."""

    def ensures(self, before: GraphProgram, after: GraphProgram) -> None:
        """Check what this pass promises, given the programs before and after; raise `PassContractError` if not."""
        return None

    def __call__(self, program: GraphProgram) -> GraphProgram:
        """Run this pass alone, with all checks of the pipeline."""
        return Pipeline([self]).run(program)


class Pipeline:
    """A list of passes, run in order with every check between them.

    Args:
        passes: The passes.
        observe: Called after each pass with the pass, the new program and its text; see `dump_to`.
    """

    def __init__(self, passes: Sequence[Pass], observe: Observer | None = None) -> None:
        self.passes = tuple(passes)
        self.observe = observe

    def check_order(self, facts: frozenset[str]) -> None:
        """Raise one `PassOrderError` that names every need that is not met, given what holds at the start."""
        problems = []
        for position, step in enumerate(self.passes):
            unknown = (step.needs | step.gives | step.breaks) - CHECKS.keys()
            problems += [f"{step.name} (#{position}) speaks of unknown fact {fact!r}" for fact in sorted(unknown)]
            for fact in sorted(step.needs - facts):
                giver = next((p.name for p in self.passes if fact in p.gives), None)
                problems.append(
                    f"{step.name} (#{position}) needs {fact!r}, "
                    + (f"which {giver} gives: run {giver} before it" if giver else "which no pass in the list gives")
                )
            facts = (facts - step.breaks) | step.gives
        if problems:
            raise PassOrderError("the passes are in a wrong order:\n  - " + "\n  - ".join(problems))

    @written_when_asked_for()
    def run(self, program: GraphProgram) -> GraphProgram:
        """The program after all passes."""
        self.check_order(program.facts)
        text = program_text(program)
        for step in self.passes:
            before, text_before = program, text
            edit = Editor(before)
            facts = (before.facts - step.breaks) | step.gives
            try:
                step.rewrite(edit)
            except MobizoError:
                raise
            except Exception as error:
                raise PassContractError(f"pass {step.name} failed: {type(error).__name__}: {error}") from error
            try:
                program = edit.finish(facts, (*before.history, repr(step)))
                program.graph.lint()
                program.exported.validate()  # type: ignore[no-untyped-call]
            except MobizoError:
                raise
            except Exception as error:
                raise PassContractError(f"pass {step.name} left an invalid graph: {error}") from error
            problems = [*broken(program), *_not_kept(step, before, program)]
            if problems:
                raise PassContractError(f"pass {step.name} broke what it must keep:\n  - " + "\n  - ".join(problems))
            step.ensures(before, program)
            text = program_text(program)
            if text == text_before and _same_beside_text(before, program):
                program = before
            if self.observe:
                self.observe(step, program, text)
        return program


@dataclasses.dataclass(frozen=True)
class Insertion:
    """A pass of one's own, and its place in the pipelines that `compile` runs (`mobizo passes` lists them).

    Args:
        step: The pass.
        before: Name of the pass that it comes before; the first of that name.
        after: Name of the pass that it comes after; the last of that name.
        methods: The methods whose pipeline gets it; if empty, every pipeline that has the named pass.

    Raises:
        ConfigError: It is no pass, or not exactly one of `before` and `after` is given.
    """

    step: Pass
    before: str | None = None
    after: str | None = None
    methods: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.step, Pass):
            raise ConfigError(f"{self.step!r} is not a Pass", hint="derive it from mobizo_compiler.graph.Pass")
        if (self.before is None) == (self.after is None):
            raise ConfigError(
                f"{self.step!r} needs one place", hint='give before="canonicalize" or after=..., not both'
            )
        object.__setattr__(self, "methods", (self.methods,) if isinstance(self.methods, str) else tuple(self.methods))


def _not_kept(step: Pass, before: GraphProgram, after: GraphProgram) -> Iterator[str]:
    """What a pass says that it keeps of the inputs and outputs, and did not."""
    if step.inputs != "changed":
        old, new = before.inputs, after.inputs
        if step.inputs == "added":
            new = {name: value for name, value in new.items() if name in old}
        yield from _differences("input", old, new)
        for name in old.keys() & new.keys():
            if before.rows.get(name) != after.rows.get(name):
                yield f"the rows of input {name!r} were in axis {before.rows.get(name)}, not {after.rows.get(name)}"
    if step.outputs == "kept":
        outputs = ({name: node.meta["val"] for name, node in p.output_nodes.items()} for p in (before, after))
        yield from _differences("output", *outputs)


def _differences(kind: str, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Iterator[str]:
    if list(old) != list(new):
        yield f"the {kind}s were {list(old)} and are {list(new)}"
    both = [name for name in old if name in new]
    shapes = numbered_shapes([*(old[name].shape for name in both), *(new[name].shape for name in both)])
    for index, name in enumerate(both):
        if shapes[index] != shapes[index + len(both)] or old[name].dtype != new[name].dtype:
            was, now = (f"{value.dtype}{list(value.shape)}" for value in (old[name], new[name]))
            yield f"{kind} {name!r} was {was} and is {now}"


def _same_beside_text(before: GraphProgram, after: GraphProgram) -> bool:
    """Whether two programs of the same text are the same in what the text does not show."""
    kept = all(
        getattr(before, name) == getattr(after, name)
        for name in ("outputs", "nesting", "rows", "dynamic", "sites", "values", "facts")
    )
    tensors, others = before.tensors(), after.tensors()
    return (
        kept
        and before.lora_a.keys() == after.lora_a.keys()
        and all(before.lora_a[fqn] is after.lora_a[fqn] for fqn in before.lora_a)
        and tensors.keys() == others.keys()
        and all(tensors[n][0] == others[n][0] and tensors[n][1] is others[n][1] for n in tensors)
    )


def dump_to(folder: Path, method: str) -> Observer:
    """An observer that writes the program text after each pass to `folder/method/NN-pass.txt`."""
    (folder / method).mkdir(parents=True, exist_ok=True)
    count = 0

    def write(step: Pass, program: GraphProgram, text: str) -> None:
        nonlocal count
        header = f"# {method} after {step!r}\n# facts: {', '.join(sorted(program.facts))}\n"
        (folder / method / f"{count:02d}-{step.name}.txt").write_text(header + text)
        count += 1

    return write
