"""Extensions: backends, estimators, update rules, losses and axis rules, each found by its name.

A built-in extension and one of another package are the same thing: a name, and the string `"package.module:Object"`
that it is loaded from. Other packages put theirs into an entry-point group. Listing names imports nothing; a name that
two packages claim is an error when it is used, and no other; what cannot be loaded harms nothing but itself.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from mobizo_compiler.errors import ConfigError, ExtensionUnavailableError, MobizoError, UnknownExtensionError
from mobizo_compiler.options import JsonConfig

T = TypeVar("T")
J = TypeVar("J", bound=JsonConfig)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Who claims a name.

    Args:
        loaded_from: `"package.module:Object"`.
        distribution: Name and version of the package that brings it; None for a part of this one, or of this process.
    """

    loaded_from: str
    distribution: str | None = None

    @property
    def package(self) -> str:
        """The package that is imported."""
        return self.loaded_from.partition(":")[0].partition(".")[0]


class Registry(Generic[T]):
    """The extensions of one kind by name.

    Args:
        kind: What they are, for messages: "update rule".
        group: The group of entry points of other packages.
        base: What an extension is an instance of.
        built_in: Those of this package: where each name is loaded from.
        page: The page for authors.
        unknown: Error about a name.
        unavailable: Error about what is behind a name.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        base: type[T],
        built_in: Mapping[str, str],
        *,
        page: str = "docs/writing_an_estimator.md",
        unknown: type[MobizoError] = UnknownExtensionError,
        unavailable: type[MobizoError] = ExtensionUnavailableError,
    ) -> None:
        self.kind, self.group, self.base, self.built_in, self.page = kind, group, base, built_in, page
        self._unknown, self._unavailable = unknown, unavailable
        self._registered: dict[str, Any] = {}

    def origins(self) -> dict[str, tuple[Origin, ...]]:
        """Who claims each name; more than one where packages collide. Imports nothing."""
        names = [*self.built_in, *self._registered, *_entry_points(self.group)]
        return {name: self.claims(name) for name in dict.fromkeys(names)}

    def claims(self, name: str) -> tuple[Origin, ...]:
        """Who claims a name; nobody, if there is no such extension. Imports nothing."""
        own = [self.built_in[name]] if name in self.built_in else []
        own += [path_of(self._registered[name])] if name in self._registered else []
        found = {text: Origin(text) for text in own}
        for origin in _entry_points(self.group).get(name, ()):
            found.setdefault(origin.loaded_from, origin)
        return tuple(found.values())

    def names(self) -> dict[str, str]:
        """Every name, and what it is loaded from; a name that several packages claim has all their strings."""
        return {name: " and ".join(o.loaded_from for o in origins) for name, origins in self.origins().items()}

    def register(self, name: str, value: Any) -> None:
        """Let a name mean this in the running process.

        Raises:
            ConfigError: The name is taken, or the value is no such extension.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"the name of {_a(self.kind)} is {name!r}; it must be a text")
        if fault := self.fault(value) or self.misnamed(name, value):
            raise ConfigError(f"{value!r} is not {_a(self.kind)}: {fault}", hint=f"see {self.page}")
        # A cell of a notebook that is run again.
        again = name in self._registered and path_of(self._registered[name]) == path_of(value)
        if self.claims(name) and not again:
            raise ConfigError(f"there is {_a(self.kind)} {name!r} already")
        self._registered[name] = value

    def unregister(self, name: str) -> None:
        """Take back what `register` did; what is built in or installed stays."""
        self._registered.pop(name, None)

    def load(self, name: str) -> Any:
        """What is behind a name.

        Raises:
            UnknownExtensionError: There is no such name, or two packages claim it.
            ExtensionUnavailableError: It cannot be loaded, or is no such extension.
        """
        claims = self.claims(name)
        if not claims:
            raise self._unknown(
                f"there is no {self.kind} {name!r}", hint=f"installed: {', '.join(sorted(self.names()))}"
            )
        if len(claims) > 1:
            raise self._unknown(
                f"{self.kind} {name!r} is claimed by {' and by '.join(repr(o.loaded_from) for o in claims)}",
                hint="uninstall all but one of the packages",
            )
        if name in self._registered:
            return self._registered[name]
        (origin,) = claims
        module, _, attribute = origin.loaded_from.partition(":")
        try:
            loaded = self.made(functools.reduce(getattr, attribute.split("."), importlib.import_module(module)))
        except (Exception, SystemExit) as error:
            raise self._unavailable(f"{self.kind} {name!r} ({origin.loaded_from}) cannot be loaded: {error}") from error
        if fault := self.fault(loaded) or self.misnamed(name, loaded):
            raise self._unavailable(
                f"{self.kind} {name!r} ({origin.loaded_from}) is not {_a(self.kind)}: {fault}", hint=f"see {self.page}"
            )
        return loaded

    def made(self, loaded: Any) -> Any:
        """The extension from the object that an entry point names; this is called where anything may break."""
        return loaded

    def misnamed(self, name: str, loaded: Any) -> str | None:
        """Why it cannot have this name."""
        return None

    def fault(self, loaded: Any) -> str | None:
        """Why this is not an extension of this kind."""
        return None if isinstance(loaded, self.base) else f"it is {_a(type(loaded))}, not {_a(self.base)}"


class DataclassRegistry(Registry[J]):
    """Extensions that are frozen dataclasses: a name means a class, and its fields are options.

    As JSON, one is `{"name": name, **options}`.
    """

    def get(self, value: str | Mapping[str, Any] | J) -> J:
        """One of them from its name, from its JSON, or itself.

        Raises:
            UnknownExtensionError: There is none of that name, or two packages claim it.
            ExtensionUnavailableError: It cannot be loaded.
            ConfigError: It is something else, or has no name, or an option is out of range.
        """
        if isinstance(value, self.base):
            self.name_of(type(value))
            return value
        options = dict(value) if isinstance(value, Mapping) else {"name": value}
        name = options.pop("name", None)
        if not isinstance(name, str):
            found = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
            hint = f"use one of {', '.join(sorted(self.names()))}, or {_a(self.base)}"
            if isinstance(value, type) and issubclass(value, self.base):
                hint = f"make one of it: {value.__name__}()"
            raise ConfigError(f"the {self.kind} is {found}", hint=hint)
        cls = self.class_of(name)
        try:
            return cls.from_json(options)
        except MobizoError:
            raise
        except Exception as error:
            raise ConfigError(f"{self.kind} {name!r} does not take {options}: {error}") from error

    def class_of(self, name: str) -> type[J]:
        """The class behind a name; raises as `load` does."""
        found: type[J] = self.load(name)
        return found

    def described(self, value: J) -> dict[str, Any]:
        """Inverse of `get`: JSON values.

        Raises:
            ConfigError: Its class has no name.
        """
        return {"name": self.name_of(type(value)), **value.to_json()}

    def name_of(self, cls: type[J]) -> str:
        """The name of a class; raises `ConfigError` where it has none."""
        package = cls.__module__.partition(".")[0]
        for name, origins in self.origins().items():
            # A class may be named by another module than the one that it is written in, but of the same package.
            if name in self._registered or any(o.package == package for o in origins):
                try:
                    if self.load(name) is cls:
                        return name
                except MobizoError:  # another one of the package is broken: its own affair
                    continue
        raise ConfigError(
            f"{cls.__name__} has no name under which a program can have it as its {self.kind}",
            hint=f"give it an entry point in the group {self.group} (see {self.page}), or register it",
        )

    def fault(self, loaded: Any) -> str | None:
        """Why this is not a class of this kind."""
        if not isinstance(loaded, type) or not issubclass(loaded, self.base):
            what = f"the class {loaded.__name__}" if isinstance(loaded, type) else _a(type(loaded))
            return f"it is {what}, not a dataclass derived from {self.base.__name__}"
        cls: Any = loaded
        if inspect.isabstract(cls):
            return f"it has no {', no '.join(sorted(cls.__abstractmethods__))}"
        options = {name for name, text in inspect.get_annotations(cls).items() if "ClassVar" not in str(text)}
        if not cls.__dataclass_params__.frozen or (options and "__dataclass_fields__" not in vars(cls)):
            return "it is not a frozen dataclass: @dataclasses.dataclass(frozen=True) is missing"
        if "name" in {field.name for field in dataclasses.fields(cls)}:
            return "it has an option called 'name', which is taken in its JSON"
        return None


def spelled(value: str | Mapping[str, Any]) -> str:
    """A name, or the JSON of an extension, as text for people.

    >>> spelled("two-sided"), spelled({"name": "adam", "beta1": 0.9})
    ('two-sided', 'adam(beta1=0.9)')
    """
    if isinstance(value, str):
        return value
    options = ", ".join(f"{name}={option!r}" for name, option in value.items() if name != "name")
    return f"{value['name']}({options})" if options else str(value["name"])


def _a(noun: str | type) -> str:
    text = noun if isinstance(noun, str) else noun.__name__
    return f"{'an' if text[0] in 'aeiouAEIOU' else 'a'} {text}"


def path_of(value: Any) -> str:
    """The string that an object of a module, or the class of another one, is loaded from."""
    value = getattr(value, "function", value)
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}:{kind.__qualname__}"


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown package"


def _entry_points(group: str) -> Mapping[str, tuple[Origin, ...]]:
    """Those of all installed packages, read again when a package has come or gone."""
    return _read_entry_points(group, tuple((path, _changed(path)) for path in sys.path))


@functools.lru_cache(maxsize=8)
def _read_entry_points(group: str, folders: tuple[tuple[str, int], ...]) -> Mapping[str, tuple[Origin, ...]]:
    found: dict[str, tuple[Origin, ...]] = {}
    for point in entry_points(group=group):
        found[point.name] = (*found.get(point.name, ()), Origin(point.value, _distribution(point)))
    return found


def _changed(path: str) -> int:
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return 0
