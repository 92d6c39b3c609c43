"""Conversations in rows, in the forms that data sets have them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mobizo_compiler.errors import DataError
from mobizo_compiler.text.rows import Row

ASSISTANT, SYSTEM, USER = "assistant", "system", "user"
_NAME = re.compile(r"[\w-]+")  # a role is written between special tokens, and must not spell one
# What `from` says in the form "conversations".
_ROLES = {"human": USER, "gpt": ASSISTANT, **{role: role for role in (USER, ASSISTANT, SYSTEM)}}
_OUTPUTS = ("output", "response")
_CONTEXTS = ("input", "context")


@dataclasses.dataclass(frozen=True)
class Message:
    """What somebody says in a conversation."""

    role: str
    content: str


def chat_form(row: Row) -> str | None:
    """The form of the conversations that rows like this one hold; None if it is none that is known.

    >>> chat_form(Row({"instruction": "Add.", "input": "1 1", "output": "2"}, "here"))
    'instruction'
    """
    columns = {*row.cells, *row.nested}
    if "messages" in row.nested:
        return "messages"
    if "conversations" in row.nested:
        return "conversations"
    if "instruction" in columns and columns & set(_OUTPUTS):
        return "instruction"
    return "completion" if {"prompt", "completion"} <= columns else None


def conversation(row: Row, form: str) -> tuple[Message, ...]:
    """The conversation of a row, up to its last answer.

    Args:
        row: The row.
        form: A key of `FORMS`.

    Raises:
        DataError: The row has no such columns, a message is not text, or nobody answers.
    """
    found = FORMS[form](row)
    answers = [place for place, message in enumerate(found) if message.role == ASSISTANT]
    if not answers or answers[0] == 0:
        raise DataError(
            "the conversation begins with an answer" if answers else "the conversation has no answer of the assistant",
            where=row.where,
            hint=f"there are the roles {', '.join(message.role for message in found) or 'none'}",
        )
    if empty := [place for place in answers if not found[place].content.strip()]:
        raise DataError("an answer of the assistant is empty", where=f"{row.where}, message {empty[0] + 1}")
    return tuple(found[: answers[-1] + 1])


def without_oldest(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation without its first exchange; what the system says stays. Empty if no answer would be left."""
    system = [message for message in messages[:1] if message.role == SYSTEM]
    first = next(place for place, message in enumerate(messages) if message.role == ASSISTANT)
    rest = messages[first + 1 :]
    return (*system, *rest) if any(message.role == ASSISTANT for message in rest) else ()


def _messages(row: Row) -> list[Message]:
    return _listed(row, "messages", "role", "content", lambda role: role)


def _conversations(row: Row) -> list[Message]:
    """As ShareGPT has them; newer sets have `role` and `content` under the same name."""
    items = row.nested.get("conversations")
    if isinstance(items, Sequence) and items and isinstance(items[0], Mapping) and "role" in items[0]:
        return _listed(row, "conversations", "role", "content", lambda role: role)
    return _listed(row, "conversations", "from", "value", _ROLES.get)


def _instruction(row: Row) -> list[Message]:
    """As Alpaca and Dolly have them: an instruction, perhaps with a text that it is about."""
    output = next((name for name in _OUTPUTS if name in row.cells), _OUTPUTS[0])
    hint = "the form instruction has the columns instruction, input or context, and output or response"
    about = next((row.cells[name] for name in _CONTEXTS if row.cells.get(name, "").strip()), "")
    asked = row.cell("instruction", hint) + (f"\n\n{about}" if about else "")
    return [*_system(row), Message(USER, asked), Message(ASSISTANT, row.cell(output, hint))]


def _completion(row: Row) -> list[Message]:
    """A prompt and a completion, each a text or a list of messages."""
    found = _system(row)
    for name, role in (("prompt", USER), ("completion", ASSISTANT)):
        if name in row.nested:
            found += _listed(row, name, "role", "content", lambda role: role)
        else:
            found.append(Message(role, row.cell(name, "the form completion has the columns prompt and completion")))
    return found


def _system(row: Row) -> list[Message]:
    return [Message(SYSTEM, row.cells[SYSTEM])] if row.cells.get(SYSTEM, "").strip() else []


def _listed(row: Row, column: str, who: str, what: str, role_of: Callable[[str], str | None]) -> list[Message]:
    """The messages in a column, with the names that their parts have there."""
    items = row.nested.get(column)
    if not isinstance(items, Sequence):
        raise DataError(f"column {column!r} is no list of messages", where=row.where)
    found = []
    for number, item in enumerate(items, start=1):
        where = f"{row.where}, message {number}"
        if not isinstance(item, Mapping) or not {who, what} <= item.keys():
            raise DataError(f"a message of {column!r} needs {who!r} and {what!r}", where=where)
        if item.get("tool_calls"):
            raise DataError(
                "the message calls tools, which are no text", where=where, hint="leave out such conversations"
            )
        role, content = item[who], item[what]
        known = role_of(role) if isinstance(role, str) and _NAME.fullmatch(role) else None
        if known is None:
            raise DataError(f"{who!r} is {role!r}", where=where, hint=f"roles are {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise DataError(
                f"{what!r} is a {type(content).__name__}, not text", where=where, hint="leave out what is no text"
            )
        found.append(Message(known, content))
    return found


FORMS: Mapping[str, Callable[[Row], list[Message]]] = {
    "messages": _messages,
    "conversations": _conversations,
    "instruction": _instruction,
    "completion": _completion,
}


def as_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates take them."""
    return [dataclasses.asdict(message) for message in messages]
