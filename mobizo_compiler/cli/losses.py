"""The losses that rows of text are trained with, as options of `mobizo compile`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mobizo_compiler.cli.options import chosen
from mobizo_compiler.errors import ConfigError
from mobizo_compiler.options import JsonConfig
from mobizo_compiler.step import losses
from mobizo_compiler.step.losses import CausalLMLoss, ChoiceLoss, SequenceClassificationLoss
from mobizo_compiler.text.prompts import PromptConfig
from mobizo_compiler.text.speller import Speller

# What rows of text can be trained with: mobizo finetune makes the labels.
LOSSES: dict[str, type[JsonConfig]] = {
    "causal-lm": CausalLMLoss,
    "choice": ChoiceLoss,
    "sequence-classification": SequenceClassificationLoss,
}
_OF_TASK = {"causal-lm": ("causal-lm", "choice"), "sequence-classification": ("sequence-classification",)}


@dataclasses.dataclass(frozen=True)
class LossChoice:
    """Which loss.

    Args:
        kind: causal-lm, choice, or sequence-classification, or one of another package; that of the task if not given.
        choices: The answers between which the loss "choice" decides, one token each behind the prompt: "yes,no".
        options: Options of a loss of another package, as JSON.
    """

    kind: str | None = None
    choices: tuple[str, ...] | None = None
    options: dict[str, Any] | None = None


def loss_kind(given: dict[str, Any], task: str, words: Mapping[str, str], from_rows: bool = False) -> str:
    """Which loss, as given or as the task has it; with `from_rows`, its choices are still to be chosen.

    Raises:
        ConfigError: There is no such loss, rows of text are not trained with it, or its choices are missing.
        ExtensionUnavailableError: It is in a package that is broken.
    """
    kind = given.get("kind", "choice" if words else _OF_TASK[task][0])
    if kind not in losses.LOSSES.built_in:
        losses.LOSSES.class_of(kind)  # whether it suits the model, its labels say
    elif kind not in _OF_TASK[task]:
        raise ConfigError(
            f"loss is {kind!r}, which rows of text for the task {task} are not trained with",
            hint=f"use {' or '.join(_OF_TASK[task])}; others are for compile and finetune of Python",
        )
    named = "choices" in given or bool(words) or from_rows
    if (kind == "choice") != named or ("choices" in given and words):
        raise ConfigError(
            "the loss choice goes with --loss-choices or --label-words",
            hint='--loss choice --loss-choices "yes,no", or --label-words "1=yes,0=no"',
        )
    return str(kind)


def loss_of(
    kind: str, given: dict[str, Any], words: Mapping[str, str], template: str | None, speller: Speller | None
) -> Any:
    """The loss; its choices are the tokens that they have behind the prompt of a template.

    Raises:
        ConfigError: A choice is several tokens, or two are the same.
    """
    fields = {name: value for name, value in given.items() if name != "kind"}
    if kind == "choice":
        assert speller is not None
        prompt = PromptConfig(template=unescaped(template or "x:{x}"))
        behind = prompt.pieces(dict.fromkeys(prompt.columns, "x"))
        choices = tuple(words.values()) or fields["choices"]
        spelled = {choice: speller.answer(behind, choice.strip()) for choice in choices}
        for choice, ids in spelled.items():
            if len(ids) != 1:
                raise ConfigError(
                    f"the choice {choice!r} is {len(ids)} tokens behind the prompt; the loss decides between single "
                    "ones",
                    hint=f'--label-words "{choice}=WORD,..." gives answers words of one token; or train with the loss '
                    "causal-lm, where answers of several tokens are scored as wholes",
                )
        if len(set(map(tuple, spelled.values()))) < len(spelled):
            raise ConfigError(f"two of the choices {list(choices)} are the same token", hint="give them other words")
        fields["choices"] = tuple(ids[0] for ids in spelled.values())
    return losses.get_loss(chosen("loss", kind, fields))


def unescaped(template: str | None) -> str | None:
    r"""A template from a command line, where a line break is written `\n`.

    >>> unescaped(r"a\nb")
    'a\nb'
    """
    return template and template.replace("\\n", "\n").replace("\\t", "\t")
