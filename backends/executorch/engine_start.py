"""Start the threads of the engine, without what it then prints about the processor.

The lines are written by C++ to file descriptor 2, where no filter of Python sees them, when the first kernel asks for
threads. Here they are asked for before that, once in a process. It takes less than a millisecond, in which whatever is
written to stderr is held back; what are no such lines is written there afterwards.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator

from mobizo_compiler.upstream import reset_threads, thread_count

_LINES = re.compile(rb"(\[(cpuinfo_utils|threadpool)\.cpp:\d+\]|[IW] \d+ executorch:(cpuinfo_utils|threadpool)\.cpp)")
_HELD_BYTES = 1 << 16  # a pipe takes no more
_starting, _started = threading.Lock(), threading.Event()


def start_engine() -> None:
    """Start the threads, the first time: as many as OMP_NUM_THREADS says, as in PyTorch, else one for each core."""
    with _starting:
        if not _started.is_set():
            wanted = os.environ.get("OMP_NUM_THREADS", "")
            with without_lines():
                untouched = thread_count() == os.cpu_count()  # nobody has chosen another number
                if untouched and wanted.isdecimal() and int(wanted) > 0:
                    reset_threads(int(wanted))
            _started.set()


@contextlib.contextmanager
def without_lines() -> Iterator[None]:
    """Within the block, what is written to stderr is held back, and then written without those lines."""
    if sys.stderr is not None:
        sys.stderr.flush()
    try:
        stderr = os.dup(2)
    except OSError:  # a process without stderr
        yield
        return
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    try:
        yield
    finally:
        if sys.stderr is not None:
            sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        os.set_blocking(reading, False)  # a process that was forked meanwhile may have the other end
        with contextlib.suppress(BlockingIOError):
            lines = os.read(reading, _HELD_BYTES).splitlines(keepends=True)
            os.write(2, b"".join(line for line in lines if not _LINES.match(line)))
        os.close(reading)
