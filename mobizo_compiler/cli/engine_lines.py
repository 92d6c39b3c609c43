"""What the engine prints about the processor, kept off the terminal of a command.

These lines are written by C++ to file descriptor 2, so that no filter of Python sees them.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator

_LINES = re.compile(rb"^(\[(cpuinfo_utils|threadpool)\.cpp:\d+\]|[IW] \d+ executorch:(cpuinfo_utils|threadpool)\.cpp)")


@contextlib.contextmanager
def without_engine_lines() -> Iterator[None]:
    """Within the block, lines of the engine about the processor are dropped; everything else on stderr is passed on."""
    sys.stderr.flush()
    try:
        terminal = os.dup(2)
    except OSError:  # a process without stderr
        yield
        return
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)

    def pass_on() -> None:
        left = b""
        while part := os.read(reading, 65536):
            *lines, left = (left + part).split(b"\n")
            kept = b"".join(line + b"\n" for line in lines if not _LINES.match(line))
            if left and not b"[".startswith(left[:1]) and left[:1] not in b"IW":  # not the beginning of such a line
                kept, left = kept + left, b""
            with contextlib.suppress(OSError):
                os.write(terminal, kept)
        if left and not _LINES.match(left):
            with contextlib.suppress(OSError):
                os.write(terminal, left)

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)  # closes the end that is written to, so that the thread comes to its end
        thread.join()
        os.close(reading)
        os.close(terminal)
