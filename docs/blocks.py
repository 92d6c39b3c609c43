"""The code blocks of the pages, with the notes that say how a block is tested.

A note is an HTML comment before a block; readers do not see it.

    <!-- setup              Python that is run before the page's blocks, to stand for what the reader has
    ... -->
    <!-- of FILE -->        an excerpt of a file
    <!-- section S of FILE -->   the part of a file under the comment `# -- S`; docs/generate.py writes it
    <!-- raises CODE -->    the block ends with this error
    <!-- slow -->           the block takes minutes: it is run by the slow tests only
    <!-- not run: WHY -->   the block cannot be run by the tests
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
_NOTE = re.compile(r"<!--\s*(setup|of|section|raises|slow|not run:)\s?(.*?)\s*-->", re.DOTALL)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_ANY = re.compile(f"{_FENCE.pattern}|(?P<note>{_NOTE.pattern})", re.DOTALL | re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of a page.

    Args:
        page: Its file.
        line: Line of the page where the text begins.
        language: The word behind the fence.
        text: What is inside.
        notes: The notes before it, as name and text.
    """

    page: Path
    line: int
    language: str
    text: str
    notes: dict[str, str]


def pages() -> list[Path]:
    """All pages for readers: the README, CONTRIBUTING, and docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text() if text is None else text
    found, notes = [], {}
    for match in _ANY.finditer(text):
        if match["note"]:
            name, content = match[4], match[5]
            notes[name.rstrip(":")] = content
        else:
            line = text.count("\n", 0, match.start()) + 2
            found.append(Block(page, line, match[1], match[2], notes))
            notes = {}
    return found


def prose(text: str) -> str:
    """A page without its blocks and comments; lines keep their numbers."""

    def blank(match: re.Match[str]) -> str:
        return "`\n" * match[0].count("\n") + "`"

    return re.sub(r"<!--.*?-->", blank, _FENCE.sub(blank, text), flags=re.DOTALL)


def indented_code(text: str) -> list[int]:
    """Numbers of lines that Markdown takes for code without a fence, which no test could tell the language of."""
    lines, in_list, found = prose(text).splitlines(), False, []
    for number, line in enumerate(lines):
        if re.match(r"\s*([-*]|\d+\.)\s", line):
            in_list = True
        elif line and not line.startswith(" "):
            in_list = False
        if line.startswith("    ") and not in_list and (not number or not lines[number - 1].strip()):
            found.append(number + 1)
    return found


def section(path: Path, name: str) -> str:
    """The part of a file from the comment `# -- name` to the next one, without the blank lines around it."""
    parts = re.split(r"^# -- (.*)\n", path.read_text(), flags=re.MULTILINE)
    named = dict(zip(parts[1::2], parts[2::2], strict=True))
    return named[name].strip("\n") + "\n"
