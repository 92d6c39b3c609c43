"""Passes of other packages by name: an entry point in `mobizo_compiler.passes` is an `Insertion`, or a function that
returns one. An installed pass runs where it is named, and nowhere else."""

from __future__ import annotations

from typing import Any

from mobizo_compiler.errors import ConfigError, MobizoError
from mobizo_compiler.extensions import Registry
from mobizo_compiler.graph.pipeline import Insertion
from mobizo_compiler.options import shown


class _Insertions(Registry[Insertion]):
    """A name means a pass with its place."""

    def made(self, loaded: Any) -> Any:
        """The insertion."""
        return loaded if isinstance(loaded, Insertion) else loaded()


INSERTIONS = _Insertions("pass", "mobizo_compiler.passes", Insertion, {}, page="docs/writing_a_pass.md")


def get_insertion(value: str | Insertion) -> Insertion:
    """The pass of that name with its place; an insertion is returned as it is.

    Raises:
        UnknownExtensionError: There is none of that name, or two packages claim it.
        ExtensionUnavailableError: It cannot be loaded.
        ConfigError: It is something else.
    """
    if isinstance(value, str):
        found: Insertion = INSERTIONS.load(value)
        return found
    if isinstance(value, Insertion):
        return value
    raise ConfigError(
        f"passes has {shown(value)}, which has no place among the others",
        hint='mobizo_compiler.graph.Insertion(step, after="attach_loss") gives it one',
    )


def name_of(insertion: Insertion) -> str:
    """Inverse of `get_insertion`.

    Raises:
        ConfigError: No installed package has a name for it.
    """
    for name in INSERTIONS.origins():
        try:
            if INSERTIONS.load(name) == insertion:
                return name
        except MobizoError:  # another one is broken: its own affair
            continue
    raise ConfigError(
        f"the pass {insertion.step!r} cannot be written down: it has no name",
        hint=f"give it an entry point in the group {INSERTIONS.group} (see {INSERTIONS.page})",
    )
