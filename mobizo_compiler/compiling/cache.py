"""Compiled programs kept by content: the same graph, weights, options and versions give the same file."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path

from mobizo_compiler.errors import ArtifactError
from mobizo_compiler.format.checksum import add_tensor
from mobizo_compiler.format.files import remove_partial
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.format.program import Program
from mobizo_compiler.graph.printer import program_text
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.load import load


def cached(
    folder: Path,
    methods: Mapping[str, GraphProgram],
    manifest: Manifest,
    suffix: str,
    say: Callable[[str], None],
    compile_anew: Callable[[], Program],
    options: str = "",
) -> Program:
    """The program in `folder` whose name is the hash of everything it is made from; made and kept there if missing."""
    key = content_key(methods, manifest, options)
    path = folder / f"{key}{suffix}"
    if path.exists():
        try:
            program = load(path)
        except ArtifactError as error:
            say(f"cached, but not usable: {error.problem}: {path}")
        else:
            say(f"cached: {path}")
            return program
    program = compile_anew()
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial(folder)  # names are hashes, so that nobody may ever write one of them again
    program.save(path)
    return program


def content_key(methods: Mapping[str, GraphProgram], manifest: Manifest, options: str = "") -> str:
    """SHA-256 over the graphs after all passes, every tensor, the manifest, the backend's options and the packages.

    The graphs are those that go into lowering, so a change in any pass changes the key; what happens during lowering
    is covered by the versions of the packages that do it and by the source of the backends.
    """
    digest = hashlib.sha256()
    digest.update(manifest.to_json().encode())
    digest.update(options.encode())
    digest.update(importlib.metadata.version("mobizo-compiler").encode())
    for source in sorted((Path(__file__).parent.parent / "backends").rglob("*.py")):
        digest.update(source.read_bytes())
    seen: set[int] = set()
    for name, program in methods.items():
        digest.update(f"{name}\n{program_text(program)}".encode())
        for target, tensor in sorted({**program.exported.state_dict, **program.exported.constants}.items()):
            add_tensor(digest, target, tensor, values=tensor.data_ptr() not in seen)
            seen.add(tensor.data_ptr())
    return digest.hexdigest()
