"""Damage files and have them read: run by tests as a process of its own, which a crash of the native runtime would end.

    python -m tests.damaged_files COUNT FILE.pte|FILE.pt2|FILE.ptd|ADAPTER ... [--program FILE.pte]

Every damaged file must give an error of `mobizo_compiler` and leave the state of the session alone. Damaged data files
and adapters are read into a session of the program.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import mobizo_compiler as mobizo
from mobizo_compiler.errors import AdapterError, ArtifactError
from mobizo_compiler.format.peft import CONFIG, WEIGHTS

OTHERS = [b"", b"\0" * 500, b"a text file\n" * 50, b"PK\x03\x04" + b"\0" * 200, b"MBZJRNL\n" + b"\0" * 56, b"MBZSHA2\n"]


def flip_a_bit(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_many(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(2, 50)):
        flip_a_bit(data, rng)


def overwrite(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    part = data[start : start + rng.randint(1, 4096)]
    data[start : start + len(part)] = bytes(len(part)) if any(part) else b"\xff" * len(part)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.choice([rng.randrange(len(data)), max(0, len(data) - rng.randint(1, 80))]) :]


def lengthen(data: bytearray, rng: random.Random) -> None:
    data += rng.choice([b"\0", b"\n}", rng.randbytes(40), bytes(data[-40:]), bytes(data)])


def move(data: bytearray, rng: random.Random) -> None:
    """A block that is missing in the middle."""
    start = rng.randrange(1, len(data))
    del data[start : start + rng.randint(1, 512)]


def replace(data: bytearray, rng: random.Random) -> None:
    data[:] = rng.choice([*OTHERS, rng.randbytes(rng.randrange(1, len(data)))])


KINDS = (flip_a_bit, flip_a_bit, flip_many, overwrite, cut, lengthen, move, replace)


def damage(original: Path, path: Path, count: int, read: Callable[[], None], error: type[mobizo.MobizoError]) -> None:
    """Write `path` damaged `count` times, and read it."""
    rng = random.Random(original.name)
    whole = original.read_bytes()
    for turn in range(count):
        kind = KINDS[turn % len(KINDS)]
        data = bytearray(whole)
        kind(data, rng)
        assert data != whole, kind.__name__
        path.write_bytes(data)
        try:
            read()
        except error as found:
            assert str(path.parent) in str(found), found
        else:
            raise AssertionError(f"{path.name}: {kind.__name__} was not noticed in turn {turn}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--program", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    session = mobizo.Session(options.program) if options.program else None
    folder = Path(tempfile.mkdtemp())
    for file in options.files:
        path = folder / file.name
        if file.suffix in (".pte", ".pt2"):
            damage(file, path, options.count, lambda path=path: mobizo.Session(path) and None, ArtifactError)  # type: ignore[misc]
            print("program", options.count, flush=True)
            continue
        assert session is not None
        start = torch.randn(session.state().shape, generator=torch.Generator().manual_seed(1))
        session.load_state(start)
        if file.suffix == ".ptd":
            damage(file, path, options.count, lambda path=path: session.import_ptd(path), ArtifactError)  # type: ignore[misc]
            print("data", options.count, flush=True)
        else:
            path.mkdir()
            for name in (WEIGHTS, CONFIG):
                for other in (WEIGHTS, CONFIG):
                    shutil.copy(file / other, path / other)
                damage(
                    file / name,
                    path / name,
                    options.count // 2,
                    lambda path=path: session.import_adapter(path),  # type: ignore[misc]
                    AdapterError,
                )
            print("adapter", options.count, flush=True)
        assert torch.equal(session.state(), start), "a damaged file has changed the state"
        session.import_ptd(file) if file.suffix == ".ptd" else session.import_adapter(file)
        assert not torch.equal(session.state(), start), "the file as it was is taken"
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
