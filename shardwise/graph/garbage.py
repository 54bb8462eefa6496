"""Garbage: Python's search for it rests while a model is captured or planned. What does this is imported in no time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """As long as this lasts, objects that only refer to each other are not looked for.

    What is captured and what plans are priced with stays, and there is little else. Walking all of it again and again
    takes a quarter of the time.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
