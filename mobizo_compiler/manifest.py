"""The manifest: what a program says about itself, as JSON inside the program file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mobizo_compiler.config import LoraConfig, ZOConfig
from mobizo_compiler.errors import ArtifactError, InputError, TokenRangeError
from mobizo_compiler.program import Site

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input of a method: its name, dtype and shape, and, for token ids, the range of its values.

    Args:
        name: Name of the argument.
        dtype: As in `torch.<dtype>`.
        shape: Sizes.
        low: Smallest value allowed, None if any is.
        high: Largest value allowed.
        also: One value outside the range that is allowed too (the label that does not count).
        choices: The values allowed, where they are few.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    low: int | None = None
    high: int | None = None
    also: int | None = None
    choices: tuple[int, ...] | None = None

    def check(self, value: object) -> Tensor:
        """The value as a contiguous CPU tensor; an `InputError` says what is wrong with it."""
        if not isinstance(value, Tensor):
            raise InputError(f"input {self.name!r} is a {type(value).__name__}, not a tensor")
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype != self.dtype:
            raise InputError(
                f"input {self.name!r} has dtype {dtype}, the program takes {self.dtype}",
                hint=f"{self.name}.to(torch.{self.dtype})",
            )
        if tuple(value.shape) != self.shape:
            raise InputError(
                f"input {self.name!r} has shape {list(value.shape)}, the program takes {list(self.shape)}",
                hint="shapes are fixed when compiling: pad to this shape, or compile with other example_inputs",
            )
        if self.low is not None and self.high is not None:
            outside = (value < self.low) | (value > self.high)
            allowed = f"{self.low}..{self.high}"
            if self.choices is not None:
                outside = ~torch.isin(value, torch.tensor(self.choices))
                allowed = str(list(self.choices))
            if self.also is not None:
                outside &= value != self.also
            if bool(outside.any()):
                place = [int(i) for i in outside.nonzero()[0]]
                raise TokenRangeError(
                    f"input {self.name!r} has the value {int(value[tuple(place)])} at {place}, "
                    f"outside {allowed}" + ("" if self.also is None else f" (or {self.also})")
                )
        return value.detach().to("cpu").contiguous()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything a host needs to call the program.

    Args:
        backend: Name of the backend that lowered it.
        versions: Versions of the packages that made it.
        inputs: The model's inputs.
        keywords: Whether the model's inputs are passed by name.
        labels: The labels of `train_step`.
        outputs: The model's outputs, in flat order.
        out_spec: How they nest, as PyTorch's pytree JSON; None if that cannot be written down.
        sites: Adapter sites.
        lora: Adapter options.
        zo: Estimator options.
        loss: The loss, as text.
        first_label: Labels before this position of a row never count.
        max_labels: How many labels of a row may count; None if all may.
        format_version: Version of this format; see `docs/program_format.md`.
    """

    backend: str
    versions: Mapping[str, str]
    inputs: tuple[TensorSpec, ...]
    keywords: bool
    labels: TensorSpec
    outputs: tuple[TensorSpec, ...]
    out_spec: str | None
    sites: tuple[Site, ...]
    lora: LoraConfig
    zo: ZOConfig
    loss: str
    first_label: int = 0
    max_labels: int | None = None
    format_version: int = FORMAT_VERSION

    @property
    def parameters(self) -> int:
        """Number P of trained parameters."""
        return sum(site.size for site in self.sites)

    def to_json(self) -> str:
        """JSON text with sorted keys: the same manifest gives the same bytes."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Inverse of `to_json`; an `ArtifactError` names `where` if the text is no manifest of this version."""
        try:
            values = json.loads(text)
            version = values["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"the manifest cannot be read: {error!r}", where=where) from None
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"the program has format {version}, this version reads format {FORMAT_VERSION}",
                where=where,
                hint="compile the model again, or install the version that made the file: "
                + str(values.get("versions")),
            )
        try:
            specs: dict[str, Any] = {n: tuple(_spec(item) for item in values.pop(n)) for n in ("inputs", "outputs")}
            sites = tuple(Site(**item) for item in values.pop("sites"))
            labels = _spec(values.pop("labels"))
            lora, zo = LoraConfig.from_json(values.pop("lora")), ZOConfig.from_json(values.pop("zo"))
            return cls(**values, **specs, sites=sites, labels=labels, lora=lora, zo=zo)
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"the manifest lacks or has unknown fields: {error!r}", where=where) from None


def _spec(item: dict[str, Any]) -> TensorSpec:
    tuples = {name: tuple(item[name]) for name in ("shape", "choices") if item.get(name) is not None}
    return TensorSpec(**{**item, **tuples})


def tensor_spec(name: str, value: Tensor, **limits: Any) -> TensorSpec:
    """The spec of a (fake) tensor.

    >>> tensor_spec("ids", torch.zeros(2, 3))
    TensorSpec(name='ids', dtype='float32', shape=(2, 3), low=None, high=None, also=None, choices=None)
    """
    return TensorSpec(name, str(value.dtype).removeprefix("torch."), tuple(int(s) for s in value.shape), **limits)
