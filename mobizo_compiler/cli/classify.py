"""`mobizo compile --classify`: what a program needs for a table with classes, chosen from the table and the tokenizer.

The recipe is the one that the accuracy benchmark found best for choices: exact gradients of adapters in all blocks.
Where another estimator is asked for, or sizes are dynamic, it is the best without gradients: an adapter on the output
layer alone, of which the choice reads a few rows; what comes before it, kept for every row; many directions; and their
losses normalized.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mobizo_compiler.cli.losses import unescaped
from mobizo_compiler.compiling.options import Options
from mobizo_compiler.errors import ConfigError, DataError
from mobizo_compiler.text.prompts import Piece, PromptConfig, samples
from mobizo_compiler.text.rows import read_rows
from mobizo_compiler.text.speller import Speller

MOST_TOKENS = 128
_QUERIES, _MOST_RANK, _UNEVEN = 32, 16, 3
_LOSSES = {"causal-lm": "choice", "sequence-classification": "sequence-classification"}  # by task
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """A file of rows with classes.

    Args:
        file: Where it is.
        config: How its rows become prompts.
        counts: How many rows each class has, by its name, in the order of the names.
        prompts: The prompts of all rows.
    """

    file: Path
    config: PromptConfig
    counts: Mapping[str, int]
    prompts: list[list[Piece]]

    @classmethod
    def read(cls, file: Path, answer_column: str, template: str | None, encoding: str, head: bool) -> ClassTable:
        """Read the classes from the answers, and a prompt from the columns if none is given.

        Args:
            file: The rows.
            answer_column: Its column of classes.
            template: Of the prompt.
            encoding: Of the file.
            head: Whether the model has a head for classes, so that a prompt is the text alone.

        Raises:
            DataError: The rows cannot be read, or their answers are no classes.
            ConfigError: There are several columns that the prompt could have.
        """
        rows = read_rows(file, encoding)
        if template is None:
            others = [column for column in rows[0].cells if column != answer_column]
            rows[0].cell(answer_column, "--answer-column names that of the classes")
            shown = "{{{1}}}" if head else f"{{0}}: {{{{{{1}}}}}}\n{_titled(answer_column)}:"
            if len(others) != 1:
                column = max(others, key=lambda name: sum(len(row.cells.get(name, "")) for row in rows), default="text")
                example = shown.format(_titled(column), column).replace("\n", "\\n")
                raise ConfigError(
                    f"the prompt could be made of the columns {', '.join(others) or 'none'}",
                    where=str(file),
                    hint=f'--template "{example}"',
                )
            template = shown.format(_titled(others[0]), others[0])
        config = PromptConfig(template=unescaped(template), answer_column=answer_column)
        texts = samples(rows, config)
        found = Counter(sample.answer for sample in texts)
        if len(found) < 2 or 2 * len(found) > len(texts):
            what = "one answer" if len(found) < 2 else f"{len(found)} different answers"
            raise DataError(
                f"there {'is' if len(found) < 2 else 'are'} {what} in {len(texts)} rows; classes are two or more, with "
                "two rows each on average",
                where=f"{file}, column {answer_column!r}",
                hint="--answer-column names that of the classes; texts are trained with --loss causal-lm",
            )
        prompts = [config.pieces(sample.cells) for sample in texts]
        return cls(file, config, {name: found[name] for name in sorted(found)}, prompts)

    @property
    def empty_prompt(self) -> list[Piece]:
        """The prompt of no row in particular: what its template ends in is before all answers."""
        return self.config.pieces(dict.fromkeys(self.config.columns, "x"))

    def recipe(self, zo: Mapping[str, Any], dynamic: bool) -> Recipe:
        """What trains the choice best.

        Args:
            zo: What is asked of the estimate.
            dynamic: Whether rows or tokens may differ from call to call, which exact gradients do not take.
        """
        if not dynamic and zo.get("estimator", "exact") == "exact" and zo.keys() <= {"estimator", "clip"}:
            lora = {"r": 8, "lora_alpha": 16, "train_a": True}
            return Recipe(lora, {"estimator": "exact"}, rule="adamw", split_prefix=False, rows=16, steps=100)
        rank = min(len(self.counts) - 1, _MOST_RANK)  # of one direction less than there are classes
        lora = {"r": rank, "lora_alpha": 2 * rank, "train_a": True}
        prefix = not dynamic  # they exclude each other
        return Recipe(lora, {"queries": _QUERIES, "normalize": True}, "sgd", split_prefix=prefix, rows=32, steps=2000)

    def training(self, steps: int) -> str:
        """Options of finetune that fit."""
        uneven = max(self.counts.values()) > _UNEVEN * min(self.counts.values())
        return f"--steps {steps} --validate-every {steps // 4}" + (" --balanced" if uneven else "")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a choice is trained, where nothing else is asked for.

    Args:
        lora: Options of the adapters.
        zo: Options of the estimate.
        rule: The update rule.
        split_prefix: Whether what comes before the adapters is kept for every row.
        rows: Rows of a batch.
        steps: Steps of a run.
    """

    lora: Mapping[str, Any]
    zo: Mapping[str, Any]
    rule: str
    split_prefix: bool
    rows: int
    steps: int


def check_free(
    table: ClassTable, task: str, loss: Mapping[str, Any], words: Mapping[str, str], adapter: Path | None
) -> None:
    """Raise `ConfigError` where other options say what the table says."""
    if loss.get("kind", _LOSSES[task]) != _LOSSES[task] or "choices" in loss:
        raise ConfigError("--classify says which loss there is, and which choices", hint="leave out --loss")
    if adapter is not None:
        raise ConfigError("--classify and --adapter both say which layers are adapted", hint="leave out one of them")
    if words and task != "causal-lm":
        raise ConfigError(
            f"words stand for classes where a model writes them; a model for {task} has a head for classes",
            hint="leave out --label-words",
        )
    if words and set(words) != set(table.counts):
        raise ConfigError(f"the classes {list(table.counts)} need words, and --label-words has {list(words)}")


def completed(
    remark: Callable[..., None],
    table: ClassTable,
    words: dict[str, str],
    options: Options,
    rows: int,
    tokens: int | None,
    *,
    model: Any,
    speller: Speller,
    task: str,
) -> tuple[dict[str, str], Options, int]:
    """Words, options and tokens, as given, or as they fit the table and the model; they are said."""
    head = head_of(model) if task != "causal-lm" else ()
    words = words if head else words or label_words(list(table.counts), speller, table.empty_prompt)
    fitting, cut = row_tokens(table.prompts, speller)
    tokens = tokens or fitting
    exact = options.zo.differentiates
    if options.lora.target_modules is None and (head or not exact):
        chosen = (linear_layers(model) if exact else head) if head else (output_layer(model),)
        options = dataclasses.replace(options, lora=dataclasses.replace(options.lora, target_modules=chosen))
    targets = options.lora.target_modules
    layers = targets if isinstance(targets, str) else ", ".join(targets or ("the usual layers of all blocks",))
    counts = ", ".join(f"{name} ({count})" for name, count in table.counts.items())
    shown = (table.config.template or "").replace("\n", "\\n")
    kept = "; what comes before is kept for every row" if options.split_prefix else ""
    remark(f"{len(table.counts)} classes in {len(table.prompts)} rows: {counts}")
    spelled = ", ".join(f"{name} as {word!r}" for name, word in words.items())
    remark(f"prompt '{shown}'" + (f", answers: {spelled}" if spelled else ""))
    how = "exact gradients" if exact else f"{options.zo.queries} directions{kept}"
    remark(f"adapters of rank {options.lora.r} on {layers}, {how}; batches of {rows} rows of {tokens} tokens")
    if cut and tokens <= fitting:
        remark(f"{cut} of {len(table.prompts)} rows are longer than {fitting} tokens: --tokens", "yellow")
    return words, options, tokens


def label_words(names: Sequence[str], speller: Speller, prompt: Sequence[Piece]) -> dict[str, str]:
    """A word for each class, one token of its own behind the prompt: its name, a part of it, a number, or a letter.

    Args:
        names: The classes.
        speller: The tokenizer's.
        prompt: A prompt; what its template ends in is what counts.

    Raises:
        ConfigError: There are more classes than words.
    """
    unknown = getattr(speller.tokenizer, "unk_token_id", None)
    taken: dict[int, str] = {}
    words: dict[str, str] = {}

    def take(name: str, candidates: Iterator[str] | Sequence[str]) -> None:
        for word in candidates if name not in words else ():
            ids = speller.answer(prompt, word)
            if len(ids) == 1 and ids[0] not in taken and ids[0] != unknown:
                taken[ids[0]], words[name] = name, word
                return

    for candidates in (lambda name: [name.strip()], _parts, lambda name: _LETTERS):
        for name in names:
            take(name, candidates(name))
    if missing := [name for name in names if name not in words]:
        raise ConfigError(
            f"there is no word of one token for {', '.join(missing[:4])}" + (" ..." if len(missing) > 4 else ""),
            hint=f'--label-words "{missing[0]}=WORD,..." for all classes; or leave out --classify: with the loss '
            "causal-lm, answers of several tokens are scored as wholes",
        )
    return {name: words[name] for name in names}


def _parts(name: str) -> list[str]:
    """Words that remind of a name: of its parts, or of its number.

    >>> _parts("account_access"), _parts("2"), _parts("loginIssue")[:2]
    (['account', 'access', 'Account', 'Access'], ['two'], ['login', 'Issue'])
    """
    if name.isdecimal():
        return list(_NUMBERS[int(name) : int(name) + 1])
    parts = [part for part in re.split(r"[\W_\d]+|(?<=[a-z])(?=[A-Z])", name) if part]
    return list(dict.fromkeys([*parts, *map(str.capitalize, parts), *map(str.lower, parts)]))


def row_tokens(prompts: Sequence[Sequence[Piece]], speller: Speller) -> tuple[int, int]:
    """Tokens of a row that takes all prompts with an answer of one token, a multiple of 8; and how many are cut."""
    more = len(speller.front) + 1
    lengths = [len(speller.spell(speller.prompt(pieces))) + more for pieces in prompts]
    tokens = min(MOST_TOKENS, -8 * (-max(lengths) // 8))
    return tokens, sum(length > tokens for length in lengths)


def output_layer(model: Any) -> str:
    """The name of the layer that makes logits.

    Raises:
        ConfigError: The model does not tell.
    """
    layer = model.get_output_embeddings()
    names = [str(name) for name, module in model.named_modules() if module is layer]
    if not names:
        raise ConfigError("the model does not say which layer makes its logits", hint="--lora-target-modules names it")
    return names[0]


def head_of(model: Any) -> tuple[str, ...]:
    """The linear layers that stand on the model proper, and make classes of what it returns.

    Raises:
        ConfigError: There is none.
    """
    base = f"{model.base_model_prefix}."
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = tuple(name for name in names if not name.startswith(base))
    if not found:
        raise ConfigError("the model has no linear layer for its classes", hint="--lora-target-modules names layers")
    return found


def linear_layers(model: Any) -> tuple[str, ...]:
    """The last names of all linear layers, the head's among them."""
    found = {name.rpartition(".")[2]: None for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return tuple(found)


def _titled(column: str) -> str:
    words = column.replace("_", " ").strip()
    return words[:1].upper() + words[1:]
