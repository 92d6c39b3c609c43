"""Tensors that are laid down in files: the same numbers, in memory only while they are read."""

from __future__ import annotations

import errno
import gc
import os

import pytest
import torch

from benchmarks.machine import memory_mb
from mobizo_compiler.graph import paging
from mobizo_compiler.graph.paging import give_back, lay_down, put_back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8])
def test_the_same_numbers(dtype: torch.dtype) -> None:
    tensor = torch.randn(1100, 1000).mul(50).to(dtype)
    laid = lay_down(tensor.t())
    assert laid.dtype == dtype and laid.is_contiguous() and torch.equal(laid, tensor.t())
    give_back()
    assert torch.equal(laid, tensor.t())


def test_what_is_written_stays() -> None:
    laid = lay_down(torch.zeros(1 << 20))
    laid[5] = 3.0
    give_back()
    assert laid[5] == 3.0


def test_a_small_tensor_stays_where_it_is() -> None:
    tensor = torch.ones(10)
    assert lay_down(tensor) is tensor


def test_memory_holds_what_is_read() -> None:
    laid = [lay_down(torch.ones(25_000_000)) for _ in range(3)]  # 300 MB
    give_back()
    before = memory_mb()["VmRSS"]
    assert sum(float(tensor.sum()) for tensor in laid) == 75_000_000
    assert memory_mb()["VmRSS"] > before + 200
    give_back()
    assert memory_mb()["VmRSS"] < before + 100


def test_one_tensor_is_put_back() -> None:
    laid = [lay_down(torch.full((25_000_000,), float(number))) for number in range(3)]
    before = memory_mb()["VmRSS"]
    assert [float(tensor[-1]) for tensor in laid] == [0.0, 1.0, 2.0] and float(laid[1].sum()) == 25_000_000
    assert memory_mb()["VmRSS"] > before + 80
    put_back(laid[1])
    assert memory_mb()["VmRSS"] < before + 40
    assert float(laid[1].sum()) == 25_000_000


def test_a_file_is_gone_with_its_tensors() -> None:
    gc.collect()
    chunks, files = len(paging._chunks), len(os.listdir("/proc/self/fd"))
    laid = [lay_down(torch.ones(40_000_000)) for _ in range(3)]
    part = laid[0][100:200]
    assert len(paging._chunks) == chunks + 3 and len(os.listdir("/proc/self/fd")) == files + 3
    del laid
    gc.collect()
    assert len(paging._chunks) == chunks + 1 and torch.equal(part, torch.ones(100))
    del part
    gc.collect()
    assert len(paging._chunks) == chunks and len(os.listdir("/proc/self/fd")) == files


def test_what_does_not_fit_on_the_disk_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    tensor = torch.ones(1 << 26)
    assert lay_down(tensor) is tensor


def test_a_small_tensor_takes_little_of_the_disk() -> None:
    gc.collect()
    before = set(paging._chunks)
    laid = [lay_down(torch.ones(1 << 19)) for _ in range(4)]
    new = [len(chunk) for chunk in paging._chunks if chunk not in before]
    assert sum(new) <= 1 << 24 and laid


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(300).to_sparse(),
        torch.quantize_per_tensor(torch.ones(100_000), 0.1, 0, torch.qint8),
        torch.ones(100_000, device="meta"),
        torch.ones(100_000, dtype=torch.complex64),
    ],
    ids=["sparse", "quantized", "meta", "complex"],
)
def test_what_is_no_plain_numbers_is_left_alone(tensor: torch.Tensor) -> None:
    assert lay_down(tensor) is tensor
    put_back(tensor)


def test_a_child_does_not_write_where_its_parent_does() -> None:
    kept = lay_down(torch.zeros(1 << 15))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        laid = lay_down(torch.full((1 << 15,), 2.0))
        os.write(write, bytes([int(laid[0])]))
        os._exit(0)
    mine = lay_down(torch.full((1 << 15,), 1.0))
    assert os.read(read, 1) == b"\x02"
    os.waitpid(child, 0)
    assert bool((mine == 1).all()) and not bool(kept.any())
