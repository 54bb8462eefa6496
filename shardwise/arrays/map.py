"""Map: a function over the blocks of an array, on threads or processes, its results in place in one array."""

from __future__ import annotations

import contextvars
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
from threadpoolctl import ThreadpoolController

from shardwise.arrays.blocks import Array, Work, is_tensor
from shardwise.errors import ArrayError
from shardwise.machine.backend import cores

# Seconds, as `make bench-map` measures them on a machine of two cores.
_THREADS = 300e-6  # to start three threads and to join them
_PROCESS = 0.15  # until a process has imported NumPy and reads its first block
_PROCESS_WITH_TORCH = 1.6  # the same with torch
_LIMITS = 2.7e-3  # to find the libraries of kernels that have threads of their own

_BLOCK = 1e-3  # seconds that a block should take: about a hundred times what it costs to hand it out
_SURE = 0.02  # a first block that takes so long was not just interrupted
_FIRST = 2**15  # elements of the first block at most, which lie in a core's own cache
_PARTS = 64  # the first block is at most such a part of the whole, for the others wait for it
_SHARE = 4  # blocks for each worker at least, so that a slow worker can take fewer


def map(
    fn: Callable[[Array], Array],
    array: Array,
    *,
    workers: int = 4,
    axis: int = 0,
    backend: Literal["threads", "processes"] = "threads",
    out: Array | None = None,
) -> Array:
    """The results of a function for the blocks of an array, in one array, computed by several workers.

    `fn` is given a block: a view of consecutive rows, where a row is what one index along `axis` selects. It returns an
    array with as many rows; its other dims, its dtype and its kind may be others. So NumPy's elementwise functions work
    as they are, and any function that treats each row by itself. How many rows a block has is not said, and depends on
    the time that blocks take: what `fn` returns for a row must not depend on the rows beside it.

    The calling thread is one of the workers. It works alone until the time that helpers would save is seen to be more
    than the time that it takes to start them, so that a small array is done at once.

    Args:
        fn: is called several times, in no order. It should not write to its block, unless `out` is the array itself.
        array: a NumPy array, or a tensor in main memory; of any strides. Read-only arrays are read.
        workers: threads or processes that work at the same time, the calling thread included. torch uses one thread in
            each of them.
        axis: of the rows.
        backend: "threads" for functions that release the GIL, as NumPy's and torch's do, or that wait; "processes" for
            those of Python: input and results are in memory that the processes share, and `fn` is sent by cloudpickle.
        out: gets the results instead of a new array; may be `array` itself.

    Returns:
        `out`, or a new array or tensor, whichever `fn` returns.

    Raises:
        ArrayError: the arguments, or what `fn` returned, do not fit together.
        RunError: a process was killed, or raised what cannot be sent.
        Exception: what `fn` raised, with a note that names the rows.
    """
    position = _checked(array, workers, axis, backend, out)
    processes = backend == "processes"
    work = Work(fn, array, position, out, shareable=processes)
    alone = one_thread_each(blas=False) if is_tensor(array) else nullcontext()
    with alone, _without_gradients(array):
        if work.rows == 0:
            work.do(0, 0)
        else:
            _work_through(work, workers, processes)
    if out is None or work.out is out:
        return work.out
    out[...] = work.out  # from memory that processes share
    return out


def _work_through(work: Work, workers: int, processes: bool) -> None:
    """Does block after block, alone or, as soon as that is faster, with helpers."""
    rows, done = work.rows, 0
    worth = 10 * _THREADS if not processes else 6 * (_PROCESS_WITH_TORCH if is_tensor(work.array) else _PROCESS)
    size = max(1, min(_FIRST * rows // max(1, math.prod(work.array.shape)), rows // _PARTS))
    each = math.inf  # seconds of a row: the least seen, for other programs only ever make it more
    while done < rows:
        began, used = time.perf_counter(), time.thread_time()
        work.do(done, done + size)
        spent, used = time.perf_counter() - began, time.thread_time() - used
        sure = done > 0
        done += size
        each = min(each, spent / size)
        left = each * (rows - done)
        if done < rows and left < _THREADS:
            work.do(done, rows)
            return
        # A block that takes less may be mostly the cost of a call.
        if left > worth and (spent > _SURE or (sure and spent > _THREADS)):
            team = min(workers, _useful(used / spent), rows - done)
            if team > 1:
                _together(work, _cut(done, rows, int(_BLOCK / spent * size), team), team, left, processes)
                return
        size = max(1, min(rows - done, int(size * min(4.0, _BLOCK / max(spent, 1e-9)))))


def _useful(busy: float) -> int:
    """How many workers keep the cores busy, where one alone is busy that part of the time.

    There may be many more that wait, as for files, than there are cores.
    """
    return max(1, round(cores() / max(busy, 1e-3)))


def _cut(start: int, stop: int, size: int, workers: int) -> list[tuple[int, int]]:
    size = max(1, min(size, (stop - start) // (_SHARE * workers)))
    return [(a, min(a + size, stop)) for a in range(start, stop, size)]


def _together(work: Work, blocks: list[tuple[int, int]], workers: int, left: float, processes: bool) -> None:
    helpers = workers - 1
    # For less it is not worth while to look for the libraries.
    with one_thread_each(blas=left > 20 * _LIMITS):
        if not processes:
            _with_threads(work, iter(blocks), helpers)
            return
        from shardwise.arrays.processes import with_processes

        with_processes(work, blocks, helpers)


def _with_threads(work: Work, blocks: Iterator[tuple[int, int]], helpers: int) -> None:
    """Does the blocks on this thread and on helpers. What the first failing block raised is raised here."""
    failures: list[tuple[int, BaseException]] = []

    def serve() -> None:
        for start, stop in blocks:  # one iterator for all: whoever is free takes the next block
            try:
                work.do(start, stop)
            except BaseException as error:
                failures.append((start, error))
                _drain(blocks)

    def help_out() -> None:
        with one_thread_each(blas=False), _without_gradients(work.array):
            serve()

    # A context carries np.errstate, for example.
    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(help_out,), name="shardwise-map", daemon=True)
        for _ in range(helpers)
    ]
    try:
        for thread in threads:
            thread.start()
        serve()
    finally:
        _drain(blocks)
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if failures:
        raise min(failures, key=lambda failure: failure[0])[1]


def _drain(blocks: Iterator[tuple[int, int]]) -> None:
    deque(blocks, maxlen=0)


@contextmanager
def one_thread_each(*, blas: bool) -> Iterator[None]:
    """Lets torch's kernels, and those of BLAS if asked, use one thread for each thread that calls them."""
    torch = sys.modules.get("torch")
    with ExitStack() as stack:
        if blas:
            stack.enter_context(ThreadpoolController().limit(limits=1, user_api="blas"))
        if torch is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        yield


def _without_gradients(array: Array) -> AbstractContextManager[Any]:
    return sys.modules["torch"].no_grad() if is_tensor(array) else nullcontext()


# --- arguments --------------------------------------------------------------------------------------------------------


def _checked(array: Array, workers: int, axis: int, backend: str, out: Array | None) -> int:
    """Checks what can be checked before a call. Returns the axis, counted from the first."""
    _check_kind("array", array)
    if not isinstance(workers, int) or workers < 1:
        raise ArrayError(f"workers must be a whole number of at least 1, but is {workers!r}")
    if backend not in ("threads", "processes"):
        raise ArrayError(f'backend must be "threads" or "processes", but is {backend!r}')
    if not isinstance(axis, int) or not -array.ndim <= axis < array.ndim:
        raise ArrayError(f"axis must be one of the {array.ndim} axes of an array of shape {tuple(array.shape)}, "
                         f"but is {axis!r}")  # fmt: skip
    if backend == "processes" and not is_tensor(array) and array.dtype.hasobject:
        raise ArrayError('the array has Python objects, which processes cannot share; take backend="threads"')
    if out is not None and out is not array:
        _check_kind("out", out)
        _check_apart(array, out)
    if out is not None and not is_tensor(out) and not out.flags.writeable:
        raise ArrayError("out is read-only; give an array that can be written")
    return int(axis % array.ndim)


def _check_kind(name: str, array: Array) -> None:
    if is_tensor(array):
        if array.device.type != "cpu" or str(array.layout) != "torch.strided" or array.is_quantized:
            raise ArrayError(
                f"{name} must be a dense tensor in main memory, but is {array.layout} on {array.device}; "
                "call fn on it directly: a device spreads one call over all of itself"
            )
        if array.requires_grad:
            raise ArrayError(f"{name} requires gradients, which map does not compute; give {name}.detach()")
    elif not isinstance(array, np.ndarray):
        raise ArrayError(
            f"{name} must be a NumPy array or a tensor, but is a {type(array).__name__}; give numpy.asarray({name})"
        )
    elif isinstance(array, np.ma.MaskedArray):
        raise ArrayError(f"{name} is a masked array, whose mask would be lost; map over .data and .mask")


def _check_apart(array: Array, out: Array) -> None:
    """That what is written is not read any more: `out` is the very rows of the array, or none of them."""
    if is_tensor(array) != is_tensor(out):
        return
    if 0 in (*array.shape, *out.shape):
        return
    if _overlap(array, out) and _view(array) != _view(out):
        raise ArrayError("out overlaps the array without being the same; give the array itself, or another")


def _overlap(a: Array, b: Array) -> bool:
    if not is_tensor(a):
        return bool(np.may_share_memory(a, b))
    ends = [t.data_ptr() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) * t.element_size()
            for t in (a, b)]  # fmt: skip
    return bool(a.data_ptr() <= ends[1] and b.data_ptr() <= ends[0])


def _view(array: Array) -> tuple[Any, ...]:
    if is_tensor(array):
        return (array.data_ptr(), array.shape, array.stride(), array.dtype)
    return (array.ctypes.data, array.shape, array.strides, array.dtype)
