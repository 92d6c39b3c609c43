"""A compilation leaves the process around it as it was: its output, its logs and warnings, its garbage collector."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, ZOConfig, api
from mobizo_compiler.quiet import quiet
from mobizo_compiler.testing import TokenWise

TOKENS = (torch.zeros(2, 5, dtype=torch.int64),)


def compiled(backend: str = "eager") -> mobizo.Program:
    lora = LoraConfig(r=2, target_modules=("up",))
    return mobizo.compile(TokenWise().eval(), TOKENS, lora, ZOConfig(queries=1), backend=backend)


@contextlib.contextmanager
def talking() -> Iterator[list[int]]:
    """Another thread that prints, logs under an upstream name and warns, all the time; how often is in the list."""
    made, stop = [0], threading.Event()

    def talk() -> None:
        while not stop.wait(0.005):
            print("tick")
            logging.getLogger("torch.mobizo_test").warning("tick")
            warnings.warn("tick", stacklevel=1)
            made[0] += 1

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield made
    finally:
        stop.set()
        thread.join()


def test_what_other_threads_say_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with talking() as made:
            compiled()
    assert made[0] > 10
    assert output.getvalue().count("tick") == made[0]
    # Where torch catches warnings itself, which Python does for the whole process, one of another thread may be lost.
    assert made[0] - 5 <= sum(str(w.message) == "tick" for w in warned) <= made[0]
    assert sum(record.getMessage() == "tick" for record in caplog.records) == made[0]


def test_nothing_is_printed_or_warned(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        compiled("portable")
    assert not warned and capfd.readouterr().out == ""
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_only_upstream_records_of_this_thread_are_held_back(caplog: pytest.LogCaptureFixture) -> None:
    upstream, own = logging.getLogger("torch.fx.mobizo_test"), logging.getLogger("mobizo_test")
    filters = list(logging.root.filters), list(warnings.filters)
    with quiet():
        upstream.warning("held back")
        upstream.error("an error")
        own.warning("of a host")
        other = threading.Thread(target=upstream.warning, args=("of another thread",))
        other.start()
        other.join()
    upstream.warning("later")
    assert [r.getMessage() for r in caplog.records] == ["an error", "of a host", "of another thread", "later"]
    assert (list(logging.root.filters), list(warnings.filters)) == filters and not upstream.filters
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with quiet(message="of torch"):
            warnings.warn("of torch: new", stacklevel=1)
            warnings.warn("of a model", stacklevel=1)
    assert [str(w.message) for w in warned] == ["of a model"]


def test_the_garbage_collector_is_as_it_was() -> None:
    before = gc.get_threshold()
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        compiled()
        assert gc.get_freeze_count() > 0.9 * frozen and gc.get_threshold() == before and gc.isenabled()
    finally:
        gc.unfreeze()
    inside: list[bool] = []
    try:
        for host in (gc.enable, gc.disable):
            host()
            enabled = gc.isenabled()
            lora = LoraConfig(r=2, target_modules=("up",))
            progress = lambda line: inside.append(gc.isenabled())  # noqa: E731
            mobizo.compile(TokenWise().eval(), TOKENS, lora, backend="eager", progress=progress)
            assert not any(inside) and inside and gc.isenabled() == enabled
            inside.clear()
        gc.enable()
        first, second = api._OneAtATime(), api._OneAtATime()
        with contextlib.ExitStack() as stack:  # one within another, and the first ends first
            first.__enter__()
            stack.enter_context(second)
            first.__exit__()
            assert not gc.isenabled()
        assert gc.isenabled()
    finally:
        gc.enable()
