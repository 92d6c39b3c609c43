"""Options that are the fields of configurations, and the file that may give them.

The dataclasses say which fields there are, what they mean (the `Args` of their text) and which values are allowed;
here is only how a field is named and read. `LoraConfig.r` is `--lora-r` on the command line and `r` under `[lora]` in a
file. A field that is added to a dataclass is an option of the command at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import json
import re
import tomllib
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import typer
import yaml

from mobizo_compiler.cli.app import app
from mobizo_compiler.errors import ConfigError

_NAME = re.compile(r"[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Section:
    """Dataclasses whose fields are options of a command.

    Args:
        parameter: Parameter of the command that gets the values that were given, by field.
        types: The dataclasses; a field that several have is one option.
        table: Table of the file, and what the names of the options begin with; none if empty.
        head: The field that the table's name itself stands for: `--quantization` is its `recipe`.
        panel: Heading in the help.
        text: Fields that are read as a list of texts, whatever the dataclass says.
        alone: Fields whose options may be written without the table's name as well.
    """

    parameter: str
    types: tuple[type, ...]
    table: str
    panel: str
    head: str | None = None
    text: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()

    def fields(self) -> dict[str, tuple[Any, str]]:
        """Type and help of every field, by name."""
        found: dict[str, tuple[Any, str]] = {}
        for cls in self.types:
            hints = get_type_hints(cls)
            helps = {name: text for base in reversed(cls.__mro__) for name, text in argument_texts(base).items()}
            for field in dataclasses.fields(cls):
                hint = tuple[str, ...] if field.name in self.text else hints[field.name]
                default = "" if field.default in (None, dataclasses.MISSING) else f" [default: {_shown(field.default)}]"
                found.setdefault(field.name, (hint, helps.get(field.name, "") + default))
        return found

    def takes_json(self, field: str) -> bool:
        """Whether a field is a table of its own."""
        return any(get_origin(kind) is dict for kind in _alternatives(self.fields()[field][0]))


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def option_name(table: str, field: str, head: str | None = None) -> str:
    """The name of a field as an option, with underscores.

    >>> option_name("lora", "r"), option_name("lora", "lora_alpha"), option_name("quantization", "recipe", "recipe")
    ('lora_r', 'lora_alpha', 'quantization')
    """
    if field == head:
        return table
    return field if not table or field.startswith(f"{table}_") else f"{table}_{field}"


def argument_texts(cls: type) -> dict[str, str]:
    """What the `Args` of a docstring say, by name.

    >>> argument_texts(Section)["panel"]
    'Heading in the help.'
    """
    parsed = docstring_parser.parse(cls.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
    return {item.arg_name: " ".join((item.description or "").split()) for item in parsed.params}


def read_text(hint: Any, text: str) -> Any:
    r"""The value of a field from the text of an option.

    A list is items with commas between, or a JSON list. Where one text is allowed besides a list of names, items that
    look like names are a list and anything else is the text.

    >>> read_text(float | str, "0.5"), read_text(float | str, "auto"), read_text(tuple[int, ...] | None, "1,2")
    (0.5, 'auto', (1, 2))
    >>> either = tuple[str, ...] | str | None
    >>> read_text(either, "q_proj,v_proj"), read_text(either, r".*\.q_proj"), read_text(either, "all-linear")
    (('q_proj', 'v_proj'), '.*\\.q_proj', 'all-linear')
    """
    kinds = [kind for kind in _alternatives(hint) if kind is not type(None)]
    for kind in kinds:
        if kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
        if get_origin(kind) is dict:
            return _json_object(text)
        if get_origin(kind) is tuple:
            inner = get_args(kind)[0]
            items = json.loads(text) if text.startswith("[") else [item.strip() for item in text.split(",")]
            names = all(isinstance(item, str) and _NAME.fullmatch(item) for item in items) and text != "all-linear"
            if names or str not in kinds:
                return tuple(read_text(inner, item) if isinstance(item, str) else item for item in items)
    if str in kinds or any(get_origin(kind) is Literal for kind in kinds):
        return text
    raise ValueError(f"{text!r} is not a {_described(hint)}")


def _json_object(text: str) -> dict[str, Any]:
    with contextlib.suppress(json.JSONDecodeError):
        if isinstance(found := json.loads(text), dict):
            return found
    raise ValueError(f"{text!r} is not a JSON object")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _described(hint: Any) -> str:
    """A type in the words of a help text."""
    words = []
    for kind in _alternatives(hint):
        if get_origin(kind) is Literal:
            words.append("|".join(map(str, get_args(kind))))
        elif get_origin(kind) is dict:
            words.append("JSON")
        elif get_origin(kind) is tuple:
            words.append({int: "numbers", str: "names"}.get(get_args(kind)[0], "list"))
        elif kind is not type(None):
            words.append({int: "integer", float: "number", str: "text"}.get(kind, getattr(kind, "__name__", "value")))
    return " or ".join(words)


def chosen(table: str, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """An extension as JSON: its name, its options that are fields of a section, and those of `--TABLE-options`.

    Raises:
        ConfigError: An option is among both.
    """
    more = given.pop("options", None) or {}
    if twice := sorted({"name", *given} & set(more)):
        raise ConfigError(f"--{table}-options has {twice[0]!r}, which is given by another option")
    return {"name": name, **given, **more}


def with_sections(*sections: Section) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of sections; it gets what was given of each as a dictionary of fields."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        plain = inspect.signature(command, eval_str=True).parameters
        parameters = {name: p for name, p in plain.items() if name not in {s.parameter for s in sections}}
        places: dict[str, tuple[str, str]] = {}
        for section in sections:
            for field, (hint, text) in section.fields().items():
                name = option_name(section.table, field, section.head)
                assert name not in parameters, f"two options are called {name}"
                places[name] = section.parameter, field
                short = (field,) if field in section.alone else ()
                parameters[name] = _parameter((*short, name), hint, text, section.panel)

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given: dict[str, dict[str, Any]] = {section.parameter: {} for section in sections}
            for name, (parameter, field) in places.items():
                value = values.pop(name)
                if value is not None:
                    given[parameter][field] = value
            command(**values, **given)

        del run.__dict__["__wrapped__"]
        ordered = sorted(parameters.values(), key=lambda p: p.default is not inspect.Parameter.empty)
        run.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in ordered}
        _SECTIONS[command.__name__] = sections
        return run

    return decorate


_SECTIONS: dict[str, tuple[Section, ...]] = {}


def _parameter(names: tuple[str, ...], hint: Any, text: str, panel: str) -> inspect.Parameter:
    option, *others = ["--" + name.replace("_", "-") for name in names]
    kinds = [kind for kind in _alternatives(hint) if kind is not type(None)]
    if kinds == [bool]:
        annotation: Any = Annotated[
            bool | None,
            typer.Option(f"{option}/--no-{option[2:]}", help=text, rich_help_panel=panel, show_default=False),
        ]
    else:
        parse = functools.partial(read_text, hint)
        parse.__name__ = _described(hint)  # type: ignore[attr-defined]
        annotation = Annotated[
            Any,
            typer.Option(
                option,
                *others,
                help=text,
                rich_help_panel=panel,
                parser=parse,
                metavar=_described(hint),
                show_default=False,
            ),
        ]
    return inspect.Parameter(names[-1], inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _from_file(ctx: typer.Context, path: Path | None) -> Path | None:
    """Let a file give what the command line does not."""
    if path is None:
        return None
    options = [(parameter.name, option) for parameter in ctx.command.params for option in parameter.opts]
    names = {option[2:].replace("-", "_"): name for name, option in options if option.startswith("--")}
    names |= {name: name for name, option in options if not option.startswith("-")}
    names = {option: name for option, name in names.items() if name not in ("config", "help")}
    sections = _SECTIONS.get(getattr(ctx.command.callback, "__name__", ""), ())
    given = read_config(path, str(ctx.info_name), set(names), sections)
    ctx.default_map = {**(ctx.default_map or {}), **{str(names[option]): value for option, value in given.items()}}
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML or YAML file with options of this command; what the command line gives goes first.",
        callback=_from_file,
        is_eager=True,
        show_default=False,
    ),
]


def read_config(path: Path, command: str, names: set[str], sections: Sequence[Section]) -> dict[str, Any]:
    """The options of a command in a file: its keys, or those of the table with the command's name.

    Args:
        path: A `.toml`, `.yaml` or `.yml` file.
        command: Name of the command.
        names: Its options, with underscores.
        sections: Tables for configurations.

    Raises:
        ConfigError: The file cannot be read, or has a key that is no option.
    """
    values = _parsed(path)
    commands = {info.name for info in app.registered_commands}
    if commands & values.keys():
        if unknown := sorted(values.keys() - commands):
            raise ConfigError(
                f"{unknown[0]!r} is beside tables of commands", where=str(path), hint=f"move it into [{command}]"
            )
        values = values.get(command, {})
    tables = {section.table: section for section in sections if section.table}
    found: dict[str, Any] = {}
    for key, value in values.items():
        section = tables.get(key)
        inner = value if isinstance(value, Mapping) else {}
        if section is None or not isinstance(value, Mapping):
            inner, section = {key: value}, None
        for field, item in inner.items():
            plain = str(field).replace("-", "_")
            name = option_name(section.table, plain, section.head) if section else plain
            known = plain in section.fields() if section else name in names
            if not known:
                fields = sorted(section.fields() if section else names | tables.keys())
                near = difflib.get_close_matches(plain, fields, 1)
                raise ConfigError(
                    f"there is no option {field!r}" + (f" in [{key}]" if section else f" of mobizo {command}"),
                    where=str(path),
                    hint=f"did you mean {near[0]!r}?" if near else f"there are {', '.join(fields)}",
                )
            table = isinstance(item, Mapping) and not (section and section.takes_json(plain))
            if table or name in found:
                raise ConfigError(
                    f"option {field!r} is " + ("a table" if name not in found else "there twice"), where=str(path)
                )
            found[name] = _as_text(item, name)
    return found


def _as_text(value: Any, name: str) -> Any:
    """A value of a file as the command line would write it; repeated options take lists."""
    if isinstance(value, bool) or value is None:
        return value
    return json.dumps(value) if isinstance(value, (list, Mapping)) else str(value)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the file cannot be read: {error}", where=str(path)) from None
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise ConfigError("a file with options is .toml, .yaml or .yml", where=str(path))
    if not isinstance(values, Mapping):
        raise ConfigError("the file has no options by name", where=str(path))
    return dict(values)
