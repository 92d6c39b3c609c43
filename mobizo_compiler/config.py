"""Options of the compiler: frozen, validated dataclasses that go to JSON and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

from mobizo_compiler.errors import ConfigError
from mobizo_compiler.options import MAX_SEED, JsonConfig, check_int, float32_problem
from mobizo_compiler.step.estimators import ESTIMATORS, Estimator, get_estimator

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class LoraConfig(JsonConfig):
    """Which layers get a low-rank adapter, and of what rank. Fields mean what peft's `LoraConfig` means.

    The adapter is LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): A is drawn once and frozen, only B is trained;
    with `train_a` it is LoRA (Hu et al. 2021), which has more to learn, and more directions to look in.

    Args:
        r: Rank of the adapters.
        lora_alpha: The branch is scaled by `lora_alpha / r`.
        target_modules: Names matched at the end of a module's path, or one regular expression that must match the
            whole path, or "all-linear" for every layer but the output layer. If None, the layers that make the
            queries and the values of attention, as the graph says, and "all-linear" where there is no attention.
        layers_to_transform: Index or indices of layers to adapt; all layers if None. The index is the number after
            the last `layers`, `h`, `blocks`, ... in the path, as in peft.
        layers_pattern: The name before the index, where it is not a common one.
        init_seed: Seed of A (Kaiming-uniform with a = sqrt 5); B starts at zero.
        train_a: Whether A is trained too.

    Raises:
        ConfigError: A field is out of range.

    >>> LoraConfig(r=4, lora_alpha=8).scaling
    2.0
    >>> LoraConfig.from_json(LoraConfig(r=4).to_json()) == LoraConfig(r=4)
    True
    """

    r: int = 8
    lora_alpha: float = 16
    target_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: str | None = None
    init_seed: int = 0
    train_a: bool = False

    def __post_init__(self) -> None:
        check_int("LoraConfig.r", self.r, 1, 65536)
        if problem := float32_problem(self.lora_alpha):
            raise ConfigError(f"LoraConfig.lora_alpha is {self.lora_alpha!r}; {problem}")
        if not self.lora_alpha > 0 or float32_problem(self.scaling):
            raise ConfigError(f"LoraConfig.lora_alpha is {self.lora_alpha!r}; it must be a number above 0")
        check_int("LoraConfig.init_seed", self.init_seed, 0, MAX_SEED)
        if not isinstance(self.train_a, bool):
            raise ConfigError(f"LoraConfig.train_a is {self.train_a!r}; it must be True or False")
        if self.target_modules is None:
            pass
        elif isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ConfigError(f"LoraConfig.target_modules is not a regular expression: {error}") from None
        else:
            object.__setattr__(self, "target_modules", _strings("LoraConfig.target_modules", self.target_modules))
        layers: Any = self.layers_to_transform
        if layers is not None:
            layers = (layers,) if isinstance(layers, int) else tuple(layers)
            for layer in layers:
                check_int("LoraConfig.layers_to_transform", layer, 0, MAX_SEED)
            if not layers:
                raise ConfigError("LoraConfig.layers_to_transform is empty", hint="None adapts every layer")
            object.__setattr__(self, "layers_to_transform", layers)

    @property
    def scaling(self) -> float:
        """The factor of the branch, `lora_alpha / r`."""
        return self.lora_alpha / self.r

    def matches(self, fqn: str) -> bool:
        """Whether the module at path `fqn` is a target (peft, `tuners_utils.check_target_module_exists`).

        >>> LoraConfig(target_modules=("q_proj",), layers_to_transform=(1,)).matches("model.layers.1.self_attn.q_proj")
        True
        >>> LoraConfig(target_modules=("q_proj",), layers_to_transform=(1,)).matches("model.layers.0.self_attn.q_proj")
        False
        """
        assert self.target_modules is not None and self.target_modules != ALL_LINEAR, "not resolved yet"
        if isinstance(self.target_modules, str):
            if not re.fullmatch(self.target_modules, fqn):
                return False
        elif not any(fqn == name or fqn.endswith("." + name) for name in self.target_modules):
            return False
        if self.layers_to_transform is None:
            return True
        before = re.escape(self.layers_pattern) if self.layers_pattern else r"[^.]*"
        index = re.match(rf".*\.{before}\.(\d+)\.", "." + fqn)
        return index is not None and int(index.group(1)) in self.layers_to_transform


@dataclasses.dataclass(frozen=True)
class GenerateConfig(JsonConfig):
    """How a program goes on with a text: with a cache of keys and values, one row at a time.

    Args:
        context: Most tokens of a prompt and what is generated for it, for which the cache has room.
        stop_ids: Tokens that end a text; if None, those that the model's generation configuration names.
        all_logits: Whether a call returns the logits of every token that it is given, in place of the last one's.

    Raises:
        ConfigError: A field is out of range.

    >>> GenerateConfig.from_json(GenerateConfig(context=64, stop_ids=(2,)).to_json())
    GenerateConfig(context=64, stop_ids=(2,), all_logits=False)
    """

    context: int = 1024
    stop_ids: tuple[int, ...] | None = None
    all_logits: bool = False

    def __post_init__(self) -> None:
        check_int("GenerateConfig.context", self.context, 8, 1 << 20)
        stops: Any = self.stop_ids
        if stops is not None:
            stops = (stops,) if isinstance(stops, int) else tuple(stops)
            for token in stops:
                check_int("GenerateConfig.stop_ids", token, 0, MAX_SEED)
            object.__setattr__(self, "stop_ids", stops)
        if not isinstance(self.all_logits, bool):
            raise ConfigError(f"GenerateConfig.all_logits is {self.all_logits!r}; it must be True or False")


def _strings(name: str, value: Sequence[str]) -> tuple[str, ...]:
    try:
        strings = tuple(value)
    except TypeError:
        strings = ()
    if not strings or not all(isinstance(item, str) and item for item in strings):
        raise ConfigError(f"{name} must be a regular expression or a sequence of names, not {value!r}")
    return strings


@dataclasses.dataclass(frozen=True)
class ZOConfig(JsonConfig):
    """How the gradient is estimated (MobiZO, section 3; SPSA, Spall 1992).

    Args:
        queries: Number q of random directions z per step (the outer loop).
        estimator: "two-sided", 2q lanes: (L(B + eps z) - L(B - eps z)) / (2 eps) for each direction; "one-sided", q + 1
            lanes: (L(B + eps z) - L(B)) / eps; "exact", one lane and the gradient itself, which takes the memory of
            what is kept for it (then `queries` is 1, and `noise` is not used); "hybrid", that for the last blocks and
            "two-sided" for those before; or the name of an installed estimator, or an `Estimator` with its options.
            One without options is kept as its name.
        noise: Distribution of z, "gaussian" or "rademacher".
        normalize: Divide the projected gradient by the standard deviation of the lane losses over eps (FZOO), so that
            a learning rate means the same whatever the size of the loss.
        clip: Largest size of an entry of the projected gradient, or, of an exact one, largest length of the gradient;
            None for no limit.
        row_losses: Let a step return the loss of every row in every lane as well, for `Session.finetune_privately`.

    Raises:
        ConfigError: A field is out of range.

    >>> ZOConfig(queries=4).lanes, ZOConfig(queries=4, estimator="one-sided").lanes
    (8, 5)
    """

    queries: int = 4
    estimator: str | Estimator = "two-sided"
    noise: Literal["gaussian", "rademacher"] = "gaussian"
    normalize: bool = False
    clip: float | None = None
    row_losses: bool = False

    def __post_init__(self) -> None:
        check_int("ZOConfig.queries", self.queries, 1, 1024)
        estimator = get_estimator(self.estimator)
        name = self.estimator if isinstance(self.estimator, str) else ESTIMATORS.name_of(type(estimator))
        object.__setattr__(self, "estimator", estimator if dataclasses.fields(estimator) else name)
        if not self.measures:
            object.__setattr__(self, "queries", 1)
            if self.normalize:
                raise ConfigError(
                    f"ZOConfig.normalize has no meaning for the {name} estimator: there is no spread of losses",
                    hint='leave it out; rule="adam" makes steps independent of the size of the loss',
                )
        if self.noise not in ("gaussian", "rademacher"):
            raise ConfigError(f"ZOConfig.noise is {self.noise!r}", hint='use "gaussian" or "rademacher"')
        if not isinstance(self.normalize, bool):
            raise ConfigError(f"ZOConfig.normalize is {self.normalize!r}; it must be True or False")
        if not isinstance(self.row_losses, bool):
            raise ConfigError(f"ZOConfig.row_losses is {self.row_losses!r}; it must be True or False")
        if self.row_losses and self.differentiates:
            raise ConfigError(
                f"ZOConfig.row_losses has no meaning for the {name} estimator: its step is not made from losses",
                hint='leave it out, or take estimator="two-sided"',
            )
        if self.clip is not None and (float32_problem(self.clip) or not self.clip > 0):
            raise ConfigError(f"ZOConfig.clip is {self.clip!r}; it must be a number above 0, or None")
        fewest = estimator.fewest_queries(self.normalize)
        if self.queries < fewest:
            raise ConfigError(
                f"ZOConfig.queries is {self.queries}; the {name} estimator needs {fewest} here",
                hint="take more queries, or normalize=False",
            )

    def to_json(self) -> dict[str, Any]:
        """The fields; an estimator with options as its name and options."""
        chosen = self.estimator
        estimator = ESTIMATORS.described(chosen) if isinstance(chosen, Estimator) else chosen
        fields = {**super().to_json(), "estimator": estimator}
        return fields if self.row_losses else {name: v for name, v in fields.items() if name != "row_losses"}

    @property
    def lanes(self) -> int:
        """Number of perturbed copies of every row."""
        return get_estimator(self.estimator).lanes(self.queries)

    @property
    def measures(self) -> bool:
        """Whether there are lanes to perturb and to compare."""
        return get_estimator(self.estimator).lanes(2) > 1

    @property
    def differentiates(self) -> bool:
        """Whether the program has a gradient itself, so that its steps cannot be replayed from scalars."""
        return get_estimator(self.estimator).differentiates
