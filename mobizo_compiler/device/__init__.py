"""What runs where the data is: sessions, runs that survive kills, journals, learning rates, the kept prefix.

The other of two towers: it stands on `format` and `load`, and knows nothing of passes, analyses and `compiling`.
"""

from mobizo_compiler.device.journal import Journal, JournalWarning, Record, pack_journal, unpack_journal
from mobizo_compiler.device.run import RunSummary
from mobizo_compiler.device.schedules import schedule
from mobizo_compiler.device.session import Session

__all__ = [
    "Journal",
    "JournalWarning",
    "Record",
    "RunSummary",
    "Session",
    "pack_journal",
    "schedule",
    "unpack_journal",
]
