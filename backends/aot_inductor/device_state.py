"""The flat state where the methods change it, and its alias in main memory for hosts that ask for one."""

from __future__ import annotations

import torch
from torch import Tensor

from mobizo_compiler.upstream import storage_use_count


class DeviceState:
    """The state on a device. It stays there: between the device and main memory it travels only if somebody looks.

    An alias is good for reading and writing as long as somebody holds it, or a view of it, or an array that shares its
    memory; as long, every call copies the state to the device before and, if it changes the state, back after.

    Args:
        live: What the methods change, float32 [S].
        host: The same in main memory; `live` itself where that is in main memory.
    """

    def __init__(self, live: Tensor, host: Tensor) -> None:
        self.live = live
        self._host = host
        self._apart = host is not live
        self._held_by_us = _holders(host)
        self._asked_for = False  # somebody was given an alias, and may have written to it since the last call
        self._behind = False  # the device has a newer state than main memory

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> DeviceState:
        """A state of zeros; in main memory, pages that a GPU can copy from by itself."""
        live = torch.zeros(size, device=device)
        return cls(live, torch.zeros(size, pin_memory=True) if device.type == "cuda" else live)

    def alias(self) -> Tensor:
        """The state in main memory."""
        if self._behind:
            self._host.copy_(self.live)
            self._behind = False
        self._asked_for = True
        return self._host.detach()  # a tensor of its own on the same memory, so that its holders can be counted

    def current(self) -> Tensor:
        """The state on the device, with what was written to an alias."""
        self.before_call()
        return self.live

    def before_call(self) -> None:
        """Take over what was written to an alias."""
        if self._apart and self._asked_for:
            self.live.copy_(self._host)
            self._asked_for = _holders(self._host) > self._held_by_us

    def after_change(self) -> None:
        """Show a new state to those who hold an alias."""
        if self._apart and self._asked_for:
            self._host.copy_(self.live)
        else:
            self._behind = self._apart


def _holders(tensor: Tensor) -> int:
    """How many tensors, and arrays through them, share the memory of one."""
    return int(storage_use_count(tensor.untyped_storage()._cdata))
