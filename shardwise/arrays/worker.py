"""The process of a worker of `map`: takes blocks of a shared array until there are none. Does not import torch."""

from __future__ import annotations

import mmap
import os
import pickle
import struct
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from shardwise.arrays.blocks import Array, Form, Work
from shardwise.engine.lifeline import end_with_parent

TOKEN = struct.Struct("qq")
"""A block as it lies in the pipe that all workers read: its first row, and the one behind its last."""


@dataclass(frozen=True)
class Task:
    """What a worker is to do. Descriptors are inherited from the parent."""

    source: Form
    """Of the array in `source_file`."""
    target: Form
    source_file: int
    target_file: int
    axis: int
    tokens: int
    """The reading end of the pipe of blocks."""
    errstate: dict[str, Any]
    """NumPy's handling of floating-point errors."""
    path: tuple[str, ...]
    """The parent's sys.path."""


@dataclass(frozen=True)
class Told:
    """What a worker tells its parent of a block: that it begins it, did it, or failed."""

    what: str
    start: int = 0
    stop: int = 0
    kind: str = ""
    message: str = ""
    traceback: str = ""
    error: bytes = b""
    """The pickled exception, where it pickles."""


def take(tokens: int) -> tuple[int, int] | None:
    """The next block; None when there are none. A pipe gives each token to one reader, and whole."""
    read = os.read(tokens, TOKEN.size)
    return TOKEN.unpack(read) if read else None


def mapped(file: int, form: Form) -> Array:
    """The array in a file that processes share."""
    return form.over(mmap.mmap(file, max(1, form.nbytes)))


def main(descriptor: int, lifeline: int) -> None:
    """Works for the parent at the other end of `descriptor` until there is no block left, or no parent."""
    end_with_parent(lifeline)
    line: Connection[Any, Any] = Connection(descriptor)
    task: Task | None = None
    block = (0, 0)
    try:
        task = pickle.loads(line.recv_bytes())
        assert isinstance(task, Task)
        sys.path[:] = task.path
        fn = pickle.loads(line.recv_bytes())
        np.seterr(**task.errstate)
        source, target = mapped(task.source_file, task.source), mapped(task.target_file, task.target)
        work = Work(fn, source, task.axis, target, shareable=True)
        if task.source.tensor:
            import torch

            torch.set_grad_enabled(False)
        while (found := take(task.tokens)) is not None:
            block = found
            _tell(line, Told("begun", *block))
            work.do(*block)
            _tell(line, Told("done", *block))
        line.recv_bytes()  # until the parent goes on
    except EOFError:
        return
    except BaseException as error:
        if task is not None:
            while take(task.tokens) is not None:
                pass
        _tell(line, _failure(error, block))


def _tell(line: Connection[Any, Any], told: Told) -> None:
    line.send_bytes(pickle.dumps(told))


def _failure(error: BaseException, block: tuple[int, int]) -> Told:
    import cloudpickle  # type: ignore[import-untyped, unused-ignore]

    text = "".join(traceback.format_exception(error))
    try:
        packed = cloudpickle.dumps(error)
        pickle.loads(packed)
    except Exception:
        packed = b""
    return Told("failed", *block, type(error).__name__, str(error), text, packed)
