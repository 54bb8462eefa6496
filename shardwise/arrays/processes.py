"""Processes for `map`: input and results lie in memory that they share; none outlives the call or its caller."""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

import numpy as np

from shardwise.arrays.blocks import Array, Form, Work
from shardwise.arrays.worker import TOKEN, Task, Told, take
from shardwise.engine.crew import await_end
from shardwise.engine.launch import environment_of_worker
from shardwise.engine.worker import pack
from shardwise.errors import ArrayError, RunError

_BOOT = (
    "import sys; line, lifeline = map(int, sys.argv[1:3]); sys.path[:] = sys.argv[3:]; "
    "from shardwise.arrays.worker import main; main(line, lifeline)"
)


def with_processes(work: Work, blocks: Sequence[tuple[int, int]], helpers: int) -> None:
    """Does the blocks in this process and in helpers. `work.out`, unless the caller gave it, becomes shared memory.

    Raises:
        RunError: a helper was killed, or raised what cannot be sent.
        Exception: what the function raised.
    """
    try:
        payload = pack(work.fn)
    except Exception as error:
        raise ArrayError(
            f"fn cannot be sent to other processes: {type(error).__name__}: {error}; "
            'open files and locks inside of it, or take backend="threads"'
        ) from error
    done, kept = blocks[0][0], work.out
    assert kept is not None  # rows before the blocks are done
    source, target = Form.of(work.array), Form.of(kept)
    with contextlib.ExitStack() as stack:
        source_file, shared = _shared(stack, source)
        rest = work.at(done, work.rows)
        shared[rest] = work.array[rest]
        target_file, work.out = _shared(stack, target)
        before = work.at(0, done)
        work.out[before] = kept[before]
        work.array = shared
        tokens = _pipe_of(stack, blocks)
        task = Task(source, target, source_file, target_file, work.axis, tokens, dict(np.geterr()), tuple(sys.path))
        crew = _Crew(stack, task, payload, helpers)
        crew.work(work, work.rows - done)


def _shared(stack: contextlib.ExitStack, form: Form) -> tuple[int, Array]:
    """Memory that has no name, so that nothing is left of it, and an array over all of it."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("shardwise-map")
        stack.callback(os.close, file)
    else:  # macOS
        kept = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
        file = kept.fileno()
    size = max(1, form.nbytes)
    os.truncate(file, size)
    return file, form.over(mmap.mmap(file, size))


def _pipe_of(stack: contextlib.ExitStack, blocks: Sequence[tuple[int, int]]) -> int:
    """The reading end of a pipe that holds all the blocks, each for whoever reads it first."""
    tokens, inlet = os.pipe()
    stack.callback(os.close, tokens)
    try:
        room = 4096 // TOKEN.size  # what every pipe holds
        for start, stop in _merged(blocks, room):
            os.write(inlet, TOKEN.pack(start, stop))
    finally:
        os.close(inlet)
    return tokens


def _merged(blocks: Sequence[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    """The same rows in no more blocks than that."""
    step = -(-len(blocks) // most)
    for first in range(0, len(blocks), step):
        group = blocks[first : first + step]
        yield group[0][0], group[-1][1]


class _Crew:
    """Helpers that take blocks from the same pipe as this process."""

    def __init__(self, stack: contextlib.ExitStack, task: Task, payload: bytes, helpers: int) -> None:
        self._tokens = task.tokens
        self._helpers: dict[Connection[Any, Any], subprocess.Popen[bytes]] = {}
        self._begun: dict[Connection[Any, Any], Told] = {}
        self._left = 0
        """Rows that are not done."""
        lifeline, held = os.pipe()
        stack.callback(os.close, held)
        stack.callback(self._end)
        try:
            for _ in range(helpers):
                self._start(task, payload, lifeline)
        finally:
            os.close(lifeline)

    def _start(self, task: Task, payload: bytes, lifeline: int) -> None:
        line, theirs = Pipe()
        with theirs:
            inherited = (theirs.fileno(), lifeline, task.source_file, task.target_file, task.tokens)
            process = subprocess.Popen(
                [sys.executable, "-u", "-c", _BOOT, str(theirs.fileno()), str(lifeline), *sys.path],
                stdin=subprocess.DEVNULL,
                env=environment_of_worker(),
                pass_fds=inherited,
                start_new_session=True,
            )
        self._helpers[line] = process
        with contextlib.suppress(OSError):  # it ended already, which is found out later
            line.send_bytes(pickle.dumps(task))
            line.send_bytes(payload)

    def work(self, work: Work, rows: int) -> None:
        """Does blocks here until there are none, then waits for those of the helpers."""
        self._left = rows
        while (block := take(self._tokens)) is not None:
            work.do(*block)
            self._left -= block[1] - block[0]
            self._listen(work, 0.0)
        while self._left:
            if not self._helpers:
                raise RunError(f"the processes ended with {self._left} of {work.rows} rows undone")
            self._listen(work, None)

    def _listen(self, work: Work, seconds: float | None) -> None:
        for line in wait(list(self._helpers), seconds):
            assert isinstance(line, Connection)
            try:
                told: Told = pickle.loads(line.recv_bytes())
            except (EOFError, OSError):
                self._lost(line, work)
                continue
            if told.what == "failed":
                raise _error(told, work)
            self._begun.pop(line, None)
            if told.what == "begun":
                self._begun[line] = told
            else:
                self._left -= told.stop - told.start

    def _lost(self, line: Connection[Any, Any], work: Work) -> None:
        """A helper has ended without a word. It may not even have begun, which others can do without."""
        process = self._helpers.pop(line)
        line.close()
        await_end(process, time.monotonic() + 1.0)
        _kill(process)
        status = process.wait()
        begun = self._begun.pop(line, None)
        if begun is None:
            return
        how = f"was killed by signal {-status}" if status < 0 else f"exited with code {status}"
        hint = ", as the kernel does when memory runs out" if -status == signal.SIGKILL else ""
        raise RunError(f"a process {how}{hint}, in {work.where(begun.start, begun.stop)}; ask for fewer workers")

    def _end(self) -> None:
        for process in self._helpers.values():
            _kill(process)
        for line, process in self._helpers.items():
            process.wait()
            line.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a helper and what it started; the number of their group is taken until it is waited for."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _error(told: Told, work: Work) -> BaseException:
    """What the function raised in a helper, or what says so."""
    note = f"raised in another process:\n{told.traceback}"
    if told.error:
        with contextlib.suppress(Exception):
            error = pickle.loads(told.error)
            if isinstance(error, BaseException):
                error.add_note(note)
                return error
    where = f" in {work.where(told.start, told.stop)}" if told.stop else ""
    return RunError(f"fn raised {told.kind}{where}: {told.message}\n{told.traceback}")
