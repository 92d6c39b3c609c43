"""`python -m mobizo_compiler` is the command `mobizo`."""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 130


def main() -> None:
    """Run the command; Ctrl-C ends it without a traceback, also while its modules are being imported."""
    before = signal.signal(signal.SIGINT, _leave)
    from mobizo_compiler.cli import app

    signal.signal(signal.SIGINT, before)
    app(prog_name="mobizo")


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once: extensions that are half imported would swallow an exception, and there is nothing to undo."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
