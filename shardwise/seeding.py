"""Seeding: random numbers that follow from given ones."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_torch(number: int) -> None:
    """As `torch.manual_seed`, which takes up to a millisecond where there is no GPU: it notes a stack for each kind."""
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seeds the generators of Python, NumPy and torch (on the CPU) by these numbers, and puts them back after."""
    python, array = random.getstate(), np.random.get_state()
    mixed = zlib.crc32(repr(numbers).encode())
    with torch.random.fork_rng(devices=[]):
        random.seed(mixed)
        np.random.seed(mixed)
        torch.default_generator.manual_seed(mixed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
