"""What a session makes of text: losses of answers, and the choice between them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import DataError
from mobizo_compiler.text.answers import Encoded
from mobizo_compiler.text.data import IGNORED, TextData


@dataclasses.dataclass(frozen=True)
class Score:
    """How well samples are answered.

    Args:
        rows: Number of samples.
        loss: Mean cross-entropy of an answer's token among all tokens, or of a row's class; nats. From the kept prefix
            of rows it is the loss that the program was compiled for, such as that among the choices.
        choice_loss: Mean cross-entropy of the answer among the choices; None if answers are not a closed set.
        accuracy: Share of samples whose answer is the most likely choice.
        accuracy_per_token: The same by the mean log-probability of a choice's tokens, so that long ones are not at a
            disadvantage; None unless choices are each row's own.
        auc: Area under the ROC curve, for two choices that are both there: how often a sample of the second has more
            probability of it than a sample of the first.
        chosen: Share of samples for which each choice is the most likely.
        calibrated: Accuracy with the mean log-probability of each choice over all samples taken off: what the accuracy
            would be without a liking for one of the answers.
    """

    rows: int
    loss: float
    choice_loss: float | None = None
    accuracy: float | None = None
    auc: float | None = None
    chosen: tuple[float, ...] | None = None
    calibrated: float | None = None
    accuracy_per_token: float | None = None

    @property
    def biased(self) -> bool:
        """Whether most of what is wrong is a liking for one of the answers."""
        return self.calibrated is not None and self.calibrated - (self.accuracy or 0.0) > 0.05


@dataclasses.dataclass(frozen=True)
class Measured:
    """A score, and what it is made of.

    Args:
        score: The numbers.
        log_NC: Log-probability of each choice, float64 [samples, choices], minus infinity where a row has fewer choices
            of its own than others; None if there are no choices.
        answers: Number of the right choice of each sample, int64 [samples]; -1 for an answer that is no choice.
    """

    score: Score
    log_NC: Tensor | None
    answers: Tensor


def score(session: Session, data: TextData, done: Callable[[int], bool | None] = lambda rows: None) -> Score | None:
    """The score of `measure` alone."""
    found = measure(session, data, done)
    return None if found is None else found.score


def measure(
    session: Session, data: TextData, done: Callable[[int], bool | None] = lambda rows: None
) -> Measured | None:
    """Measure samples with the session's state; from the kept prefix of every row, where the session has a file for it.

    Args:
        session: Its program is the one that the data was encoded for.
        data: The samples.
        done: Told after each batch how many samples are done; where it returns True, the result is None.
    """
    rate = _class_losses if data.layout.classes is not None else _answer_losses
    if session.keeps_prefix and _labels_fit(session, data):
        rate = _class_losses_from_prefix if data.layout.classes is not None else _answer_losses_from_prefix
    losses: list[tuple[float, int]] = []
    chosen: list[Tensor] = []
    size = data.layout.rows
    for first in range(0, len(data), size):
        rows = data.encoded[first : first + size]
        some, choices = rate(session, data, rows)
        losses += some
        chosen += choices
        if done(len(losses)):
            return None
    loss = math.fsum(loss for loss, _ in losses) / sum(count for _, count in losses)
    answers = torch.tensor([-1 if row.choice is None else row.choice for row in data.encoded])
    if not chosen:
        return Measured(Score(len(losses), loss), None, answers)
    summed_NC = pad_sequence(chosen, batch_first=True, padding_value=-math.inf).double()
    log_NC = F.log_softmax(summed_NC, dim=-1)
    found = _score_of_choices(log_NC, answers, loss)
    if data.choices is None:  # the first choice of one row has nothing in common with that of another
        lengths = [torch.tensor([len(ids) for ids in row.options]) for row in data.encoded]
        mean_NC = summed_NC / pad_sequence(lengths, batch_first=True, padding_value=1)
        per_token = float((mean_NC.argmax(dim=-1) == answers).double().mean())
        found = Score(found.rows, loss, found.choice_loss, found.accuracy, accuracy_per_token=per_token)
    return Measured(found, log_NC, answers)


def _score_of_choices(log_NC: Tensor, answers: Tensor, loss: float) -> Score:
    right = log_NC.argmax(dim=-1) == answers
    known = answers >= 0
    choice_loss = -log_NC[known].gather(1, answers[known, None]).mean() if bool(known.any()) else torch.tensor(math.nan)
    area = auc(log_NC[:, 1] - log_NC[:, 0], answers) if log_NC.shape[1] == 2 else None
    shares = F.one_hot(log_NC.argmax(dim=-1), log_NC.shape[1]).double().mean(dim=0)
    calibrated = ((log_NC - log_NC.mean(dim=0)).argmax(dim=-1) == answers).double().mean()
    accuracy = float(right.double().mean())
    return Score(len(answers), loss, float(choice_loss), accuracy, area, tuple(map(float, shares)), float(calibrated))


def auc(scores: Tensor, answers: Tensor) -> float | None:
    """How often a sample with answer 1 has a higher score than one with answer 0; None without one of each.

    It is the Mann-Whitney statistic, from ranks; equal scores share the mean of their ranks.
    """
    positive, negative = int((answers == 1).sum()), int((answers == 0).sum())
    if not positive or not negative:
        return None
    counted = (answers == 0) | (answers == 1)
    _, place, count = torch.unique(scores[counted], sorted=True, return_inverse=True, return_counts=True)
    rank = count.cumsum(0).double() - (count - 1).double() / 2
    above = rank[place][answers[counted] == 1].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative))


def objective(score: Score, data: TextData) -> float:
    """The loss that training with this program brings down: that among choices where it was compiled for choices."""
    chosen = data.layout.choices is not None and score.choice_loss is not None
    return float(score.choice_loss) if chosen and score.choice_loss is not None else score.loss


def logits_of(session: Session, data: TextData, rows: Sequence[Encoded]) -> Tensor:
    """Logits of rows; a batch that is not full is filled with its first row."""
    return _logits(session.evaluate(_filled_inputs(data, rows)))[: len(rows)].float()


def _filled_inputs(data: TextData, rows: Sequence[Encoded]) -> dict[str, Tensor]:
    full = [*rows, *([rows[0]] * (data.layout.rows - len(rows)))]
    return data.inputs([row.ids for row in full], [row.types for row in full])


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    found = outputs[0] if found is None and isinstance(outputs, (tuple, list)) else found
    if not isinstance(found, Tensor):
        raise DataError(f"the program returns a {type(outputs).__name__} without logits")
    return found


def _class_losses(session: Session, data: TextData, rows: Sequence[Encoded]) -> tuple[list[Any], list[Tensor]]:
    logits_NC = logits_of(session, data, rows)
    log_NC = F.log_softmax(logits_NC.double(), dim=-1)
    return [(-float(log_C[row.choice or 0]), 1) for log_C, row in zip(log_NC, rows, strict=True)], list(logits_NC)


def _answer_losses(session: Session, data: TextData, rows: Sequence[Encoded]) -> tuple[list[Any], list[Tensor]]:
    """Of each row: loss summed over its answer and number of its tokens; log-probability of each choice."""
    logits_NTV = logits_of(session, data, rows)
    losses = [(-_log_probability(logits, row), row.labelled) for logits, row in zip(logits_NTV, rows, strict=True)]
    choices = [row.options or data.spelled for row in rows]
    if not any(choices):
        return losses, []
    if all(len(ids) == 1 for some in choices for ids in some):  # it is predicted where the prompt ends
        both = zip(logits_NTV, rows, choices, strict=True)
        return losses, [
            logits[len(row.ids) - row.labelled - 1, [token for (token,) in some]] for logits, row, some in both
        ]
    by_choice = []
    for others in _with_every_answer(rows, choices, data.layout.tokens):
        logits_NTV = logits_of(session, data, others)
        by_choice.append([_log_probability(*pair) for pair in zip(logits_NTV, others, strict=True)])
    return losses, _of_each_row(torch.tensor(by_choice), choices)


def _labels_fit(session: Session, data: TextData) -> bool:
    """Whether the program's loss takes the answers of all rows, and all choices in place of them, as labels."""
    labels, most = session.program.manifest.labels, session.program.manifest.max_labels
    if data.layout.classes is not None:
        return all(row.choice is not None for row in data.encoded)
    answers = {tuple(row.ids[place] for place in row.places) for row in data.encoded} | set(map(tuple, data.spelled))
    answers |= {ids for row in data.encoded for ids in row.options}
    if labels.choices is not None and not {token for answer in answers for token in answer} <= set(labels.choices):
        return False
    return most is None or max(map(len, answers)) <= most


def _class_losses_from_prefix(
    session: Session, data: TextData, rows: Sequence[Encoded]
) -> tuple[list[Any], list[Tensor]]:
    """As `_class_losses`."""
    labels_N = data.labels(rows)
    classes = [torch.full_like(labels_N, number) for number in range(data.layout.classes or 0)]
    loss_KN, _ = _row_losses(session, data, rows, labels_N, classes)
    return [(float(loss), 1) for loss in loss_KN[0]], list(-loss_KN[1:].t())


def _answer_losses_from_prefix(
    session: Session, data: TextData, rows: Sequence[Encoded]
) -> tuple[list[Any], list[Tensor]]:
    """As `_answer_losses`, with what the losses of the choices are in place of logits."""
    labels_NT, choices = data.labels(rows), [row.options or data.spelled for row in rows]
    several = any(len(ids) != 1 for some in choices for ids in some) or any(row.labelled != 1 for row in rows)
    if several or any(row.options for row in rows):
        loss_KN, weight_KN = _row_losses(session, data, rows, labels_NT)
        every = _with_every_answer(rows, choices, data.layout.tokens)
        by_choice = [-_row_losses(session, data, others, data.labels(others))[0][0] for others in every]
    else:
        tokens = [labels_NT.where(labels_NT == IGNORED, ids[0]) for ids in data.spelled]
        loss_KN, weight_KN = _row_losses(session, data, rows, labels_NT, tokens)
        by_choice = list(-loss_KN[1:])
    losses = [(float(loss), int(weight)) for loss, weight in zip(loss_KN[0], weight_KN[0], strict=True)]
    return losses, _of_each_row(torch.stack(by_choice), choices) if by_choice else []


def _row_losses(
    session: Session, data: TextData, rows: Sequence[Encoded], labels: Tensor, instead: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Losses of rows; a batch that is not full is filled with its first row."""
    filled = torch.arange(data.layout.rows)
    filled[len(rows) :] = 0
    others = [other[filled] for other in instead]
    loss, weight = session.row_losses(_filled_inputs(data, rows), labels[filled], others)
    return loss[:, : len(rows)].double(), weight[:, : len(rows)]


def _with_every_answer(
    rows: Sequence[Encoded], choices: Sequence[Sequence[tuple[int, ...]]], tokens: int
) -> Iterator[list[Encoded]]:
    """The rows with the first of their choices, with the second, and so on; a row that has no more keeps its last."""
    for place in range(max(map(len, choices))):
        pairs = zip(rows, choices, strict=True)
        yield [_with_answer(row, some[min(place, len(some) - 1)], tokens) for row, some in pairs]


def _of_each_row(by_choice_CN: Tensor, choices: Sequence[Sequence[tuple[int, ...]]]) -> list[Tensor]:
    """The numbers of each row's choices, of which it has as many as it has."""
    return [of_row[: len(some)] for of_row, some in zip(by_choice_CN.t(), choices, strict=True)]


def _with_answer(row: Encoded, answer: tuple[int, ...], tokens: int) -> Encoded:
    """The row with another answer; where that is too long, tokens go from the front of the prompt."""
    prompt = row.ids[: len(row.ids) - row.labelled]
    return Encoded((*prompt[max(0, len(prompt) + len(answer) - tokens) :], *answer), len(answer), None, row.cut)


def _log_probability(logits_TV: Tensor, row: Encoded) -> float:
    """Of the labelled tokens of a row; the token at t is predicted at t - 1."""
    places = torch.tensor(row.places)
    log_KV = F.log_softmax(logits_TV[places - 1].double(), dim=-1)
    picked = log_KV.gather(1, torch.tensor(row.ids)[places][:, None])
    return float(picked.sum())
