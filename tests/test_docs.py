"""Documentation that can be checked: generated pages, test vectors, and the code of the README."""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import statistics
import subprocess
import sys
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.run
import typer
import yaml

import examples.minilm
from docs.blocks import Block, blocks, indented_code, prose
from docs.blocks import pages as block_pages
from mobizo_compiler import noise
from mobizo_compiler.backends import BACKENDS
from mobizo_compiler.cli import app
from mobizo_compiler.errors import MobizoError, raised_errors
from mobizo_compiler.step.estimators import ESTIMATORS
from mobizo_compiler.step.losses import LOSSES
from mobizo_compiler.step.rules import RULES

ROOT = Path(__file__).parent.parent
MASK = 0xFFFFFFFF


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def word(seed: int, query: int, counter: int) -> int:
    """The definition in docs/program_format.md, in whole numbers."""
    key1 = mix(mix(seed + 0x9E3779B9 & MASK) ^ (query * 0x85EBCA6B + 1 & MASK))
    key2 = mix(key1 + 0x5851F42D & MASK)
    return mix(mix((counter * 0x9E3779B9 & MASK) ^ key1) + key2 & MASK)


def vectors() -> list[list[str]]:
    text = (ROOT / "docs" / "program_format.md").read_text()
    table = text.split("<!-- vectors -->")[1].split("<!-- end of vectors -->")[0].strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.parametrize("row", vectors(), ids=lambda row: f"seed {row[0]} query {row[1]}")
def test_noise_vectors_follow_from_the_definition(row: list[str]) -> None:
    seed, query = int(row[0]), int(row[1])
    drawn = [word(seed, query, counter) for counter in range(8)]
    assert row[2].split() == [f"{a:08x}" for a in drawn[:4]]
    quantiles = [statistics.NormalDist().inv_cdf((entry + 0.5) / 4096) for entry in range(4096)]
    scale = statistics.fmean(q * q for q in quantiles) ** 0.5
    wanted = [quantiles[entry] / scale for a in drawn[:2] for entry in (a >> 20, a >> 8 & 4095)]
    assert [float(z) for z in row[3].split()] == pytest.approx(wanted, abs=1e-5)
    assert [int(z) for z in row[4].split()] == [-1 if a >> 31 else 1 for a in drawn]
    assert torch.equal(noise(seed, 2, 4)[query], torch.tensor(wanted, dtype=torch.float32))


def test_links_between_pages_lead_somewhere() -> None:
    for page in block_pages():
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose(page.read_text())):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


# -- the site ---------------------------------------------------------------------------------------------------------


def build(docs: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site from a folder of pages, as `make docs-site` does."""
    config = (ROOT / "mkdocs.yml").read_text().replace("docs_dir: docs", f"docs_dir: {docs}")
    config = config.replace("- docs/navigation.py", f"- {ROOT / 'docs' / 'navigation.py'}")
    file = site.parent / "mkdocs.yml"
    file.write_text(config)
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(file), "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


class _Found(HTMLParser):
    """Headings, pictures and code of a page of the site."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))


def test_the_site_is_built_and_every_page_is_in_it(tmp_path: Path) -> None:
    done = build(ROOT / "docs", tmp_path / "site")
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    site, docs = tmp_path / "site", ROOT / "docs"
    texts = {path.relative_to(docs).with_suffix(".html") for path in docs.rglob("*.md")}
    expected = {page for page in texts if not page.name.endswith("_text.html")}
    built = {path.relative_to(site) for path in site.rglob("*.html")}
    assert built - expected == {Path("404.html")} and expected <= built
    assert not [path for path in site.rglob("*") if path.suffix == ".py" or path.name.startswith("quantization_m")]
    front = (site / "index.html").read_text()
    for page in expected:
        found, text = _Found(), (site / page).read_text()
        found.feed(text)
        tags = Counter(tag for tag, _ in found.tags)
        assert tags["h1"] == 1 and tags["article"] == 1, f"{page}: {tags['h1']} titles"
        blocks_here = len(blocks((docs / page).with_suffix(".md")))
        assert text.count('<div class="highlight">') + text.count("language-text highlight") >= blocks_here, page
        for tag, attributes in found.tags:
            source = attributes.get("src") or ""
            if tag == "img" and "://" not in source and not source.startswith("data:"):
                assert ((site / page).parent / source).exists(), f"{page} shows {source}"
        assert f'href="{page.as_posix()}"' in front or page.name == "index.html", f"{page} is not in the navigation"
    assert 'id="mbz101-configerror"' in (site / "errors.html").read_text()


@pytest.mark.parametrize(
    ("page", "text", "problem"),
    [
        ("index.md", "[gone](gone.md)", "gone.md"),
        ("index.md", "[gone](errors.md#mbz999)", "no such anchor"),
        ("orphan.md", "# Not in the navigation", 'not included in the "nav"'),
    ],
)
def test_the_site_is_strict(page: str, text: str, problem: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / page).open("a") as file:
        file.write(f"\n{text}\n")
    done = build(tmp_path / "docs", tmp_path / "site")
    said = done.stderr.replace("does not contain an anchor", "no such anchor")
    assert done.returncode != 0 and problem in said, done.stderr


# -- code blocks -------------------------------------------------------------------------------------------------------

LANGUAGES = {"python", "pycon", "console", "text", "yaml", "toml", "json", "bash"}  # pycon: doctests, run as such
# Blocks of Python that the tests do not run; each says why in its note.
NOT_RUN = {
    "docs/backends/aot_inductor.md": 1,
    "docs/backends/cuda.md": 1,
    "docs/backends/vulkan.md": 1,
    "docs/distributed.md": 1,  # tests/test_ranks.py starts ranks
    "docs/federated.md": 1,  # run by integrations/flower/tests/test_flower.py
    "docs/privacy.md": 1,  # tests/test_privacy.py makes runs like it
    "docs/hosts.md": 5,  # run by tests/test_hosts.py
}
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
        file = next(f for f in (ROOT / "examples" / "openvino_backend" / name, ROOT / name) if f.exists())
        lines, inside = (
            [line.strip() for line in s.splitlines() if line.strip()] for s in (block.text, file.read_text())
        )
        assert "\n".join(lines) in "\n".join(inside), f"{place(block)} is not in {name}"


def run_page(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *, slow: bool = False) -> dict[str, object]:
    """Run the Python of a page from top to bottom, in an empty folder."""
    monkeypatch.chdir(folder)
    for registry in (BACKENDS, ESTIMATORS, LOSSES, RULES):  # what a page registers ends with it
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if not run_here(block) or ("slow" in block.notes and not slow):
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


QUICK = dict.fromkeys(str(b.page.relative_to(ROOT)) for b in BLOCKS if run_here(b) and "slow" not in b.notes)
QUICK.pop("docs/errors.md")  # `make lint` makes it by provoking every error
RUNNABLE = {str(block.page.relative_to(ROOT)): block.page for block in BLOCKS if run_here(block)}
WHOLE = {"docs/errors.md": RUNNABLE["docs/errors.md"]} | {
    name: page for name, page in RUNNABLE.items() if re.search("<!-- slow|load_smollm2|load_minilm", page.read_text())
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The models of the pages are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Pages of many programs. What they show is tested elsewhere: first steps with the README, estimators and backends of
# others with the packages of `examples/extensions`, runs with the command line, a classifier with `examples/minilm.py`.
SLOW = ("docs/estimators.md", "docs/training_runs.md", "docs/writing_a_backend.md", "docs/writing_an_estimator.md")
SLOW += ("docs/tutorials/personalise_a_classifier.md", "docs/quickstart.md")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in QUICK])
def test_python_blocks_run(
    name: str, one_thread: None, request: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On models that are narrower or of fewer layers than those that pages load."""
    text = RUNNABLE[name].read_text()
    if "load_smollm2" in text:
        loaded = request.getfixturevalue("narrow_smollm2")
        monkeypatch.setattr("examples.smollm2.load_smollm2", lambda: loaded)
    if "load_minilm" in text:
        load = examples.minilm.load_minilm
        monkeypatch.setattr(examples.minilm, "load_minilm", lambda layers: load(1))
        monkeypatch.setattr(examples.minilm, "TOKENS", 16)
    run_page(RUNNABLE[name], tmp_path, monkeypatch)
    if name == "README.md":
        assert (tmp_path / "smollm2.pte").exists() and any((tmp_path / "runs").iterdir())
    if name == "docs/training_runs.md":
        assert (tmp_path / "runs" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_python_blocks_run_on_whole_models(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_page(WHOLE[name], tmp_path, monkeypatch, slow=True)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("yaml", "toml", "json")], ids=place)
def test_data_blocks_parse(block: Block) -> None:
    assert {"yaml": yaml.safe_load, "toml": tomllib.loads, "json": json.loads}[block.language](block.text)


IN_BLOCKS = [line for b in BLOCKS if b.language == "console" for line in b.text.splitlines() if line.strip()]
IN_TEXT = [
    command
    for page in block_pages()
    for command in re.findall(r"`((?:mobizo|make|python -m) [a-z][^`\[]*)(?: ?\[[^`]*\])?`", page.read_text())
    if "..." not in command
]


class _Parsed(Exception):
    pass


@pytest.mark.parametrize("command", dict.fromkeys(IN_BLOCKS + IN_TEXT))
def test_commands_have_these_options(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of a page is parsed by the program that it calls, and stops there."""
    words = shlex.split(command, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    match words:
        case ["make", *targets]:
            known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            assert {t for t in targets if "=" not in t} <= known
        case ["torchrun", *arguments]:  # its own, and those of `mobizo finetune`
            found = torch.distributed.run.get_args_parser().parse_args(arguments)
            assert found.module and found.training_script == "mobizo_compiler.distributed"
            finetune: Any = typer.main.get_command(app)
            finetune.commands["finetune"].make_context("finetune", [*found.training_script_args, "--distributed"])
        case ["mobizo", *arguments] | ["python", "-m", "mobizo_compiler", *arguments]:
            group: Any = typer.main.get_command(app)
            assert arguments and arguments[0] in group.commands, f"there is no such command: {command}"
            try:
                group.commands[arguments[0]].make_context(arguments[0], arguments[1:])
            except Exception as error:  # a name in running text may lack its arguments, and files need not exist
                mentioned = type(error).__name__ == "MissingParameter" and command not in IN_BLOCKS
                assert mentioned or "does not exist" in str(error), error
        case ["python", "-m", "venv", _] | ["source" | "cd" | "git", *_]:
            pass
        case ["python", "-m", "docs.generate", *arguments]:
            assert set(arguments) <= {"--check"}
        case ["python", "-m", "docs.structure"]:  # run by tests/test_structure.py
            pass
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
        case _:
            pytest.fail(f"{words[0]}: say here how this command is checked, or call the block text")


def test_sharp_edges_speak_of_errors_that_exist() -> None:
    codes = set(re.findall(r"MBZ\d+", (ROOT / "docs" / "sharp_edges.md").read_text()))
    assert codes and codes <= {error.code for error in raised_errors()}
