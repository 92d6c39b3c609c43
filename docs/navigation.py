"""A hook of mkdocs: `folder/*` in the navigation stands for the pages of that folder that it does not name itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Fill in the pages of folders, in the order of their names."""
    docs = Path(config["docs_dir"])
    config["nav"] = _filled(config["nav"], docs, named=set(_pages(config["nav"])))
    return config


def _pages(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    inner = entry.values() if isinstance(entry, dict) else entry
    return [page for part in inner for page in _pages(part)]


def _filled(entries: list[Any], docs: Path, named: set[str]) -> list[Any]:
    found: list[Any] = []
    for entry in entries:
        if isinstance(entry, str) and entry.endswith("/*"):
            pages = sorted(path.relative_to(docs).as_posix() for path in (docs / entry).parent.glob("*.md"))
            found += [page for page in pages if page not in named]
        elif isinstance(entry, dict):
            title, inner = next(iter(entry.items()))
            found.append({title: _filled(inner, docs, named) if isinstance(inner, list) else inner})
        else:
            found.append(entry)
    return found
