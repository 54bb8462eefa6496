"""Crew: the processes of local ranks, with their logs; they listen on loopback only and none outlives its parent."""

from __future__ import annotations

import codecs
import contextlib
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal

from shardwise.engine.worker import Order, Seat
from shardwise.errors import LaunchError
from shardwise.machine.backend import Backend

_LOOPBACK = "127.0.0.1"
_LEAVE = 5.0  # seconds for ranks to leave when asked
_STOP = 1.0  # seconds between SIGTERM and SIGKILL
_TAIL = 4000  # characters of a log that a message carries

Environment = Callable[[Seat], dict[str, str]]

_BOOT = (
    "import sys; descriptor = int(sys.argv[1]); sys.path[:] = sys.argv[2:]; "
    "from shardwise.engine.worker import main; main(descriptor)  # rank {rank} of {world}"
)


@dataclass(frozen=True)
class Event:
    """What a rank did: answered an order with these bytes, or with a part of its answer, or died."""

    rank: int
    verb: Literal["part", "result", "error", "idle", "died"]
    body: bytes = b""


class Crew:
    """The processes of one pool, with what they share: the store's socket, the lifeline, the logs."""

    def __init__(
        self,
        world: int,
        backend: Backend,
        threads: int,
        log_dir: Path | None,
        collective_timeout: float,
        first: int,
        *,
        environment: Environment,
    ) -> None:
        self._owner = os.getpid()
        self.logs = _Logs(log_dir, world)
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.ranks: list[Rank] = []
        self._lifeline = os.pipe()
        self.output = _PassThrough(self.logs.file(0))
        try:
            with socket.create_server((_LOOPBACK, 0), backlog=1024) as listener:
                for number in range(world):
                    seat = Seat(
                        rank=number,
                        world=world,
                        backend=backend,
                        threads=threads,
                        collective_timeout=collective_timeout,
                        first=first,
                        port=listener.getsockname()[1],
                        listener=-1 if number else listener.fileno(),
                        lifeline=self._lifeline[0],
                        output=-1 if number else self.output.inlet,
                    )
                    self.ranks.append(Rank(seat, environment(seat), self.events, self.logs.file(number)))
        except BaseException:
            self.end()
            raise
        finally:
            os.close(self._lifeline[0])
            self.output.close_inlet()

    def next_event(self, until: float) -> Event | None:
        """The next event, or None when the monotonic clock reads `until`."""
        try:
            return self.events.get(timeout=min(max(0.0, until - time.monotonic()), 1e6))
        except Empty:
            return None

    def stop(self, *, gently: bool) -> None:
        """Ends every rank and all that it started: asked to leave or by SIGTERM, then by SIGKILL."""
        living = [rank for rank in self.ranks if rank.living]
        for rank in living:
            if gently:
                rank.tell(Order("end"))
            else:
                rank.signal(signal.SIGTERM)
                rank.signal(signal.SIGCONT)
        limit = time.monotonic() + (_LEAVE if gently else _STOP)
        for rank in living:
            rank.bury(limit)

    def end(self) -> None:
        """Ends every rank and gives back what the pool holds; nothing in a process forked from the owner."""
        if os.getpid() != self._owner:
            return
        try:
            self.stop(gently=True)
        finally:
            os.close(self._lifeline[1])
            self.output.join()
            self.logs.discard()


class Rank:
    """The process of one rank, and the thread that starts it and speaks with it.

    The thread stays as long as the process: Linux ends a child with the thread that forked it.
    """

    def __init__(self, seat: Seat, environment: dict[str, str], events: SimpleQueue[Event], log: Path) -> None:
        self._seat = seat
        self._environment = environment
        self._events = events
        self._outbox: SimpleQueue[tuple[Order, bytes] | None] = SimpleQueue()
        self._line, theirs = Pipe()
        self._process: subprocess.Popen[bytes] | None = None
        self._trouble: OSError | None = None
        self._started, self._buried = threading.Event(), threading.Event()
        name = f"shardwise-rank{seat.rank}"
        self._keeper = threading.Thread(target=self._keep, args=(theirs, log), name=name, daemon=True)
        self._keeper.start()
        self._started.wait()
        if self._trouble is not None:
            raise LaunchError(
                f"rank {seat.rank} of {seat.world} cannot start: {self._trouble}; ask for fewer ranks"
            ) from self._trouble

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    @property
    def living(self) -> bool:
        return not self._buried.is_set()

    def tell(self, order: Order, payload: bytes = b"") -> None:
        self._outbox.put((order, payload))

    def signal(self, number: signal.Signals) -> None:
        """Signals the rank and what it started; they form a group whose number is taken until the rank is buried."""
        if self._process is not None and self.living:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def bury(self, until: float | None = None) -> str:
        """Waits for the end of the process (1 s, or until the monotonic clock reads `until`), or kills it.

        Returns how it ended.
        """
        if self._process is None:
            return "did not start"
        await_end(self._process, time.monotonic() + 1.0 if until is None else until)
        self.signal(signal.SIGKILL)
        status = self._process.wait()
        self._buried.set()
        self._outbox.put(None)
        self._keeper.join(timeout=1.0)  # it closes the line
        if status >= 0:
            return f"exited with code {status}"
        hint = ", as the kernel does when memory runs out," if status == -signal.SIGKILL else ""
        return f"was killed by signal {-status} ({_signal_name(-status)}){hint}"

    def _keep(self, theirs: Connection[Any, Any], log: Path) -> None:
        try:
            self._process = self._start(theirs, log)
        except OSError as error:
            self._trouble = error
            self._buried.set()
            return
        finally:
            theirs.close()
            self._started.set()
        with contextlib.suppress(EOFError, OSError):
            self._line.send(self._seat)
            while said := self._outbox.get():
                self._converse(*said)
        if self.living:
            self._events.put(Event(self._seat.rank, "died"))
        self._buried.wait()
        self._line.close()

    def _converse(self, order: Order, payload: bytes) -> None:
        self._line.send(order)
        if order.verb == "run":
            self._line.send_bytes(payload)
        verb = "part"
        while verb == "part":
            verb, body = self._line.recv()
            self._events.put(Event(self._seat.rank, verb, self._line.recv_bytes() if body is None else body))

    def _start(self, theirs: Connection[Any, Any], log: Path) -> subprocess.Popen[bytes]:
        seat = self._seat
        boot = _BOOT.format(rank=seat.rank, world=seat.world)
        inherited = (theirs.fileno(), seat.lifeline, seat.listener, seat.output)
        with log.open("ab", buffering=0) as out:
            return subprocess.Popen(
                [sys.executable, "-u", "-c", boot, str(theirs.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self._environment,
                pass_fds=[descriptor for descriptor in inherited if descriptor >= 0],
                start_new_session=True,
            )


def await_end(process: subprocess.Popen[bytes], until: float) -> None:
    """Waits for the end, or until the monotonic clock reads `until`, and does not reap: the group keeps its number."""
    while time.monotonic() < until and not _ended(process):
        time.sleep(0.005)


def _ended(process: subprocess.Popen[bytes]) -> bool:
    if not hasattr(os, "waitid"):  # macOS
        return process.poll() is not None
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # reaped behind our back
        return True


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unnamed"


class _Logs:
    """One log file per rank, in the user's directory, or in a temporary one that is kept only on failure."""

    def __init__(self, directory: Path | None, world: int) -> None:
        self._temporary = directory is None
        self._keep = False
        try:
            self.path = directory or Path(tempfile.mkdtemp(prefix="shardwise-"))
            self.path.mkdir(parents=True, exist_ok=True)
            for number in range(world):
                self.file(number).write_bytes(b"")
        except OSError as error:
            raise LaunchError(f"logs cannot be written to {directory}: {error}; give another directory") from error

    def file(self, number: int) -> Path:
        return self.path / f"rank{number}.log"

    def kept(self, number: int | None = None) -> str:
        """Keeps the logs; says where they are, and how the log of one rank ends."""
        self._keep = True
        where = f"the logs are in {self.path}"
        if number is None:
            return where
        tail = self.file(number).read_bytes()[-_TAIL:].decode(errors="replace").strip()
        return f"{where}; rank{number}.log ends with:\n\n{tail}" if tail else f"{where}; rank{number}.log is empty"

    def discard(self) -> None:
        if self._temporary and not self._keep:
            shutil.rmtree(self.path, ignore_errors=True)


class _PassThrough:
    """Copies what rank 0 prints to its log and, at once, to this process' stdout."""

    def __init__(self, log: Path) -> None:
        self._outlet, self.inlet = os.pipe()
        os.set_blocking(self._outlet, False)
        self._log = log.open("ab", buffering=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._copy, name="shardwise-stdout", daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._outlet, selectors.EVENT_READ)
            while self.drain():
                selector.select()
        with self._lock:
            os.close(self._outlet)
            self._log.close()

    def drain(self) -> bool:
        """Copies all there is by now; False at the end of it."""
        with self._lock:
            while not self._log.closed:
                try:
                    data = os.read(self._outlet, 65536)
                except BlockingIOError:
                    return True
                if not data:
                    break
                self._log.write(data)
                _show(self._decoder.decode(data))
            return False

    def close_inlet(self) -> None:
        """Leaves the inlet to the rank alone."""
        os.close(self.inlet)

    def join(self) -> None:
        self._thread.join(timeout=1.0)


def _show(text: str) -> None:
    stream = sys.stdout
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it any more
        stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
