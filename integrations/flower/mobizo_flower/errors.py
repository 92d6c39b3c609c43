"""What can be wrong with a message of a federation, one class per kind."""

from __future__ import annotations

from mobizo_compiler.errors import MobizoError


class MessageError(MobizoError):
    """A message cannot be used. Nothing was changed by it."""

    code = "MBZF00"


class DamagedMessageError(MessageError):
    """A message was cut off, or a checksum does not fit: have it sent again."""

    code = "MBZF01"


class ForeignMessageError(MessageError):
    """A message of another program, another federation, another protocol or another version.

    Both sides need the same program file and the same version of this package.
    """

    code = "MBZF02"


class OutOfRoundError(MessageError):
    """A message of a round that is over, or that has not begun. A late one is no mistake; it is too late."""

    code = "MBZF03"
