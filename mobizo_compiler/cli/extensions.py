"""`mobizo extensions`: what is installed of every kind, where it comes from, and whether it can be loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mobizo_compiler import __version__
from mobizo_compiler.analysis.axes import AXIS_RULES
from mobizo_compiler.backends import BACKENDS
from mobizo_compiler.cli.app import AsJson, Quiet, app, print_json
from mobizo_compiler.cli.options import ConfigFile
from mobizo_compiler.compiling.insertions import INSERTIONS
from mobizo_compiler.errors import MobizoError
from mobizo_compiler.extensions import Origin, Registry
from mobizo_compiler.inspection.machine import DISTRIBUTION
from mobizo_compiler.step.estimators import ESTIMATORS
from mobizo_compiler.step.losses import LOSSES
from mobizo_compiler.step.rules import RULES

REGISTRIES: tuple[Registry[Any], ...] = (BACKENDS, INSERTIONS, ESTIMATORS, RULES, LOSSES, AXIS_RULES)


@app.command("extensions")
def show_extensions(config: ConfigFile = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List backends, passes, estimators, update rules, losses and axis rules by name, with the package of each.

    Each is loaded, and one that is broken harms no other. Whether a backend can be used here, mobizo backends says.
    """
    listed = list_extensions()
    if as_json:
        print_json([dataclasses.asdict(extension) for extension in listed])
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("kind", overflow="fold")
    table.add_column("name", overflow="fold")
    table.add_column("loads", no_wrap=True)
    table.add_column("where it comes from; why it cannot be loaded", overflow="fold")
    ours = [e for e in listed if e.kind == AXIS_RULES.kind and e.built_in and e.reason is None]
    for extension in listed:
        if extension in ours:
            continue
        lines = [Text(f"{origin.distribution}: {origin.loaded_from}") for origin in extension.origins]
        lines += [Text(extension.reason, style="red")] if extension.reason is not None else []
        loads = Text("yes", style="green") if extension.reason is None else Text("no", style="red")
        table.add_row(extension.kind, Text(extension.name, style="bold"), loads, Text("\n").join(lines))
    table.add_row(AXIS_RULES.kind, f"of {len(ours)} operators of torch", Text("yes", style="green"), _OURS)
    Console().print(table)


@dataclasses.dataclass(frozen=True)
class ListedExtension:
    """A name under which an extension is installed.

    Args:
        kind: Backend, pass, estimator, update rule, loss, or axis rule.
        name: Its name; an axis rule's is that of the operator.
        origins: Who claims the name; more than one if packages collide.
        reason: Why it cannot be loaded; None if it can.
    """

    kind: str
    name: str
    origins: tuple[Origin, ...]
    reason: str | None

    @property
    def built_in(self) -> bool:
        """Whether this package alone brings it."""
        return all(origin.distribution == _OURS for origin in self.origins)


def list_extensions() -> list[ListedExtension]:
    """Everything that is installed, by kind and name. None can break the list."""
    return [
        ListedExtension(registry.kind, name, origins_of(registry, name), _why_not(registry, name))
        for registry in REGISTRIES
        for name in sorted(registry.names())
    ]


_OURS = f"{DISTRIBUTION} {__version__}"


def origins_of(registry: Registry[Any], name: str) -> tuple[Origin, ...]:
    """Who claims a name, each with its distribution."""

    def told(origin: Origin) -> Origin:
        own = _OURS if origin.package == "mobizo_compiler" else "this process"
        return dataclasses.replace(origin, distribution=origin.distribution or own)

    return tuple(told(origin) for origin in registry.claims(name))


def _why_not(registry: Registry[Any], name: str) -> str | None:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a package prints is not part of the list
            registry.load(name)
    except MobizoError as error:
        return " ".join(line.strip() for line in str(error).splitlines())
    return None
