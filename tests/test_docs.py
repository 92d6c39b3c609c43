"""Documentation that can be checked: generated pages, test vectors, and the code of the README."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from docs.generate import pages
from mobizo_compiler import noise
from mobizo_compiler.errors import raised_errors

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


def test_the_readme_program_runs(smollm2, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The ten lines of the README, on two layers of the model that they load."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.setattr("examples.smollm2.load_smollm2", lambda: smollm2)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "smollm2.pte").exists()
    assert names["session"].state().any()  # type: ignore[attr-defined]


def test_the_code_about_training_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training_runs.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile("".join(blocks), "training_runs.md", "exec"), {})
    assert (tmp_path / "runs" / "adapter" / "adapter_model.safetensors").exists()


def test_sharp_edges_speak_of_errors_that_exist() -> None:
    codes = set(re.findall(r"MBZ\d+", (ROOT / "docs" / "sharp_edges.md").read_text()))
    assert codes and codes <= {error.code for error in raised_errors()}
