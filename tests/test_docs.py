"""Documentation that can be checked: generated pages, test vectors, and the code of the README."""

from __future__ import annotations

import argparse
import json
import math
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import typer
import yaml

import examples.minilm
from docs.blocks import Block, blocks, indented_code
from docs.blocks import pages as block_pages
from docs.generate import pages
from mobizo_compiler import backends, noise
from mobizo_compiler.cli import app
from mobizo_compiler.errors import MobizoError, raised_errors

ROOT = Path(__file__).parent.parent
MASK = 0xFFFFFFFF


def test_generated_pages_are_fresh() -> None:
    assert [path.name for path, text in pages().items() if path.read_text() != text] == []


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def words(seed: int, query: int, counter: int) -> tuple[int, int]:
    """The definition in docs/program_format.md, in whole numbers."""
    key1 = mix(mix(seed + 0x9E3779B9 & MASK) ^ (query * 0x85EBCA6B + 1 & MASK))
    key2 = mix(key1 + 0x5851F42D & MASK)
    key3 = mix(key2 + 1 & MASK)
    a = mix(mix((counter * 0x9E3779B9 & MASK) ^ key1) + key2 & MASK)
    return a, mix(a ^ key3)


def vectors() -> list[list[str]]:
    text = (ROOT / "docs" / "program_format.md").read_text()
    table = text.split("<!-- vectors -->")[1].split("<!-- end of vectors -->")[0].strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.parametrize("row", vectors(), ids=lambda row: f"seed {row[0]} query {row[1]}")
def test_noise_vectors_follow_from_the_definition(row: list[str]) -> None:
    seed, query = int(row[0]), int(row[1])
    pairs = [words(seed, query, counter) for counter in range(8)]
    assert row[2].split() == [f"{a:08x}" for a, _ in pairs[:4]]
    assert row[3].split() == [f"{b:08x}" for _, b in pairs[:4]]
    wanted = []
    for a, b in pairs[:2]:
        radius = math.sqrt(-2 * math.log(((a >> 8) + 0.5) / 2**24))
        angle = (b >> 8) * (2 * math.pi / 2**24)
        wanted += [radius * math.cos(angle), radius * math.sin(angle)]
    assert [float(z) for z in row[4].split()] == pytest.approx(wanted, abs=1.5e-5)
    assert [int(z) for z in row[5].split()] == [-1 if a >> 31 else 1 for a, _ in pairs]
    torch.testing.assert_close(noise(seed, 2, 4)[query].double(), torch.tensor(wanted).double(), rtol=0, atol=2e-6)


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


# -- code blocks -------------------------------------------------------------------------------------------------------

LANGUAGES = {"python", "pycon", "console", "text", "yaml", "toml", "json"}  # pycon: doctests, run as such
# Blocks of Python that the tests do not run; each says why in its note.
NOT_RUN = {"docs/backends/aot_inductor.md": 1, "docs/backends/cuda.md": 1, "docs/backends/vulkan.md": 1}
BLOCKS = [block for page in block_pages() for block in blocks(page)]


def place(block: Block) -> str:
    return f"{block.page.relative_to(ROOT)}:{block.line}"


def run_here(block: Block) -> bool:
    """Whether this is Python that is run here: not an excerpt, which is run where it comes from."""
    return block.language == "python" and not {"of", "section", "not run"} & set(block.notes)


def test_no_block_escapes() -> None:
    """Every block has a fence and a language, and what is not run is known."""
    for page in block_pages():
        assert not (lines := indented_code(page.read_text())), f"{page.name}: code without a fence in lines {lines}"
        assert page.read_text().count("\n```") == 2 * len(blocks(page)), f"{page.name}: a fence inside of a list"
    for block in BLOCKS:
        assert block.language in LANGUAGES, f"{place(block)}: language {block.language!r}"
        assert len(block.notes.get("not run", "a reason")) > 5, f"{place(block)} does not say why it is not run"
    left_out = Counter(str(b.page.relative_to(ROOT)) for b in BLOCKS if "not run" in b.notes)
    assert left_out == NOT_RUN


def test_excerpts_are_in_the_files_that_they_name() -> None:
    quotes = [block for block in BLOCKS if "of" in block.notes]
    assert len(quotes) >= 4
    for block in quotes:
        name = block.notes["of"]
        file = next(f for f in (ROOT / name, ROOT / "examples" / "openvino_backend" / name) if f.exists())
        lines, inside = (
            [line.strip() for line in s.splitlines() if line.strip()] for s in (block.text, file.read_text())
        )
        assert "\n".join(lines) in "\n".join(inside), f"{place(block)} is not in {name}"


def run_page(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Run the Python of a page from top to bottom, in an empty folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(backends, "BUILT_IN", dict(backends.BUILT_IN))
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if not run_here(block):
            continue
        exec(compile(block.notes.get("setup", ""), f"setup of {place(block)}", "exec"), names)
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True)
        if wanted := block.notes.get("raises"):
            with pytest.raises(MobizoError) as caught:
                exec(code, names)
            assert caught.value.code == wanted, place(block)
        else:
            exec(code, names)
    return names


def runnable(slow: bool) -> list[Any]:
    found = dict.fromkeys(block.page for block in BLOCKS if run_here(block))
    chosen = [page for page in found if slow or not any("slow" in block.notes for block in blocks(page))]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in chosen]


@pytest.mark.parametrize("page", runnable(slow=False))
def test_python_blocks_run(page: Path, request: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the first layers of models that pages load."""
    if "load_smollm2" in page.read_text():
        loaded = request.getfixturevalue("smollm2")
        monkeypatch.setattr("examples.smollm2.load_smollm2", lambda: loaded)
    if "load_minilm" in page.read_text():
        load = examples.minilm.load_minilm
        monkeypatch.setattr(examples.minilm, "load_minilm", lambda layers, seed=0: load(1, seed))
    names = run_page(page, tmp_path, monkeypatch)
    if page.name == "README.md":
        assert (tmp_path / "smollm2.pte").exists() and names["session"].state().any()  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("page", runnable(slow=True))
def test_python_blocks_run_on_whole_models(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not {"load_smollm2", "load_minilm"} & set(re.findall(r"\w+", page.read_text())):
        pytest.skip("it loads no model; test_python_blocks_run is the same")
    run_page(page, tmp_path, monkeypatch)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("yaml", "toml", "json")], ids=place)
def test_data_blocks_parse(block: Block) -> None:
    assert {"yaml": yaml.safe_load, "toml": tomllib.loads, "json": json.loads}[block.language](block.text)


COMMANDS = [(place(b), line) for b in BLOCKS if b.language == "console" for line in b.text.splitlines() if line.strip()]
COMMANDS += [
    (str(page.relative_to(ROOT)), command)
    for page in block_pages()
    for command in re.findall(r"`((?:mobizo|make|python -m) [a-z][^`]*)`", page.read_text())
]


class _Parsed(Exception):
    pass


@pytest.mark.parametrize("command", dict.fromkeys(command for _, command in COMMANDS))
def test_commands_have_these_options(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of a page is parsed by the program that it calls, and stops there."""
    words = shlex.split(command.replace("[", "").replace("]", "").replace(" ...", ""), comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    match words:
        case ["make", *targets]:
            known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            assert {t for t in targets if "=" not in t} <= known
        case ["mobizo", *arguments] | ["python", "-m", "mobizo_compiler", *arguments]:
            group: Any = typer.main.get_command(app)
            if arguments:
                try:
                    group.commands[arguments[0]].make_context(arguments[0], arguments[1:])
                except click.BadParameter as error:
                    assert "does not exist" in str(error), error
        case ["python", "-m", "docs.generate", *arguments]:
            assert set(arguments) <= {"--check"}
        case ["python", "-m", module, *arguments]:
            parse = argparse.ArgumentParser.parse_args

            def parse_args(parser: Any, *args: Any, **kwargs: Any) -> None:
                parse(parser, *args, **kwargs)
                raise _Parsed

            monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            monkeypatch.setattr(sys, "argv", [module, *arguments])
            with pytest.raises(_Parsed), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # that the module is imported already
                runpy.run_module(module, run_name="__main__")
        case ["pip", "install", *arguments]:
            for argument in arguments:
                path = argument.partition("[")[0] if "/" in argument or argument.endswith(".txt") else "."
                assert (ROOT / path).exists(), argument
        case ["source" | "cd" | "git", *_]:
            pass
        case _:
            pytest.fail(f"{words[0]}: say here how this command is checked, or call the block text")


def test_sharp_edges_speak_of_errors_that_exist() -> None:
    codes = set(re.findall(r"MBZ\d+", (ROOT / "docs" / "sharp_edges.md").read_text()))
    assert codes and codes <= {error.code for error in raised_errors()}
