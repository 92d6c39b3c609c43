"""Whether an adapter is really active: the model's answer to a fixed input, without it and with it, in a few numbers.

The input follows from what the program says of its inputs: token ids spread over their range, masks of ones, waves for
other numbers. The answer is the last row of every output, projected on eight directions of signs, so that a change of
any of their numbers shows.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mobizo_compiler.errors import AdapterError
from mobizo_compiler.format.manifest import Manifest, TensorSpec
from mobizo_compiler.step.noise import noise_values

NUMBERS = 8
LARGEST = 1e30  # what is larger, or infinite, or no number, counts as 0: a mask among the outputs, say
_DEFINITION = "probe 2"  # of input and answer; others are not compared
_MOST_APART = 0.5  # of what an adapter does: more than a recipe of quantization changes, less than another adapter
_ROUNDING = 1e-6  # of the answer


@dataclasses.dataclass(frozen=True)
class Probe:
    """An answer of the model in eight numbers.

    Args:
        base: Without the adapter.
        adapted: With it.
        asked: CRC-32 of what describes the input. Probes of programs that take other inputs, of more tokens say, are
            of other questions, and are not compared.
    """

    base: tuple[float, ...]
    adapted: tuple[float, ...]
    asked: int = 0

    @property
    def effect(self) -> float:
        """How far the adapter moves the answer, as a share of its length; 0 if it does nothing.

        >>> Probe((3.0, 4.0), (3.0, 4.5)).effect
        0.1
        """
        return math.dist(self.base, self.adapted) / max(math.hypot(*self.base), 1e-30)

    def to_json(self) -> str:
        """The numbers as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str, where: str) -> Probe:
        """Inverse of `to_json`; an `AdapterError` names `where` if the text is none."""
        try:
            values = json.loads(text)
            base, adapted = (tuple(map(float, values[name])) for name in ("base", "adapted"))
            return cls._checked(base, adapted, int(values.get("asked", 0)))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise AdapterError(f"the probe of the adapter cannot be read: {error!r}", where=where) from None

    def tensor(self) -> Tensor:
        """The numbers, float64 [17]: `asked`, then `base`, then `adapted`."""
        return torch.tensor([self.asked, *self.base, *self.adapted], dtype=torch.float64)

    @classmethod
    def from_tensor(cls, values: Tensor) -> Probe:
        """Inverse of `tensor`; raises `ValueError` where it is none."""
        if tuple(values.shape) != (1 + 2 * NUMBERS,):
            raise ValueError(f"a probe has {1 + 2 * NUMBERS} numbers, not {list(values.shape)}")
        asked, *numbers = values.tolist()
        if not math.isfinite(asked):
            raise ValueError(f"a probe is of an input, not {asked}")
        return cls._checked(tuple(numbers[:NUMBERS]), tuple(numbers[NUMBERS:]), int(asked))

    @classmethod
    def _checked(cls, base: tuple[float, ...], adapted: tuple[float, ...], asked: int) -> Probe:
        if len(base) != NUMBERS or len(adapted) != NUMBERS or not all(map(math.isfinite, (*base, *adapted))):
            raise ValueError(f"it does not have {NUMBERS} finite numbers of each kind")
        return cls(base, adapted, asked)

    def check(self, now: Probe, where: str) -> None:
        """Raise `AdapterError` where the adapter does not do now what it did when it was exported.

        How far the answers without the adapter are apart says what another engine or recipe does to them.
        """
        if now.asked != self.asked:
            return
        then = [after - before for before, after in zip(self.base, self.adapted, strict=True)]
        found = [after - before for before, after in zip(now.base, now.adapted, strict=True)]
        rounding = math.dist(self.base, now.base) + _ROUNDING * math.hypot(*self.base)
        if not math.dist(then, found) <= _MOST_APART * math.hypot(*then) + rounding:
            raise AdapterError(
                f"the adapter moves the model's answer to the probe by {now.effect:.1%} here; when it was exported, it "
                f"did so by {self.effect:.1%}, and elsewhere",
                where=where,
                hint="compile the model that it was trained on, in the precision or the recipe that it was trained in",
            )


def asked_of(specs: Sequence[TensorSpec], inputs: Sequence[Tensor]) -> int:
    """CRC-32 of what describes the input: one line for its definition, and one for every tensor of `probe_inputs`."""
    lines = [
        f"{spec.name} {spec.dtype} {' '.join(map(str, value.shape))} {spec.low} {spec.high} {list(spec.choices or ())}"
        for spec, value in zip(specs, inputs, strict=True)
    ]
    return zlib.crc32("\n".join([_DEFINITION, *lines]).encode())


def probe_inputs(manifest: Manifest) -> list[Tensor]:
    """The fixed input: the same for all programs whose inputs are the same."""
    sizes = {size.name: size.low for size in manifest.sizes}
    return [
        _input(spec, [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape])
        for spec in manifest.inputs
    ]


def _input(spec: TensorSpec, shape: Sequence[int]) -> Tensor:
    dtype = getattr(torch, spec.dtype)
    places = torch.arange(math.prod(shape)).reshape(list(shape))
    if dtype.is_floating_point:
        return torch.cos(places.to(torch.float32)).to(dtype)
    if dtype is torch.bool or "mask" in spec.name:
        return torch.ones(list(shape), dtype=dtype)
    if spec.choices is not None:
        return torch.tensor(spec.choices)[places % len(spec.choices)].to(dtype)
    if spec.low is None or spec.high is None:
        return torch.zeros(list(shape), dtype=dtype)
    return (spec.low + (places * 7919 + 11) % (spec.high - spec.low + 1)).to(dtype)


def answer_of(outputs: Sequence[Tensor]) -> tuple[float, ...]:
    """What is kept of the outputs of `evaluate`: eight projections of the last rows of those in float32."""
    counted = [value for value in outputs if value.dtype == torch.float32 and value.numel()]
    rows = [value.reshape(-1, value.shape[-1] if value.dim() else 1)[-1] for value in counted]
    if not rows:
        return (0.0,) * NUMBERS
    last = torch.cat([_tamed(row) / math.sqrt(len(row)) for row in rows])
    signs = noise_values(torch.zeros(1, dtype=torch.int32), NUMBERS, len(last), "rademacher").double()
    return tuple((signs @ last).tolist())


def _tamed(values: Tensor) -> Tensor:
    return torch.where(values.abs() <= LARGEST, values, 0.0).double()


def random_labels(manifest: Manifest, inputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Labels for these inputs, anywhere in their range, as many of a row as may count."""
    spec = manifest.labels
    known: dict[str, int] = {}
    for value, size in zip(inputs, manifest.inputs, strict=True):
        known |= {name: n for name, n in zip(size.shape, value.shape, strict=True) if isinstance(name, str)}
    shape = tuple(known[size] if isinstance(size, str) else size for size in spec.shape)
    dtype = getattr(torch, spec.dtype)
    if spec.low is None or spec.high is None:
        normal = torch.randn(shape, generator=generator)
        return normal.to(dtype) if dtype.is_floating_point else (normal > 0).to(dtype)
    labels = torch.randint(spec.low, spec.high + 1, shape, generator=generator)
    if spec.choices is not None:
        labels = torch.tensor(spec.choices)[labels % len(spec.choices)]
    if manifest.max_labels is not None and spec.also is not None:
        labels[:, : max(0, labels.shape[1] - manifest.max_labels)] = spec.also
    return labels.to(getattr(torch, spec.dtype))
