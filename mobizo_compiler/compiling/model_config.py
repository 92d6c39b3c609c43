"""What the configuration of a model of transformers says: names of classes, padding, and where texts end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mobizo_compiler.analysis.ranges import input_ranges
from mobizo_compiler.config import GenerateConfig
from mobizo_compiler.errors import ConfigError
from mobizo_compiler.format.manifest import Generation, Manifest, SavedWeight
from mobizo_compiler.graph.program import GraphProgram


def answer_names(given: Sequence[str] | None, model: object, manifest: Manifest) -> tuple[str, ...] | None:
    """Names of the classes or choices: as given, or as the configuration of a model of transformers has them.

    Raises:
        ConfigError: There are more or fewer names than classes or choices, or two are equal.
    """
    labels = manifest.labels
    by_row = len(labels.shape) == 1 and labels.dtype == "int64" and labels.high is not None
    count = len(labels.choices) if labels.choices is not None else labels.high + 1 if by_row and labels.high else None
    if given is not None:
        names = tuple(given)
        if len(names) != count or len(set(names)) != count or not all(isinstance(n, str) and n for n in names):
            raise ConfigError(
                f"answers are {list(names)}; the loss is for {count or 'no'} classes or choices, each of which needs a "
                "name of its own"
            )
        return names
    known = getattr(getattr(model, "config", None), "id2label", None)
    if labels.choices is not None or not isinstance(known, Mapping) or sorted(known) != list(range(count or 0)):
        return None
    found = tuple(str(known[number]) for number in range(len(known)))
    unnamed = found == tuple(f"LABEL_{number}" for number in known) or len(set(found)) < len(found)
    return None if unnamed else found


def saved_weights(names: Sequence[str], model: object) -> dict[str, SavedWeight]:
    """Weights that travel with adapters, by name.

    Raises:
        ConfigError: The model is no module that has such weights.
    """
    known = dict(model.named_parameters()) if isinstance(model, nn.Module) else {}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"the model has no weight {unknown[0]!r} that adapters could take along")
    return {name: SavedWeight.of(known[name]) for name in names}


def words_of(model: object) -> int | None:
    """How many tokens a model of transformers knows; None for other models."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    words = getattr(config, "vocab_size", None)
    return words if isinstance(words, int) else None


def padding_of(model: object, manifest: Manifest) -> int | None:
    """The token that a model of transformers takes for padding, if it is one that the model has."""
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    highest = next((spec.high for spec in manifest.inputs if spec.name == "input_ids"), None)
    if not isinstance(padding, int) or isinstance(padding, bool) or highest is None:
        return None
    return padding if 0 <= padding <= highest else None


def generation(config: GenerateConfig | None, model: object, cached: GraphProgram | None) -> Generation | None:
    """What `forward` takes, with the tokens that end a text as the model's generation configuration has them."""
    if config is None or cached is None:
        return None
    stops: Any = config.stop_ids
    if stops is None:
        found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        stops = () if found is None else (found,) if isinstance(found, int) else tuple(found)
    (ids, _), (logits,) = cached.inputs, cached.output_nodes.values()
    highest = input_ranges(cached).get(ids, (0, logits.meta["val"].shape[-1] - 1))[1]
    return Generation(config.context, highest + 1, stops, config.all_logits)
