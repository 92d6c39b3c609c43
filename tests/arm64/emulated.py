"""64-bit Arm under emulation: the C++ host, built for it against the aarch64 wheel of executorch, and run by QEMU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "arm64"
LIBRARIES = Path("/usr/aarch64-linux-gnu")  # the C library; Debian's libc6-arm64-cross, which the compiler brings

# What is missing, and how to get it on Debian and Ubuntu.
TOOLS = {
    "cmake": "apt-get install cmake",
    "aarch64-linux-gnu-g++": "apt-get install g++-aarch64-linux-gnu",
    "qemu-aarch64": "apt-get install qemu-user (or qemu-user-static)",
}

# Processors that take other kernels of XNNPACK: without the dot product of bytes, with it, and with matrix products of
# bytes. The outer products of SME are a processor apart, because QEMU before version 9 computes them wrongly.
PROCESSORS = ("cortex-a53", "cortex-a76", "max,sme=off")
WITH_SME = "max"


class MissingToolError(RuntimeError):
    """A program that these tests need is not installed; the message says how to get it."""


def tool(name: str) -> str:
    """Path of a program.

    Raises:
        MissingToolError: It is not installed.
    """
    found = shutil.which(name) or shutil.which(f"{name}-static")
    if found is None:
        raise MissingToolError(f"{name} is missing, so that nothing can be run on Arm. Try: {TOOLS[name]}")
    return found


def qemu_version() -> int:
    """The emulator's major version."""
    said = _run(tool("qemu-aarch64"), "--version")
    return int(re.findall(r"version (\d+)\.", said)[0])


def runtime() -> Path:
    """The package `executorch` of the aarch64 wheel, of the version that is installed here."""
    number = version("executorch").partition("+")[0]
    package = FOLDER / f"executorch-{number}"
    if not package.exists():
        wheels = FOLDER / "wheels"
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps")
        _run(
            *pip,
            "--platform=manylinux_2_28_aarch64",
            "--only-binary=:all:",
            f"--dest={wheels}",
            f"executorch=={number}",
        )
        (wheel,) = wheels.glob(f"executorch-{number}-*.whl")
        with zipfile.ZipFile(wheel) as file:
            file.extractall(FOLDER / "partial")
        (FOLDER / "partial").rename(package)
    return package / "executorch"


def host() -> Path:
    """The C++ host for Arm, in one folder with the libraries that it needs.

    Raises:
        MissingToolError: A tool is not installed.
    """
    for name in TOOLS:
        tool(name)
    source, build, folder = ROOT / "examples" / "cpp_host", FOLDER / "cpp_host", FOLDER / "mobizo_host-arm64"
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={source / 'arm64.cmake'}"
    _run("cmake", "-S", str(source), "-B", str(build), toolchain, f"-DCMAKE_PREFIX_PATH={runtime()}")
    _run("cmake", "--build", str(build), "-j2")
    _run("cmake", "--install", str(build), "--prefix", str(folder), "--strip")
    return folder / "mobizo_host"


def on_arm(processor: str, *command: object) -> list[str]:
    """A command line that runs a command on an emulated processor."""
    return [tool("qemu-aarch64"), "-cpu", processor, "-L", str(LIBRARIES), *map(str, command)]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout
