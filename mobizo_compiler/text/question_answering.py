"""Answers that are written, and how near they come to the right ones: F1 of words and exact match, as for SQuAD.

The measures are those of Rajpurkar et al. 2016 (arXiv 1606.05250), with the normalization of their evaluation script.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from mobizo_compiler.device.session import Session
from mobizo_compiler.text.data import TextData
from mobizo_compiler.text.generation import generate
from mobizo_compiler.text.prompts import Sample

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class WrittenAnswers:
    """How near written answers come to the right ones.

    Args:
        answers: The texts.
        f1: Mean F1 of words, each with the right answer that is nearest.
        exact_match: Share of answers that are a right one, but for case, punctuation and articles.
    """

    answers: tuple[str, ...]
    f1: float
    exact_match: float


def answer_questions(
    session: Session,
    tokenizer: Any,
    data: TextData,
    texts: Sequence[Sample],
    most: int = 50,
    done: Callable[[int], object] = lambda rows: None,
) -> WrittenAnswers:
    """Let a session write an answer to every sample, and compare it with the right ones.

    Always the most likely token is taken, up to the end of the text or of the line.

    Args:
        session: With the state to answer with.
        tokenizer: The model's.
        data: The samples as tokens.
        texts: The same samples, with their `references`.
        most: Tokens of an answer.
        done: Told after each answer how many there are.

    Raises:
        DataError: A prompt does not fit into the program's cache.
    """
    answers = []
    for row in data.encoded:
        prompt = row.ids[: len(row.ids) - row.labelled]
        text = generate(session, tokenizer, prompt, most, until="\n").text
        answers.append(text.partition("\n")[0].strip())
        done(len(answers))
    pairs = [(answer, sample.references) for answer, sample in zip(answers, texts, strict=True)]
    f1 = sum(max(token_f1(answer, right) for right in references) for answer, references in pairs)
    same = sum(any(normalized(answer) == normalized(right) for right in references) for answer, references in pairs)
    return WrittenAnswers(tuple(answers), f1 / len(pairs), same / len(pairs))


def normalized(answer: str) -> str:
    """An answer without case, punctuation, articles, and more than one space in a row.

    >>> normalized("The  Eiffel-Tower!")
    'eiffeltower'
    """
    words = re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(_PUNCTUATION))
    return " ".join(words.split())


def token_f1(answer: str, right: str) -> float:
    """Harmonic mean of the share of an answer's words that are right, and of the right words that are in it.

    >>> token_f1("in the city of Paris", "Paris"), token_f1("", "Paris")
    (0.4, 0.0)
    """
    words, wanted = normalized(answer).split(), normalized(right).split()
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted)) if common else float(words == wanted)
