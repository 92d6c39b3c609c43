"""Help texts that are read on any terminal: plain, with the names of options whole and under the headings they have."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand

WIDTH = 120  # at most; a narrower terminal decides
_UNBROKEN = "\N{NON-BREAKING HYPHEN}"  # while lines are broken; what is printed has hyphens that can be copied


class PlainCommand(TyperCommand):
    """A command whose help lists its options under the headings of their panels."""

    def get_help(self, ctx: Any) -> str:
        """The help, in which no line ends within the name of an option."""
        plain, self.help = self.help, _unbroken(self.help)
        try:
            return super().get_help(ctx).replace(_UNBROKEN, "-")
        finally:
            self.help = plain

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options, each heading once."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            plain = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if record is not None:
                heading = getattr(parameter, "rich_help_panel", None) or plain
                sections.setdefault(heading, []).append((record[0], _unbroken(record[1])))
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _unbroken(text: str | None) -> str:
    return re.sub(r"--[a-z][a-z-]*", lambda name: name[0].replace("-", _UNBROKEN), text or "")
