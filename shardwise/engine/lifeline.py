"""Lifeline: a process that ends with its parent, and all that it started with it. Quick to import."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


def end_with_parent(lifeline: int) -> None:
    """Ends this process and its own children when the parent ends, even by SIGKILL.

    Args:
        lifeline: the end of a pipe whose other end the parent alone holds open.
    """

    def watch() -> None:
        os.read(lifeline, 1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    os.set_inheritable(lifeline, False)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=watch, name="lifeline", daemon=True).start()
