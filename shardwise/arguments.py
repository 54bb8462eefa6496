"""What the command line's options may be given as; argparse turns a refusal into one message."""

from __future__ import annotations

import argparse
import math

STRATEGIES = ("data", "sharded", "tensor", "pipeline", "hybrid")  # as in search, which is slow to import


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but is {text!r}")
    return int(text)


def whole(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, but is {text!r}")
    return int(text)


def _number(text: str) -> float:
    """A number; 0 where it is none, which no option takes."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def gigabytes(text: str) -> float:
    """A number of gigabytes, as bytes."""
    found = _number(text)
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of gigabytes above 0, but is {text!r}")
    return found * 1e9


def temperature(text: str) -> float:
    """A number above 0."""
    found = _number(text)
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, but is {text!r}; without it nothing is drawn")
    return found


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    found = _number(text)
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, but is {text!r}")
    return found


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers of at least 0 with commas between them."""
    return tuple(whole(number.strip()) for number in text.split(","))


def axis(text: str) -> tuple[str, int]:
    """AXIS=N, as the axis's name and its size."""
    name, equals, number = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be AXIS=N, such as tensor=1, but is {text!r}")
    return name, positive(number)


def names(text: str) -> tuple[str, ...]:
    """Names of strategies with commas between them."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    strange = ", ".join(name for name in names if name not in STRATEGIES)
    if strange or not names:
        raise argparse.ArgumentTypeError(f"must be some of {','.join(STRATEGIES)}, but has {strange or 'none'}")
    return names
