"""The manifest: what a program says about itself, as JSON inside the program file."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from mobizo_compiler.config import LoraConfig, ZOConfig
from mobizo_compiler.errors import (
    ArtifactError,
    ExtensionUnavailableError,
    InputError,
    TokenRangeError,
    UnknownExtensionError,
)
from mobizo_compiler.format.vocabulary import Vocabulary
from mobizo_compiler.graph.program import DynamicSize, Nesting
from mobizo_compiler.options import JsonConfig
from mobizo_compiler.step.sites import Site
from mobizo_compiler.upstream import pytree

FORMAT_VERSION = 12


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input of a method: its name, dtype and shape, and, for token ids, the range of its values.

    Args:
        name: Name of the argument.
        dtype: As in `torch.<dtype>`.
        shape: Sizes; the name of a dynamic size stands for it.
        low: Smallest value allowed, None if any is.
        high: Largest value allowed.
        also: One value outside the range that is allowed too (the label that does not count).
        choices: The values allowed, where they are few.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    low: int | None = None
    high: int | None = None
    also: int | None = None
    choices: tuple[int, ...] | None = None

    def check(self, value: object, sizes: Mapping[str, DynamicSize], found: dict[str, int]) -> Tensor:
        """The value as a contiguous CPU tensor; an `InputError` says what is wrong with it.

        Args:
            value: What the user passed.
            sizes: The dynamic sizes of the program by name.
            found: What they are in this call; this input's are added.
        """
        if not isinstance(value, Tensor):
            raise InputError(f"input {self.name!r} is a {type(value).__name__}, not a tensor")
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype != self.dtype:
            raise InputError(
                f"input {self.name!r} has dtype {dtype}, the program takes {self.dtype}",
                hint=f"{self.name}.to(torch.{self.dtype})",
            )
        self._check_shape(tuple(value.shape), sizes, found)
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

    def _check_shape(self, shape: tuple[int, ...], sizes: Mapping[str, DynamicSize], found: dict[str, int]) -> None:
        named = {axis: name for axis, name in enumerate(self.shape) if isinstance(name, str)}
        fixed = [size for axis, size in enumerate(shape) if axis not in named]
        if len(shape) != len(self.shape) or fixed != [size for size in self.shape if not isinstance(size, str)]:
            raise InputError(
                f"input {self.name!r} has shape {list(shape)}, the program takes [{', '.join(map(str, self.shape))}]",
                hint="shapes are fixed when compiling: pad to this shape, or compile with other example_inputs or with "
                "dynamic_shapes",
            )
        for axis, name in named.items():
            size, allowed = shape[axis], sizes[name]
            if not allowed.low <= size <= allowed.high:
                raise InputError(f"input {self.name!r} has {name} = {size}, outside {allowed.low}..{allowed.high}")
            if found.setdefault(name, size) != size:
                raise InputError(f"input {self.name!r} has {name} = {size}, an input before it has {found[name]}")


@dataclasses.dataclass(frozen=True)
class SavedWeight:
    """A weight that the base model lacks, so that it travels with exported adapters.

    Args:
        shape: Sizes.
        data: float32, little-endian, row-major, in base64.
    """

    shape: tuple[int, ...]
    data: str

    @classmethod
    def of(cls, weight: Tensor) -> SavedWeight:
        """The weight as text."""
        values = weight.detach().to("cpu", torch.float32).contiguous()
        return cls(tuple(values.shape), base64.b64encode(values.numpy().astype("<f4").tobytes()).decode("ascii"))

    def tensor(self) -> Tensor:
        """The weight, float32.

        >>> SavedWeight.of(torch.tensor([[1.0, -2.0]])).tensor()
        tensor([[ 1., -2.]])
        """
        data = bytearray(base64.b64decode(self.data))
        return torch.frombuffer(data, dtype=torch.float32).reshape(self.shape).clone()


@dataclasses.dataclass(frozen=True)
class Generation(JsonConfig):
    """What the method `forward` takes: tokens int64 [1, T] and their positions int64 [T], for T in 1..context-1.

    Args:
        context: Tokens that the cache has room for.
        vocabulary: Tokens are below this.
        stop_ids: Tokens that end a text.
        all_logits: Whether it returns logits [1, T, vocabulary], in place of [1, 1, vocabulary], of the last token.
    """

    context: int
    vocabulary: int
    stop_ids: tuple[int, ...] = ()
    all_logits: bool = False


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything a host needs to call the program.

    Args:
        backend: Name of the backend that lowered it.
        versions: Versions of the packages that made it.
        inputs: The model's inputs.
        keywords: Whether the model's inputs are passed by name.
        labels: The labels of `train_step`.
        fixed: Inputs that are no tensors, as text: the capture fixed them.
        sizes: The dynamic sizes.
        outputs: The model's outputs, in flat order.
        nesting: How they nest, as JSON; None if that cannot be written down.
        sites: Adapter sites.
        lora: Adapter options.
        zo: Estimator options. Its estimator need not be registered where the program is loaded.
        lanes: How many copies of every row a step runs.
        prefix: What `prefix` returns and `train_step` takes in place of the model's inputs; empty without `prefix`.
        rule: Update rule: its name, and its options by name; `get_rule` makes it again.
        memory: How many numbers of the state the rule remembers.
        memory_start: What they are before the first step, as runs of equal numbers (how many, and which); empty for
            zeros.
        loss: The loss: its name, and its options by name; `get_loss` makes it again, unless it was a function.
        model: SHA-256 of the model's weights before they were quantized, in hexadecimal.
        weights: CRC-32 of the values of each of them, by name; see `checksum.of_values`.
        state: "shared", a buffer that all methods share; "data", the same, with its initial value in a data file; or
            "io", the last input and output of every method.
        quantization: How the base weights were quantized when the program was compiled, as JSON; None if they were not.
        activation_memory_bytes: The bound on what a step keeps for its gradient; None if there is none.
        eps: Size of the perturbation that suits this program.
        first_label: Labels before this position of a row never count.
        max_labels: How many labels of a row may count; None if all may.
        base_model: Name or folder of the model, for those who load its tokenizer or the adapter; None if not told.
        answers: Names of the classes, or of the choices, in their order; None if not told.
        padding: The token that the model takes for padding; None if it has none, or does not tell.
        tokenizer: Name or folder of the tokenizer, where it is not that of `base_model`; None if not told.
        vocabulary: How many tokens the model's tokenizer has, and a checksum of them; None if not told.
        prompt: How rows become prompts where nothing else is said, as JSON of `PromptConfig`; None if not told.
        saved: Weights of the model that its folder lacks (a head that was drawn), by name.
        generate: How the method `forward` goes on with a text; None without it.
        history: The passes that made each method, in order, as text.
        outline: The model as blocks, for people.
        format_version: Version of this format; see `docs/program_format.md`.
    """

    backend: str
    versions: Mapping[str, str]
    inputs: tuple[TensorSpec, ...]
    keywords: bool
    fixed: Mapping[str, str]
    sizes: tuple[DynamicSize, ...]
    labels: TensorSpec
    outputs: tuple[TensorSpec, ...]
    nesting: str | None
    sites: tuple[Site, ...]
    lora: LoraConfig
    zo: ZOConfig
    loss: Mapping[str, Any]
    lanes: int
    prefix: tuple[TensorSpec, ...] = ()
    rule: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "sgd"})
    memory: int = 0
    memory_start: tuple[tuple[int, float], ...] = ()
    model: str = ""
    weights: Mapping[str, int] = dataclasses.field(default_factory=dict)
    state: str = "shared"
    quantization: str | None = None
    activation_memory_bytes: int | None = None
    eps: float = 1e-2
    first_label: int = 0
    max_labels: int | None = None
    base_model: str | None = None
    answers: tuple[str, ...] | None = None
    padding: int | None = None
    tokenizer: str | None = None
    vocabulary: Vocabulary | None = None
    prompt: Mapping[str, Any] | None = None
    saved: Mapping[str, SavedWeight] = dataclasses.field(default_factory=dict)
    generate: Generation | None = None
    history: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    outline: tuple[Block, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def parameters(self) -> int:
        """Number P of trained parameters."""
        return sum(site.trained for site in self.sites)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that a session calls."""
        replay = [] if self.zo.differentiates else ["replay"]
        prefix = ["prefix", "row_losses"] if self.prefix else []
        forward = [] if self.generate is None else ["forward"]
        return ("train_step", "evaluate", *replay, *prefix, *forward)

    def initial_memory(self) -> Tensor:
        """What the rule remembers before the first step, float32 [memory]."""
        runs = [torch.full((count,), value) for count, value in self.memory_start]
        return torch.cat(runs) if runs else torch.zeros(self.memory)

    @property
    def state_size(self) -> int:
        """Length S of the flat state: the trained parameters, then what the update rule remembers."""
        return self.parameters + self.memory

    def to_json(self) -> str:
        """JSON text with sorted keys: the same manifest gives the same bytes."""
        return json.dumps(self.described(), sort_keys=True)

    def described(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**dataclasses.asdict(self), "zo": self.zo.to_json()}

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
            specs: dict[str, Any] = {
                n: tuple(_spec(item) for item in values.pop(n)) for n in ("inputs", "outputs", "prefix")
            }
            sites = tuple(
                Site(**{**item, **{key: tuple(item[key]) for key in ("kernel", "outputs")}})
                for item in values.pop("sites")
            )
            sizes = tuple(DynamicSize(**item) for item in values.pop("sizes"))
            labels = _spec(values.pop("labels"))
            values["memory_start"] = tuple((int(n), float(v)) for n, v in values.pop("memory_start", ()))
            lora, zo = LoraConfig.from_json(values.pop("lora")), _zo(values.pop("zo"), values["lanes"])
            history = {name: tuple(steps) for name, steps in values.pop("history", {}).items()}
            answers = values.pop("answers", None)
            generate, vocabulary = values.pop("generate", None), values.pop("vocabulary", None)
            weights = values.pop("saved", {})
            saved = {name: SavedWeight(tuple(item["shape"]), item["data"]) for name, item in weights.items()}
            blocks = tuple(Block.from_json(item) for item in values.pop("outline", ()))
            return cls(
                **values,
                **specs,
                sites=sites,
                sizes=sizes,
                labels=labels,
                lora=lora,
                zo=zo,
                answers=None if answers is None else tuple(answers),
                vocabulary=None if vocabulary is None else tuple(vocabulary),
                saved=saved,
                generate=None if generate is None else Generation.from_json(generate),
                history=history,
                outline=blocks,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"the manifest lacks or has unknown fields: {error!r}", where=where) from None


class _Foreign(ZOConfig):
    """Options whose estimator is not installed here: the graph has all of it, and its name is kept."""

    def __post_init__(self) -> None:
        """What it asks of the other options was checked when the program was compiled."""

    @property
    def lanes(self) -> int:
        """As the manifest has it."""
        return int(self.__dict__["_lanes"])

    @property
    def differentiates(self) -> bool:
        """Where there is one lane, nothing can be compared."""
        return self.lanes == 1


def _zo(values: Mapping[str, Any], lanes: int) -> ZOConfig:
    try:
        return ZOConfig.from_json(values)
    except (UnknownExtensionError, ExtensionUnavailableError):
        foreign = _Foreign.from_json(values)
        object.__setattr__(foreign, "_lanes", lanes)
        return foreign


def _spec(item: dict[str, Any]) -> TensorSpec:
    tuples = {name: tuple(item[name]) for name in ("shape", "choices") if item.get(name) is not None}
    return TensorSpec(**{**item, **tuples})


def nesting_to_json(nesting: Nesting) -> str | None:
    """How outputs nest, as JSON text; None where a class of its own has no name that can be written down."""
    try:
        fixed = {str(position): value for position, value in nesting.fixed.items()}
        return json.dumps({"spec": pytree.treespec_dumps(nesting.spec), "fixed": fixed})
    except (NotImplementedError, TypeError):
        return None


def nesting_from_json(text: str) -> Nesting:
    """Inverse of `nesting_to_json`; raises `NotImplementedError` where a class is unknown here."""
    values = json.loads(text)
    fixed = {int(position): value for position, value in values["fixed"].items()}
    return Nesting(pytree.treespec_loads(values["spec"]), fixed)


def tensor_spec(
    name: str, value: Tensor, dynamic: Mapping[str, DynamicSize] = MappingProxyType({}), **limits: Any
) -> TensorSpec:
    """The spec of a (fake) tensor.

    Args:
        name: Name of the argument.
        value: The tensor.
        dynamic: Dynamic sizes by symbol.
        limits: Range of the values; see `TensorSpec`.

    >>> tensor_spec("ids", torch.zeros(2, 3))
    TensorSpec(name='ids', dtype='float32', shape=(2, 3), low=None, high=None, also=None, choices=None)
    """

    def size(value: Any) -> int | str:
        if isinstance(value, int):
            return value
        text = str(value.node.expr)
        return dynamic[text].name if text in dynamic else text

    shape = tuple(size(s) for s in value.shape)
    return TensorSpec(name, str(value.dtype).removeprefix("torch."), shape, **limits)


Lanes = Literal["none", "some", "all"]


@dataclasses.dataclass(frozen=True)
class Block:
    """A module, or a run of alike layers.

    Args:
        name: Path of the module, with a star for the index of layers that are alike.
        kind: Class of the module.
        count: How many there are.
        calls: Operators of the captured graph in all of them.
        multiply_adds: Of the products among them, for the rows of one call.
        parameter_bytes: Of the weights that they are the first to use, as captured.
        adapters: Adapted layers by the last name of their path.
        lanes: Whether the training step computes it for the rows alone, or for every lane, or begins lanes in it.
    """

    name: str
    kind: str
    count: int
    calls: int
    multiply_adds: int
    parameter_bytes: int
    adapters: Mapping[str, int]
    lanes: Lanes

    @property
    def alike(self) -> bool:
        """Whether all layers of the block have the same adapters."""
        return set(self.adapters.values()) <= {self.count}

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The adapted layers, each with its number where layers are not alike."""
        return tuple(name if self.alike else f"{count} x {name}" for name, count in self.adapters.items())

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Block:
        """Inverse of `dataclasses.asdict`."""
        return cls(**values)
