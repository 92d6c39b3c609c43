"""The page about the public names, from their docstrings."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from docstring_parser import DocstringMeta, DocstringStyle, parse

from mobizo_compiler.options import JsonConfig

# What people write programs with, then what they write extensions with. None: the classes and functions in the
# module's `__all__`.
PUBLIC: dict[str, tuple[str, ...] | None] = {
    "mobizo_compiler": None,
    "mobizo_compiler.export_recipe": ("MobizoRecipeType",),
    "mobizo_compiler.reference": ("ReferenceStep",),
    "mobizo_compiler.backends": None,
    "mobizo_compiler.graph.pipeline": ("Pass", "Pipeline"),
    "mobizo_compiler.analysis.axes": ("AxisRule", "Call", "Layout", "RowsMix", "axis_rule"),
    "mobizo_compiler.testing": None,
}
_FIRST = ("compile", "load", "Program", "Session", "StepResult")  # the others follow by name
_SECTION = re.compile(r"(Args|Returns|Raises):\n")


def reference_page() -> list[str]:
    """Lines of the page: every public name with its signature and docstring."""
    lines = []
    for module_name, chosen in PUBLIC.items():
        module = importlib.import_module(module_name)
        lines += [f"## {module_name}\n", _first_paragraph(module)]
        names = chosen or [name for name in module.__all__ if callable(getattr(module, name))]
        for name in sorted(names, key=lambda name: (name not in _FIRST, name.lower())):
            value = getattr(module, name)
            if value.__name__ != name:
                lines.append(f"### `{name}`\n\nAnother name of [`{value.__name__}`](#{value.__name__.lower()}).\n")
            else:
                lines += _described(name, value)
    return lines


def _first_paragraph(module: ModuleType) -> str:
    return _prose((inspect.getdoc(module) or "").split("\n\n")[0]) + "\n"


def _described(name: str, value: Any) -> list[str]:
    lines = [f"### `{name}`\n"]
    if not inspect.isclass(value):
        return [*lines, _signature(name, value), _docstring(value)]
    bases = [base.__name__ for base in value.__bases__ if base.__module__ not in ("builtins", "typing", "abc")]
    bases = [base for base in bases if not base.startswith("_")]
    if not issubclass(value, BaseException) and value.__init__ is not object.__init__ and not _is_protocol(value):
        lines.append(_signature(name, value))
    lines.append(_docstring(value))
    if bases:
        lines.append(f"Bases: {', '.join(f'`{base}`' for base in bases)}.\n")
    for member, item in _members(value):
        kind = "property" if isinstance(item, property) else "method"
        target = item.fget if isinstance(item, property) else getattr(item, "__func__", item)
        lines.append(f"#### `{name}.{member}`\n")
        lines.append(f"A {kind}.\n" if kind == "property" else _signature(member, target))
        lines.append(_docstring(target))
    return lines


def _is_protocol(cls: type) -> bool:
    return bool(getattr(cls, "_is_protocol", False))


def _members(cls: type) -> list[tuple[str, Any]]:
    """Public methods and properties of this package, those of base classes included, in the order of the source."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("mobizo_compiler") and base is not JsonConfig:
            for name, item in vars(base).items():
                public = not name.startswith("_") or (name == "__call__" and _is_protocol(cls))
                if public and (isinstance(item, (property, classmethod, staticmethod)) or inspect.isfunction(item)):
                    found[name] = item
    return list(found.items())


def _signature(name: str, item: Any) -> str:
    """The signature as its source has it, over several lines where it is long."""
    if inspect.isclass(item):
        written, returned = _fields(item) if dataclasses.is_dataclass(item) else _arguments(item.__init__)[0], ""
    else:
        written, returned = _arguments(item)
    arrow = f" -> {returned}" if returned else ""
    text = f"{name}({', '.join(written)}){arrow}"
    if len(text) > 110:
        text = "\n".join([f"{name}(", *(f"    {argument}," for argument in written), f"){arrow}"])
    return f"```text\n{text}\n```\n"


def _arguments(function: Callable[..., Any]) -> tuple[list[str], str]:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(node, ast.FunctionDef)
    arguments = node.args
    if arguments.args and arguments.args[0].arg in ("self", "cls", "session"):  # what a method is bound to
        del arguments.args[0]
    positional = [ast.unparse(argument) for argument in arguments.args]
    for position, default in enumerate(reversed(arguments.defaults), start=1):
        positional[-position] += f" = {ast.unparse(default)}"
    keywords = [
        ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else "")
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    star = [f"*{ast.unparse(arguments.vararg)}"] if arguments.vararg else ["*"] if keywords else []
    more = [f"**{ast.unparse(arguments.kwarg)}"] if arguments.kwarg else []
    return [*positional, *star, *keywords, *more], ast.unparse(node.returns) if node.returns else ""


def _fields(cls: type) -> list[str]:
    fields = [field for field in dataclasses.fields(cls) if field.init] if dataclasses.is_dataclass(cls) else []
    written = []
    for field in fields:
        default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        default = default if field.default_factory is dataclasses.MISSING else " = ..."
        written.append(f"{field.name}: {field.type}{default}")
    return written


def _docstring(item: Any) -> str:
    """A docstring as Markdown: the prose, its sections as lists, its doctest as text."""
    text = inspect.getdoc(item) or ""
    if dataclasses.is_dataclass(item) and text.startswith(f"{getattr(item, '__name__', '')}("):
        text = ""
    text, _, example = text.partition(">>> ")
    paragraphs = text.strip().split("\n\n")
    sections = [place for place, paragraph in enumerate(paragraphs) if _SECTION.match(paragraph)]
    first, last = (sections[0], sections[-1]) if sections else (len(paragraphs), len(paragraphs))
    prose = ["\n\n".join(paragraphs[:first]), "\n\n".join(paragraphs[last + 1 :])]
    lines = [_prose(prose[0]), ""]
    parsed = parse(text, DocstringStyle.GOOGLE)
    for title, found in (("Args", parsed.params), ("Returns", parsed.many_returns), ("Raises", parsed.raises)):
        lines += _section(title, found)
    lines.append(_prose(prose[1]))
    if example:
        lines.append(f"\n```pycon\n>>> {example.rstrip()}\n```")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines).strip()) + "\n"


def _section(title: str, found: Sequence[DocstringMeta]) -> list[str]:
    """A section as a list of what it names, or as a sentence."""
    if title == "Returns":
        return [f"**{title}** {_prose(item.description or '')}\n" for item in found]
    items = [f"- `{item.args[1]}`: {' '.join(_prose(item.description or '').split())}" for item in found]
    return [f"**{title}**\n", *items, ""] if items else []


def _prose(text: str) -> str:
    """Docstring text that Markdown shows as it is written."""
    return re.sub(r"(?<=\n)    (?=\S)", "", text.strip())
