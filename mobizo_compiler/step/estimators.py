"""Estimators: where the lanes are, and what their losses say about the gradient; or that it is had exactly.

Shape suffixes: Q queries, G lanes, P parameters.

An estimator is a frozen dataclass, whose fields are its options, with three functions; those of tensors are traced into
the graph. Lanes, noise and differencing follow from them. What it returns for query i estimates the derivative of the
loss along z_i, so that the mean of g_i z_i estimates the gradient.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mobizo_compiler.errors import ConfigError
from mobizo_compiler.extensions import DataclassRegistry
from mobizo_compiler.options import JsonConfig, check_int, float32_problem
from mobizo_compiler.step.noise import noise_values
from mobizo_compiler.step.sites import Site, in_their_places, trained_before

# Losses that are equal have nothing to say; a difference of zero stays zero when it is divided by this.
_SMALLEST_SPREAD = 1e-20
AUTO: Literal["auto"] = "auto"


@dataclasses.dataclass(frozen=True)
class Estimator(JsonConfig, abc.ABC):
    """How lanes are perturbed and compared. An entry point or `register_estimator` gives it a name.

    The functions may use whatever runs on every engine: arithmetic, slices, `cat`, sums.

    `differentiates`: the program has a gradient itself, as operators, for some sites or for all. A step is then no
    function of its seed and projected gradient: it cannot be replayed, and its journal cannot be merged.
    """

    differentiates: ClassVar[bool] = False

    @abc.abstractmethod
    def lanes(self, queries: int) -> int:
        """Number G of copies of every row that a step runs."""

    @abc.abstractmethod
    def perturbed(self, trained_P: Tensor, step_QP: Tensor) -> Tensor:
        """The trained numbers of every lane, [G, P].

        Args:
            trained_P: The trained numbers, float32 [P].
            step_QP: eps z of every query, float32 [Q, P].
        """

    @abc.abstractmethod
    def projected_gradient(self, loss_G: Tensor, eps_1: Tensor) -> Tensor:
        """The slope along every direction, float32 [Q], from the losses of the lanes and eps, float32 [1]."""

    def fewest_queries(self, normalized: bool) -> int:
        """The smallest number of queries that it works with; `normalized` needs a spread of losses."""
        return 1

    def measured(self, sites: Sequence[Site]) -> int:
        """How many of the first sites are perturbed and measured; the others have a gradient of their own."""
        return 0 if self.differentiates else len(sites)


@dataclasses.dataclass(frozen=True)
class TwoSided(Estimator):
    """Central differences (SPSA, Spall 1992; MeZO; MobiZO): lanes B + eps z_i, then B - eps z_i.

    Its error is of the order eps^2: a quadratic loss is matched exactly.
    """

    def lanes(self, queries: int) -> int:
        """2q."""
        return 2 * queries

    def perturbed(self, trained_P: Tensor, step_QP: Tensor) -> Tensor:
        """+1..+q, then -1..-q."""
        return torch.cat((trained_P + step_QP, trained_P - step_QP))

    def projected_gradient(self, loss_G: Tensor, eps_1: Tensor) -> Tensor:
        """(L(B + eps z) - L(B - eps z)) / (2 eps)."""
        queries = loss_G.shape[0] // 2
        return (loss_G[:queries] - loss_G[queries:]) / (eps_1 * 2.0)


@dataclasses.dataclass(frozen=True)
class OneSided(Estimator):
    """Forward differences with one clean lane for all queries (FZOO, Dang et al. 2025): B, then B + eps z_i.

    q + 1 lanes in place of 2q. Its error is of the order eps: half of the curvature along z_i times eps is added to
    g_i, which has mean zero in the update, because z and -z are as likely.
    """

    def lanes(self, queries: int) -> int:
        """q + 1."""
        return queries + 1

    def perturbed(self, trained_P: Tensor, step_QP: Tensor) -> Tensor:
        """The clean lane first."""
        return torch.cat((trained_P.reshape(1, -1), trained_P + step_QP))

    def projected_gradient(self, loss_G: Tensor, eps_1: Tensor) -> Tensor:
        """(L(B + eps z) - L(B)) / eps."""
        return (loss_G[1:] - loss_G[:1]) / eps_1

    def fewest_queries(self, normalized: bool) -> int:
        """Two if normalized: the spread of two lanes is their distance, which leaves nothing but a sign."""
        return 2 if normalized else 1


@dataclasses.dataclass(frozen=True)
class Exact(Estimator):
    """The gradient itself, written into the program as operators of inference (`mobizo_compiler.passes.differentiate`).

    One lane that is not perturbed; the seed and the size of the perturbation change nothing. Its projected gradient is
    one number, the slope along the gradient's own direction, which is the gradient's length.
    """

    differentiates: ClassVar[bool] = True

    def lanes(self, queries: int) -> int:
        """1."""
        return 1

    def perturbed(self, trained_P: Tensor, step_QP: Tensor) -> Tensor:
        """What is trained, as it is."""
        return trained_P.reshape(1, -1)

    def projected_gradient(self, loss_G: Tensor, eps_1: Tensor) -> Tensor:
        """A `ConfigError`: one loss says nothing about a slope."""
        raise ConfigError("the exact estimator takes its slope from the gradient, not from losses")


@dataclasses.dataclass(frozen=True)
class Hybrid(TwoSided):
    """The gradient itself from one block on, and central differences for the adapters before it, in one step.

    A lane of its own that is not perturbed gives the loss and the gradient; 2q lanes that are perturbed before the
    block give the slopes.

    Args:
        exact_from: The first block whose adapters have the gradient, by the number in their paths; a negative number
            counts from the last block, as -4 for the last four. "auto" is as early as `activation_memory_bytes`
            allows; `compile` puts a number in its place.
        measured_rate: Share of the learning rate for the adapters that are measured. What is measured is mostly noise
            where they have many numbers, and a rule that divides by what is usual, as AdamW, moves by it as far as by
            a gradient.

    Raises:
        ConfigError: `exact_from` is neither, or `measured_rate` is no number above 0.
    """

    exact_from: int | Literal["auto"] = -4
    measured_rate: float = 1.0
    differentiates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.exact_from, str) and self.exact_from != AUTO:
            raise ConfigError(
                f'Hybrid.exact_from is {self.exact_from!r}; it must be the number of a block, or "{AUTO}"'
            )
        if self.exact_from != AUTO:
            check_int("Hybrid.exact_from", self.exact_from, -100_000, 100_000)
        if (problem := float32_problem(self.measured_rate)) or self.measured_rate <= 0:
            raise ConfigError(
                f"Hybrid.measured_rate is {self.measured_rate!r}; {problem or 'it must be above 0'}",
                hint='what is not to move needs no adapter: estimator="exact", and LoraConfig.layers_to_transform',
            )

    def measured(self, sites: Sequence[Site]) -> int:
        """The sites before the first one in that block or behind it.

        Raises:
            ConfigError: There is none on one of the two sides.
        """
        if self.exact_from == AUTO:
            raise ConfigError(f'exact_from is "{AUTO}", and nobody has put a block in its place', hint="name one")
        blocks = [site.block for site in sites]
        known = [block for block in blocks if block is not None]
        first = self.exact_from if self.exact_from >= 0 else max(known, default=-1) + 1 + self.exact_from
        found = next((i for i, block in enumerate(blocks) if block is not None and block >= first), len(sites))
        if not 0 < found < len(sites):
            where = f"blocks {min(known)} to {max(known)}" if known else "no numbered block"
            raise ConfigError(
                f"exact_from is {self.exact_from}, and the adapters are in {where}: nothing would be "
                f"{'measured' if not found else 'exact'}",
                hint='choose a block in between, or estimator="exact" or "two-sided" for all of them',
            )
        return found


ESTIMATORS = DataclassRegistry(
    "estimator",
    "mobizo_compiler.estimators",
    Estimator,  # type: ignore[type-abstract]
    {
        "exact": "mobizo_compiler.step.estimators:Exact",
        "hybrid": "mobizo_compiler.step.estimators:Hybrid",
        "one-sided": "mobizo_compiler.step.estimators:OneSided",
        "two-sided": "mobizo_compiler.step.estimators:TwoSided",
    },
)


def register_estimator(name: str, estimator: type[Estimator] | Estimator) -> None:
    """Let `ZOConfig(estimator=name)` mean this class in the running process. An entry point does so in all of them.

    Args:
        name: The name.
        estimator: The class, or, where it has no options, an instance of it.

    Raises:
        ConfigError: The name is taken, or it is no frozen dataclass derived from `Estimator`.
    """
    plain = isinstance(estimator, Estimator) and not dataclasses.fields(estimator)
    ESTIMATORS.register(name, type(estimator) if plain else estimator)


def get_estimator(estimator: str | Mapping[str, Any] | Estimator) -> Estimator:
    """An estimator from its name, from its JSON, or itself.

    Raises:
        ConfigError: There is none of that name, or an option is out of range.
        ExtensionUnavailableError: It is in a package that is broken.

    >>> get_estimator({"name": "two-sided"})
    TwoSided()
    """
    return ESTIMATORS.get(estimator)


def directions(
    estimator: Estimator,
    sites: Sequence[Site],
    seed_1: Tensor,
    queries: int,
    distribution: str,
    table_T1: Tensor | None = None,
) -> Tensor:
    """The directions z of a step, float32 [Q, P]; zeros for sites that are not measured.

    Args:
        estimator: The estimator.
        sites: The sites.
        seed_1: Seed, int32 [1].
        queries: Number Q of queries.
        distribution: "gaussian" or "rademacher".
        table_T1: See `noise_values`.
    """
    first = estimator.measured(sites)
    noise_QM = noise_values(seed_1, queries, trained_before(sites, first), distribution, table_T1)
    return in_their_places(noise_QM, sites, first)


def measured_numbers(estimator: Estimator, sites: Sequence[Site]) -> Tensor:
    """1 for the trained numbers that lanes are perturbed by, 0 for the others, float32 [P]."""
    first = estimator.measured(sites)
    return in_their_places(torch.ones(1, trained_before(sites, first)), sites, first)[0]


def rates_of(estimator: Estimator, sites: Sequence[Site]) -> Tensor | None:
    """The share of the learning rate of each trained number, float32 [P]; None where all have the whole."""
    if not isinstance(estimator, Hybrid) or estimator.measured_rate == 1.0:
        return None
    measured_P = measured_numbers(estimator, sites)
    return measured_P * estimator.measured_rate + (1.0 - measured_P)


def lanes_of(estimator: Estimator, trained_P: Tensor, step_QP: Tensor) -> Tensor:
    """What `perturbed` returns, [G, P].

    Raises:
        ConfigError: It has another shape.
    """
    wanted = (estimator.lanes(int(step_QP.shape[0])), int(trained_P.shape[0]))
    return _of_shape(estimator, "perturbed", estimator.perturbed(trained_P, step_QP), wanted, "[lanes, parameters]")


def gradient_of(estimator: Estimator, loss_G: Tensor, eps_1: Tensor, queries: int) -> Tensor:
    """What `projected_gradient` returns, [Q].

    Raises:
        ConfigError: It has another shape: a single number, say, would be taken for the slope along every direction.
    """
    found = estimator.projected_gradient(loss_G, eps_1)
    return _of_shape(estimator, "projected_gradient", found, (queries,), "[queries]")


def _of_shape(estimator: Estimator, method: str, found: object, wanted: tuple[int, ...], meaning: str) -> Tensor:
    if not isinstance(found, Tensor) or tuple(found.shape) != wanted or not found.dtype.is_floating_point:
        shown = f"{found.dtype}{list(found.shape)}" if isinstance(found, Tensor) else repr(found)
        raise ConfigError(
            f"{type(estimator).__name__}.{method} must return numbers of shape {meaning}, here {list(wanted)}; "
            f"it returned {shown}"
        )
    return found


def scaled(gradient_Q: Tensor, loss_G: Tensor, eps_1: Tensor, normalize: bool, clip: float | None) -> Tensor:
    """The projected gradient as the update takes it, [Q].

    Args:
        gradient_Q: What the estimator returned.
        loss_G: Losses of the lanes.
        eps_1: Size of the perturbation.
        normalize: Divide by the standard deviation of the lane losses over eps (FZOO), so that the size of the loss
            does not matter: g_i is then of the order 1.
        clip: Largest size of an entry; None for no limit.
    """
    if normalize:
        off_G = loss_G - loss_G.mean(dim=0, keepdim=True)
        variance_1 = (off_G * off_G).sum(dim=0, keepdim=True) * (1.0 / (loss_G.shape[0] - 1))
        gradient_Q = gradient_Q * eps_1 / (torch.sqrt(variance_1) + _SMALLEST_SPREAD)
    return gradient_Q if clip is None else torch.clamp(gradient_Q, -clip, clip)
