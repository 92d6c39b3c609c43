"""Hold back what upstream packages log and warn about in calls of ours, and nothing of the program around them.

`logging.disable` and `warnings.catch_warnings` act on every thread. What is held back here is what the thread that
asked for it causes, and of that, what comes from the packages below.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import warnings
from collections.abc import Iterator

UPSTREAM = ("torch", "torchao", "executorch", "transformers", "functorch")


class _OfThisThread:
    """A filter of log records, and the part of a filter of warnings that looks at the module."""

    def __init__(self, level: int) -> None:
        self.level, self.thread = level, threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record may pass."""
        ours = record.thread == self.thread and record.levelno <= self.level
        # Upstream modules log to the root logger too; then the file says whose record it is.
        source = record.name if record.name != "root" else record.pathname.replace("\\", "/")
        return not (ours and _is_upstream(source))

    def match(self, module: str) -> bool:
        """Whether a warning that is blamed on this module is held back."""
        return threading.get_ident() == self.thread


def _is_upstream(source: str) -> bool:
    if "/" in source:
        return any(f"/{package}/" in source for package in UPSTREAM)
    return source.partition(".")[0] in UPSTREAM


@contextlib.contextmanager
def quiet(level: int = logging.WARNING, message: str = "") -> Iterator[None]:
    """Hold back upstream log records of this thread up to `level`, and warnings of this thread, in this block.

    Args:
        level: A level of `logging`.
        message: Regular expression that the warnings begin with.
    """
    ours = _OfThisThread(level)
    found = [logger for name, logger in list(logging.root.manager.loggerDict.items()) if _is_upstream(name)]
    loggers = [logging.root, *(logger for logger in found if isinstance(logger, logging.Logger))]
    # As `warnings.simplefilter` would add it, which takes no object that asks for the thread.
    entry = ("ignore", re.compile(message), Warning, ours, 0)
    for logger in loggers:
        logger.addFilter(ours)
    warnings.filters.insert(0, entry)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # who restores the list of filters in between takes it out
            warnings.filters.remove(entry)  # type: ignore[attr-defined]
        for logger in loggers:
            logger.removeFilter(ours)


class _OfTheBuild(logging.Filter):
    """Holds back what torchao logs when it is imported: which of its optional libraries were not built."""

    _BEGINNINGS = ("Failed to load ", "Skipping import of cpp extensions")
    _WITHIN = "is an Enum subclass and is now natively supported"

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record may pass."""
        text = record.getMessage()
        return not text.startswith(self._BEGINNINGS) and self._WITHIN not in text


for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).addFilter(_OfTheBuild())
