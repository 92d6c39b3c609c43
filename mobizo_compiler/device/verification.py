"""Whether a program computes here what it computed where it was compiled: bundles are made there, and checked anywhere.

Two processors add the same products in other orders, so that their numbers are equal up to rounding. How much that is
for a program is measured where the bundle is made: trained numbers are moved by 2^-10 of themselves. For a program of
real numbers that does less than `LOSS_TOLERANCE`. Where activations are rounded to integers, it decides which integers
values become, as the arithmetic of another processor does, and the losses part by what all the rounding does; so much,
`ROUNDING` times, is allowed on top.

What is not measured is rounding before the first adapter; of that `prefix` alone shows something.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from mobizo_compiler.device.scalars import whole
from mobizo_compiler.errors import ArtifactError, InputError
from mobizo_compiler.format import checksum
from mobizo_compiler.format.bundle import LARGEST, NORM, OTHERS, Bundle, Call, Expected, check_expected, read_bundle
from mobizo_compiler.format.manifest import Generation
from mobizo_compiler.format.probe import probe_inputs, random_labels
from mobizo_compiler.format.program import Program, Runner
from mobizo_compiler.load import load
from mobizo_compiler.quantization.weights import ROUND_ACTIVATIONS
from mobizo_compiler.step.agreement import (
    ARITHMETIC,
    GRADIENT_TOLERANCE,
    INTEGERS,
    LOSS_TOLERANCE,
    OUTPUT_TOLERANCE,
    ROUNDING,
    UPDATE_TOLERANCE,
    slope,
)

SEED, LEARNING_RATE, STATE_SCALE = 20, 1e-3, 1e-2
MOVED, TIMES = 2.0**-10, 6  # share of every trained number; how often it is tried
ROUNDED_START = 2e-2  # of the norm of what a prefix returns, where activations are rounded: an 8-bit step or two
DRAWS, PROMPT = 4, 8

Values = dict[str, Tensor]
Moved = Callable[[str], float]  # how far a value may move, by its name
Expect = Callable[[str, Values, list[Values], Moved], list[Expected]]


def write_bundle(program: str | PathLike[str], path: str | PathLike[str], steps: int = 1) -> Path:
    """Run a program on a fixed input and write what it computes, with tolerances, to a bundle.

    Do this on the machine that compiled it, where `compile` has compared it with the model.

    Args:
        program: A program file.
        path: The bundle, a safetensors file. It appears whole or not at all.
        steps: Training steps, each from the state that the one before led to here, so that differences do not add up.

    Returns:
        The path of the bundle.

    Raises:
        ArtifactError: The program is damaged, or there is no folder to write to.
        InputError: The loss of the fixed input is not finite for any labels.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ArtifactError(f"there is no folder {str(target.parent)!r}", where=str(target))
    loaded = load(program)
    made = _Making(loaded, whole("steps", steps, 1))
    made_on = {"machine": platform.machine(), **loaded.manifest.versions}
    Bundle(checksum.of_file(Path(program)), made_on, tuple(made.calls), made.tensors).write(target)
    return target


def verify_bundle(program: str | PathLike[str], path: str | PathLike[str]) -> dict[str, tuple[float, float]]:
    """Make the calls of a bundle here, and compare what they give.

    Args:
        program: The program file.
        path: Its bundle.

    Returns:
        For every value that was compared, with the measure: by how much it differs, and by how much it may.

    Raises:
        ArtifactError: A file is damaged, or the bundle is that of another program.
        VerificationError: The program computes other numbers here.
    """
    bundle, loaded = read_bundle(Path(path)), load(program)
    if bundle.program != checksum.of_file(Path(program)):
        raise ArtifactError(
            "the bundle is of another program",
            where=str(path),
            hint=f"mobizo bundle {program} -o FILE, where it was compiled",
        )
    runner, values = loaded.artifact.runner(), dict(bundle.tensors)
    found: dict[str, tuple[float, float]] = {}
    for call in bundle.calls:
        try:
            _run(runner, call, values)
            for one in call.expected:
                found[f"{one.value}, {one.measure}"] = (check_expected(one, values, str(program)), one.tolerance)
        except KeyError as error:
            raise ArtifactError(f"the bundle has no value {error}", where=str(path)) from None
    return found


def _run(runner: Runner, call: Call, values: Values) -> None:
    """Make a call, and add what it gives to the values."""
    runner.state().copy_(values[call.state])
    outputs = runner.call(call.method, [values[name] for name in call.arguments])
    values |= {f"{call.name}/{place}": output.clone() for place, output in enumerate(outputs)}
    values[f"{call.name}/state"] = runner.state().clone()


class _Making:
    """The calls and tensors of a bundle, by running a program."""

    def __init__(self, program: Program, steps: int) -> None:
        self.program, self.manifest = program, program.manifest
        self.runner = program.artifact.runner()
        self.calls: list[Call] = []
        self.tensors: Values = {}
        generator = torch.Generator().manual_seed(SEED)
        self._generator = generator
        start = program.initial_state()
        start[: program.parameters] += torch.randn(program.parameters, generator=generator) * STATE_SCALE
        self.tensors["start"] = start
        self.inputs = self._named("input", probe_inputs(self.manifest))
        self.tensors["seed"] = torch.tensor([SEED], dtype=torch.int32)
        self.tensors["eps"] = torch.tensor([self.manifest.eps])
        self.tensors["learning_rate"] = torch.tensor([LEARNING_RATE])
        self._draw_labels()
        self._add(self._outputs, _call("evaluate", "evaluate", self.inputs))
        starts = self._add_prefix() if self.manifest.prefix else self.inputs
        state = "start"
        for step in range(steps):
            state = self._add_step(starts, state, step)
        if self.manifest.generate is not None:
            self._add_generation(self.manifest.generate)

    def _named(self, name: str, tensors: Sequence[Tensor]) -> list[str]:
        names = [f"{name}_{place}" for place in range(len(tensors))]
        self.tensors |= dict(zip(names, tensors, strict=True))
        return names

    def _draw_labels(self) -> None:
        inputs = [self.tensors[name] for name in self.inputs]
        for _ in range(DRAWS):
            self.tensors["labels"] = random_labels(self.manifest, inputs, self._generator)
            starts = inputs
            if self.manifest.prefix:
                starts = [value.clone() for value in self.runner.call("prefix", [*inputs, self.tensors["labels"]])]
            self.runner.state().copy_(self.tensors["start"])
            scalars = [self.tensors[name] for name in ("seed", "learning_rate", "eps")]
            loss, _, gradient, *_ = self.runner.call("train_step", [*starts, self.tensors["labels"], *scalars])
            if bool(loss.isfinite()) and bool(gradient.isfinite().all()):
                if not self.manifest.zo.measures and not self.manifest.memory:
                    # As large as the state, so that the last bits of the state do not hide the gradient.
                    length = gradient.clamp(max=self.manifest.zo.clip) if self.manifest.zo.clip else gradient
                    self.tensors["learning_rate"] = self._trained(self.tensors["start"]).norm() / length
                return
        raise InputError(f"the loss of the fixed input is not finite, for {DRAWS} draws of labels")

    def _trained(self, state: Tensor) -> Tensor:
        return state[: self.program.parameters]

    def _moved(self, state: str) -> Values:
        """The tensors with another state, whose numbers are moved a little."""
        signs = torch.randint(0, 2, self.tensors[state].shape, generator=self._generator) * 2 - 1
        return {**self.tensors, state: self.tensors[state] * (1 + MOVED * signs)}

    def _add(self, expect: Expect, *calls: Call) -> Values:
        """Run calls as they are and with moved numbers, and add them with what they gave, which is returned."""
        variants = [dict(self.tensors), *(self._moved(calls[0].state) for _ in range(TIMES))]
        for values in variants:
            for call in calls:
                _run(self.runner, call, values)
        values, *others = variants

        def moved(value: str) -> float:
            return ROUNDING * max(_apart(other[value], values[value]) for other in others)

        for call in calls:
            expected = expect(call.name, values, others, moved)
            self.tensors |= {one.wanted: values[one.value] for one in expected}
            self.calls.append(dataclasses.replace(call, expected=tuple(expected)))
        return values

    def _outputs(self, name: str, values: Values, others: list[Values], moved: Moved) -> list[Expected]:
        """Every output by its largest difference and, where all of it is finite, by the norm of it."""
        expected = []
        for value in _outputs_of(name, values):
            found, wanted = values[value], f"wanted {value}"
            if not found.is_floating_point():
                expected.append(Expected(value, wanted, OTHERS, INTEGERS))
                continue
            largest = max(1.0, float(found[found.isfinite()].abs().max())) if bool(found.isfinite().any()) else 1.0
            expected.append(Expected(value, wanted, LARGEST, OUTPUT_TOLERANCE * largest + moved(value)))
            if bool(found.isfinite().all()):
                apart = max(float((other[value] - found).norm()) for other in others)
                most = OUTPUT_TOLERANCE * float(found.norm()) + ROUNDING * apart
                expected.append(Expected(value, wanted, NORM, most))
        return expected

    def _add_prefix(self) -> list[str]:
        """What the prefix returns is a function of the rows alone, so that moved numbers tell nothing of it."""

        def expect(name: str, values: Values, others: list[Values], moved: Moved) -> list[Expected]:
            expected = self._outputs(name, values, others, moved)
            if not self._rounds():
                return expected
            return [
                dataclasses.replace(one, tolerance=ROUNDED_START * float(values[one.value].norm()))
                for one in expected
                if one.measure == NORM
            ]

        values = self._add(expect, _call("prefix", "prefix", [*self.inputs, "labels"]))
        return [self._start(value, values) for value in _outputs_of("prefix", values)]

    def _start(self, value: str, values: Values) -> str:
        """A step starts from what the prefix gave where the bundle was made."""
        self.tensors[f"wanted {value}"] = values[value]
        return f"wanted {value}"

    def _rounds(self) -> bool:
        described = json.loads(self.manifest.quantization or "null")
        return described is not None and described.get("recipe", "of torchao") in (*ROUND_ACTIVATIONS, "of torchao")

    def _add_step(self, starts: list[str], state: str, step: int) -> str:
        """A step from a state, and its replay; the name of the state behind it."""
        behind = f"_{step}" if step else ""
        zo, seed, name = self.manifest.zo, f"seed{behind}", f"step{behind}"
        self.tensors[seed] = torch.tensor([SEED + step], dtype=torch.int32)
        call = Call(name, "train_step", state, (*starts, "labels", seed, "learning_rate", "eps"), ())
        values = self._add(functools.partial(self._step, state), call)
        after = values[f"{name}/state"]
        if zo.differentiates:
            return f"wanted {name}/state"
        share = ARITHMETIC if self.manifest.rule["name"] == "sgd" else UPDATE_TOLERANCE
        start = self.tensors[state]
        # An update agrees to the last bits of its sum over directions, and to those of the state that it is added to.
        allowed = share * float((after - start).norm()) + 2.0**-23 * float(start.norm())
        replayed, again = f"replayed{behind}", f"again{behind}"
        self.tensors[f"wanted {replayed}/state"] = after
        wanted = Expected(f"{replayed}/state", f"wanted {replayed}/state", NORM, allowed)
        self.calls.append(Call(replayed, "replay", state, (seed, f"wanted {name}/2", "learning_rate"), (wanted,)))
        same = Expected(f"{again}/state", f"{name}/state", LARGEST, 0.0)  # a step and its replay, both there
        self.calls.append(Call(again, "replay", state, (seed, f"{name}/2", "learning_rate"), (same,)))
        return wanted.wanted

    def _step(self, state: str, name: str, values: Values, others: list[Values], moved: Moved) -> list[Expected]:
        """Losses up to rounding; a projected gradient up to that of two losses; a gradient and its step by norm."""
        zo, start = self.manifest.zo, self.tensors[state]
        losses, gradient = values[f"{name}/1"], values[f"{name}/2"]
        size = max(1.0, float(losses.nan_to_num(posinf=0, neginf=0).abs().max()))
        lane = LOSS_TOLERANCE * size + moved(f"{name}/1")
        largest = float(gradient.abs().max())
        if zo.measures:
            steep = slope(losses, self.manifest.eps, zo.normalize) * (1 + largest * zo.normalize)
            allowed = 2 * LOSS_TOLERANCE * size * steep + ARITHMETIC * (1 + largest)
        else:
            allowed = GRADIENT_TOLERANCE * largest
        allowed += moved(f"{name}/2")
        found = [("0", lane), ("1", lane), ("2", allowed)]
        expected = [Expected(f"{name}/{n}", f"wanted {name}/{n}", LARGEST, most) for n, most in found]
        if not zo.differentiates:
            return expected
        change = values[f"{name}/state"] - start
        apart = max(float((other[f"{name}/state"] - other[state] - change).norm()) for other in others)
        share = GRADIENT_TOLERANCE + (UPDATE_TOLERANCE if self.manifest.memory or zo.measures else 0.0)
        most = share * float(change.norm()) + ROUNDING * apart
        return [*expected, Expected(f"{name}/state", f"wanted {name}/state", NORM, most)]

    def _add_generation(self, generation: Generation) -> None:
        """A prompt at once, then a token behind it, from the cache that the prompt has left."""
        count = min(PROMPT, generation.context - 2)
        tokens = (torch.arange(count + 1) * 7919 + 11) % generation.vocabulary
        calls = []
        for name, first, end in (("prompt", 0, count), ("next", count, count + 1)):
            self.tensors[f"{name}_tokens"] = tokens[first:end].reshape(1, -1).contiguous()
            self.tensors[f"{name}_positions"] = torch.arange(first, end)
            calls.append(_call(name, "forward", [f"{name}_tokens", f"{name}_positions"]))
        self._add(self._outputs, *calls)


def _call(name: str, method: str, arguments: Sequence[str]) -> Call:
    return Call(name, method, "start", tuple(arguments), ())


def _outputs_of(name: str, values: Values) -> list[str]:
    """What a call gave, without the state."""
    return [value for value in values if value.startswith(f"{name}/") and not value.endswith("/state")]


def _apart(found: Tensor, wanted: Tensor) -> float:
    both = found.isfinite() & wanted.isfinite()
    return float((found[both] - wanted[both]).abs().max()) if bool(both.any()) else 0.0
