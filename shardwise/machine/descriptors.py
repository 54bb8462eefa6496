"""Descriptors: files that have no name, memory and pipes, opened through the process that has them."""

from __future__ import annotations

import os


def opened(process: int, descriptor: int, mode: int = os.O_RDWR) -> int:
    """A descriptor of its own of what another process of this machine and this user has open; it is not inherited.

    Raises:
        OSError: the process is gone, has no such descriptor, or may not be looked at.
    """
    return os.open(f"/proc/{process}/fd/{descriptor}", mode | os.O_CLOEXEC)
