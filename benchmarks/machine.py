"""The machine and its threads, and the memory and phases of this process; it imports nothing large."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
MEMORY_FIELDS = ("VmHWM", "VmRSS", "RssAnon", "RssFile")


def memory_mb(process: int | str = "self") -> dict[str, float]:
    """Resident memory of a process, given its number: the peak so far, and now in all, of its own, of files."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    kilobytes = {
        name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if value[-3:] == " kB"
    }
    return {name: round(kilobytes[name] / 1e3, 1) for name in MEMORY_FIELDS}


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """What a function returns in a new process, whose memory is then given back."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def set_threads(threads: int) -> dict[str, int]:
    """Give PyTorch and the ExecuTorch runtime that many threads; what both say afterwards."""
    import torch
    from executorch.extension.pybindings import portable_lib

    os.environ["OMP_NUM_THREADS"] = str(threads)  # which the engine asks for when it starts
    torch.set_num_threads(threads)
    portable_lib._unsafe_reset_threadpool(threads)
    return {"torch": torch.get_num_threads(), "executorch": portable_lib._threadpool_get_thread_count()}


def describe() -> dict[str, Any]:
    """Processor, cores, memory and versions."""
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    total = Path("/proc/meminfo").read_text().splitlines()[0].split()[1]
    packages = ("torch", "executorch", "torchao", "transformers")
    return {
        "processor": processor[0].partition(":")[2].strip() if processor else platform.processor(),
        "cores": len(processor),
        "avx512": "avx512f" in flags,
        "amx": "amx_tile" in flags,
        "memory_gb": round(int(total) / 1e6, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


class PhaseTimer:
    """A `progress=` for `compile` that takes the time between its calls, inside a `with` block."""

    def __init__(self, first: str) -> None:
        self.seconds: dict[str, float] = {}
        self._phase, self._began = first, time.perf_counter()

    def __call__(self, phase: str) -> None:
        """A phase begins; one that is repeated adds up."""
        now = time.perf_counter()
        self.seconds[self._phase] = round(self.seconds.get(self._phase, 0) + now - self._began, 2)
        self._phase, self._began = phase, now

    def __enter__(self) -> PhaseTimer:
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self("end")
