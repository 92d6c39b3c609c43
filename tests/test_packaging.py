"""The package on disk, the package that is declared, and the package that a wheel installs are the same."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mobizo_compiler

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {
    "mobizo_compiler": "mobizo_compiler",
    "passes": "mobizo_compiler.passes",
    "backends": "mobizo_compiler.backends",
}


def packages_on_disk() -> set[str]:
    found = set()
    for folder, package in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            if not (folder == "mobizo_compiler" and parts[:1] in (("passes",), ("backends",))):
                found.add(".".join([package, *parts]))
    return found


def modules_on_disk() -> set[str]:
    return {
        ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]).removesuffix(".__init__")
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
        if not path.is_relative_to(ROOT / "mobizo_compiler" / "passes")
        and not path.is_relative_to(ROOT / "mobizo_compiler" / "backends")
    }


def test_declared_packages_are_those_on_disk() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_links_resolve(name: str) -> None:
    link = ROOT / "mobizo_compiler" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


def test_no_second_copy_of_a_module() -> None:
    assert not {"passes", "backends"} & set(sys.modules)
    files = [getattr(m, "__file__", None) for n, m in list(sys.modules.items()) if n.startswith("mobizo_compiler")]
    real = [Path(file).resolve() for file in files if file]
    assert len(real) == len(set(real))


def test_a_wheel_has_every_module(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "pip"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    subprocess.run([*run, "wheel", *quiet, "-w", str(tmp_path), str(ROOT)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "installed"
    subprocess.run([*run, "install", *quiet, "--target", str(target), str(wheel)], check=True, cwd=tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import importlib, mobizo_compiler\n"
        f"assert mobizo_compiler.__file__.startswith({str(target)!r}), mobizo_compiler.__file__\n"
        f"for name in {sorted(modules_on_disk())!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    assert (target / "mobizo_compiler" / "py.typed").exists()


def test_version_is_stated_once() -> None:
    assert PROJECT["project"]["version"] == mobizo_compiler.__version__


def test_public_names_are_there() -> None:
    for name in mobizo_compiler.__all__:
        assert getattr(mobizo_compiler, name).__doc__


@pytest.mark.xdist_group("kept")
def test_groups_of_tests_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """Some versions of pytest and pytest-xdist part them in silence, and make every shared program twice."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("only of a run with --dist loadgroup")
    assert request.node.nodeid.endswith("@kept")
