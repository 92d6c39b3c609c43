"""`Options`: what a training program is, checked once, as JSON and back.

`compile`, the command line, recipes of `executorch.export` and the pipelines share it. What is not here belongs to one
compilation: the model, its example inputs, the backend, where to write.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, Self, cast

from mobizo_compiler.compiling.insertions import get_insertion, name_of
from mobizo_compiler.config import GenerateConfig, LoraConfig, ZOConfig
from mobizo_compiler.errors import ConfigError
from mobizo_compiler.graph.pipeline import Insertion
from mobizo_compiler.options import check_int, shown
from mobizo_compiler.quantization.weights import RECIPES, QuantizationConfig, Recipe, described
from mobizo_compiler.step.estimators import AUTO, Hybrid
from mobizo_compiler.step.losses import LOSSES, CallableLoss, CausalLMLoss, Loss, get_loss
from mobizo_compiler.step.rules import PLAIN, RULES, UpdateRule, get_rule

STATES = ("shared", "data", "io")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is adapted, how the gradient is estimated, what is learnt, and how the program holds its weights and state.

    Args:
        lora: Which layers are adapted, and of what rank.
        zo: How the gradient is estimated.
        loss: A loss of `mobizo_compiler`, of another package, or its name.
        rule: What a step does with the estimate: an `UpdateRule`, or its name.
        quantization: How the frozen base weights are stored: a `QuantizationConfig`, the name of a recipe, a
            configuration of torchao, or None for as they are.
        state: "shared", "data" or "io"; see `compile`.
        split_prefix: Whether what no adapter reaches is a method of its own.
        activation_memory_bytes: The most bytes of values that an exact gradient keeps at a time; what does not fit is
            computed again. None for no limit, which is fastest.
        passes: Passes of one's own, each with its place in the pipelines, or the name of an installed one.
        generate: How the program goes on with a text; None for a program that does not.

    Raises:
        ConfigError: A field is out of range.

    >>> options = Options(rule="momentum", quantization="8da4w")
    >>> options.rule, options.quantization.table_recipe
    (Momentum(weight_decay=0.0, beta=0.9), 'int8')
    >>> Options.from_json(options.to_json()) == options
    True
    """

    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    zo: ZOConfig = dataclasses.field(default_factory=ZOConfig)
    loss: Loss = dataclasses.field(default_factory=CausalLMLoss)
    rule: UpdateRule = PLAIN
    quantization: Any = None
    state: Literal["shared", "data", "io"] = "shared"
    split_prefix: bool = False
    activation_memory_bytes: int | None = None
    passes: tuple[Insertion, ...] = ()
    generate: GenerateConfig | None = None

    def __post_init__(self) -> None:
        for name, kind in (("lora", LoraConfig), ("zo", ZOConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name} must be a {kind.__name__}, not {shown(getattr(self, name))}")
        object.__setattr__(self, "loss", get_loss(self.loss))
        object.__setattr__(self, "rule", get_rule(self.rule))
        object.__setattr__(self, "quantization", _quantization(self.quantization))
        if self.state not in STATES:
            raise ConfigError(f"state is {self.state!r}", hint='use state="shared", state="data" or state="io"')
        if not isinstance(self.split_prefix, bool):
            raise ConfigError(f"split_prefix is {self.split_prefix!r}; it must be True or False")
        if self.split_prefix and self.zo.differentiates and self.zo.measures:
            raise ConfigError(
                "split_prefix has no meaning where the first adapters are measured and the last have the gradient",
                hint='estimator="exact", or leave split_prefix out',
            )
        if self.activation_memory_bytes is not None:
            check_int("activation_memory_bytes", self.activation_memory_bytes, 1, 1 << 62)
            if not self.zo.differentiates:
                raise ConfigError(
                    f"activation_memory_bytes has no meaning for the {self.zo.estimator} estimator: it keeps nothing",
                    hint='leave it out, or ZOConfig(estimator="exact")',
                )
        elif isinstance(self.zo.estimator, Hybrid) and self.zo.estimator.exact_from == AUTO:
            raise ConfigError(
                f'exact_from is "{AUTO}", and activation_memory_bytes is not given, which decides how far it goes',
                hint="activation_memory_bytes=64_000_000, or a block: exact_from=-4",
            )
        if self.generate is not None and not isinstance(self.generate, GenerateConfig):
            raise ConfigError(f"generate must be a GenerateConfig or None, not {shown(self.generate)}")
        if self.generate is not None and self.state == "io":
            raise ConfigError(
                "generate and state='io' exclude each other: whoever calls forward has no place for the state",
                hint="state='data', with the adapter in a .ptd beside the program",
            )
        passes = (self.passes,) if isinstance(self.passes, (Insertion, str)) else self.passes
        object.__setattr__(self, "passes", tuple(map(get_insertion, passes)))

    def to_json(self) -> dict[str, Any]:
        """The fields as values that `json.dumps` takes.

        Raises:
            ConfigError: A field has no name that another process could find it by, as a loss that is a function.
        """
        if isinstance(self.loss, CallableLoss):
            raise ConfigError(f"the loss {self.loss!r} has no name that another process could find it by")
        text = described(self.quantization)
        return {
            "lora": self.lora.to_json(),
            "zo": self.zo.to_json(),
            "loss": LOSSES.described(self.loss),
            "rule": RULES.described(self.rule),
            "quantization": None if text is None else json.loads(text),
            "state": self.state,
            "split_prefix": self.split_prefix,
            "activation_memory_bytes": self.activation_memory_bytes,
            "passes": [name_of(own) for own in self.passes],
            "generate": None if self.generate is None else self.generate.to_json(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; fields that are missing have their defaults.

        Raises:
            ConfigError: A key is not a field, or a field is out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"Options has no field {unknown[0]!r}", hint=f"its fields are {', '.join(sorted(known))}")
        found = dict(values)
        for name, kind in (("lora", LoraConfig), ("zo", ZOConfig), ("generate", GenerateConfig)):
            if found.get(name) is not None:
                found[name] = kind.from_json(found[name])
        return cls(**found)


def _quantization(value: Any) -> Any:
    """None, a `QuantizationConfig`, or a configuration of torchao."""
    if value is None or isinstance(value, QuantizationConfig):
        return value
    if isinstance(value, str):
        return QuantizationConfig(cast(Recipe, value))
    from torchao.core.config import AOBaseConfig, config_from_dict

    if isinstance(value, AOBaseConfig):
        return value
    if isinstance(value, Mapping):
        try:
            return config_from_dict(value["torchao"]) if "torchao" in value else QuantizationConfig.from_json(value)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"quantization is {value!r}: {error}") from None
    raise ConfigError(
        f"quantization is {shown(value)}",
        hint=f"use None, one of {', '.join(RECIPES)}, a QuantizationConfig, or a configuration of torchao",
    )
