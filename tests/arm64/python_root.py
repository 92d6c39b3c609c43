"""Python with PyTorch and ExecuTorch on emulated 64-bit Arm, for who wants to run a session there.

    python tests/arm64/python_root.py [FOLDER]     make it (1.2 GB) and print the command that runs it

On Debian, whose packages bring the interpreter. The aarch64 wheel of torch is built for CUDA and loads NVIDIA's
libraries when it is imported, some of which have no wheel for it: libraries without content take their place, in which
every function returns 100, cudaErrorNoDevice. Importing all of it takes two minutes of processor time. QEMU 10 runs it;
QEMU 7.2 crashes in the first call of ExecuTorch's runtime.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

CROSS = "aarch64-linux-gnu-"
PYTHON = f"python{sysconfig.get_python_version()}"
PACKAGES = (f"{PYTHON}-minimal", f"lib{PYTHON}-stdlib", "libstdc++6", "libgomp1")
WHEELS = ("torch", "executorch", "torchao", "numpy", "sympy", "mpmath", "networkx", "jinja2", "MarkupSafe", "fsspec")
WHEELS += ("filelock", "typing_extensions", "flatbuffers", "pyyaml", "ruamel.yaml", "tabulate", "packaging", "rich")
WHEELS += ("typer", "click", "shellingham", "markdown-it-py", "mdurl", "pygments", "safetensors", "docstring-parser")
WHEELS += ("annotated-doc",)
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_26", "manylinux_2_17", "manylinux2014")
SYSTEM = re.compile(r"(lib(c|m|dl|rt|pthread|util|stdc\+\+|gcc_s|gomp|z)|ld-linux-aarch64)\.so")


def run(*command: object) -> str:
    """Stdout of a command that must succeed."""
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout


def unpack_system(folder: Path) -> None:
    """The interpreter and the C library, from this machine's own package sources; nothing of it is installed."""
    state = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    places = {"State::Lists": "lists", "State::Status": "status", "Cache": "cache"}
    config = state / "apt.conf"
    config.write_text(
        'APT::Architecture "arm64"; APT::Architectures { "arm64"; }; Debug::NoLocking "true";\n'
        + "".join(f'Dir::{name} "{state / place}";\n' for name, place in places.items())
    )
    run("apt-get", "-c", config, "-q", "update")
    run("apt-get", "-c", config, "-q", "install", "-y", "--no-install-recommends", "--download-only", *PACKAGES)
    for archive in (state / "cache" / "archives").glob("*.deb"):
        run("dpkg-deb", "-x", archive, folder / "root")


def unpack_wheels(folder: Path) -> None:
    """The aarch64 wheels of the versions that are installed here."""
    wanted = [f"{name}=={version(name).partition('+')[0]}" for name in WHEELS]
    platforms = [f"--platform={name}_aarch64" for name in PLATFORMS]
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--no-deps",
        "--no-compile",
    )
    run(*pip, "--target", folder / "site", "--only-binary=:all:", *platforms, *wanted)


def stand_ins(folder: Path) -> None:
    """A library without content for each of NVIDIA's that the wheel of torch asks for."""
    target = folder / "stand_ins"
    target.mkdir(exist_ok=True)
    libraries = sorted((folder / "site" / "torch" / "lib").glob("*.so*"))
    needed: set[str] = set()
    asked: set[str] = set()
    versions: dict[str, set[str]] = {}
    for library in libraries:
        needed |= set(re.findall(r"\(NEEDED\).*\[(.*)\]", run(f"{CROSS}readelf", "-d", library)))
        for line in run(f"{CROSS}nm", "-D", "--undefined-only", library).splitlines():
            asked.add(line.split()[-1].partition("@")[0])
        name = ""
        for file, symbol in re.findall(r"File: (\S+)|Name: (\S+)", run(f"{CROSS}readelf", "-V", "-W", library)):
            name = file or name
            if symbol:
                versions.setdefault(name, set()).add(symbol)
    functions = sorted(name for name in asked if re.match(r"_*(cu|nccl|nv|NV)", name))
    source, script = target / "stand_in.c", target / "versions"
    source.write_text("".join(f"long {name}(void) {{ return 100; }}\n" for name in functions))
    for name in needed - {library.name for library in libraries}:
        if SYSTEM.match(name):
            continue
        first, *others = sorted(versions.get(name, {name}))
        script.write_text(f"{first} {{ global: *; }};\n" + "".join(f"{other} {{ }};\n" for other in others))
        shared = ("-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", f"-Wl,--version-script={script}")
        run(f"{CROSS}gcc", *shared, "-o", target / name, source)


def main() -> None:
    """Make what is missing, and say how it is run."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/arm64/python").resolve()
    for make, made in ((unpack_system, "root"), (unpack_wheels, "site"), (stand_ins, "stand_ins")):
        if not (folder / made).exists():
            make(folder)
    libraries = f"{folder / 'stand_ins'}:/usr/lib/aarch64-linux-gnu"
    settings = f"-E PYTHONPATH={folder / 'site'}:{Path.cwd()} -E LD_LIBRARY_PATH={libraries} -E OMP_NUM_THREADS=1"
    print(f"qemu-aarch64 -cpu max,sme=off -L {folder / 'root'} {settings} {folder}/root/usr/bin/{PYTHON}")


if __name__ == "__main__":
    main()
