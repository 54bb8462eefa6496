"""One rank: a process that runs what its parent sends, in a fresh process group each time, and ends with its parent."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import importlib.machinery
import io
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from multiprocessing.connection import Connection
from types import FunctionType, ModuleType
from typing import Any

import cloudpickle  # type: ignore[import-untyped, unused-ignore]
import torch
import torch.distributed as dist

from shardwise.engine.lifeline import end_with_parent
from shardwise.errors import RunError, ShardwiseError
from shardwise.machine.backend import Backend

_SMALL = 1 << 14
"""Bytes of an answer that go with what it is."""


@dataclass(frozen=True)
class Seat:
    """Where a rank sits. Descriptors are inherited from the parent; -1 is none."""

    rank: int
    world: int
    backend: Backend
    threads: int
    collective_timeout: float
    """Seconds."""
    first: int
    """The device of rank 0; other ranks of this machine may have those before it."""
    port: int
    """Of the TCPStore on 127.0.0.1."""
    listener: int
    """The bound socket of that store, on rank 0."""
    lifeline: int
    """A pipe that ends when the parent ends."""
    output: int
    """A pipe to the parent's stdout, on rank 0."""

    @property
    def local_rank(self) -> int:
        return self.first + self.rank


@dataclass(frozen=True)
class Order:
    """What the parent asks: to run task number `task`, to leave the group, or to end."""

    verb: str
    task: int = 0
    path: tuple[str, ...] = ()
    """The parent's sys.path."""
    argv: tuple[str, ...] = ()
    """The parent's sys.argv."""


@dataclass(frozen=True)
class Failure:
    """An exception of a rank, as its parent needs it."""

    kind: str
    message: str
    traceback: str
    collective: bool
    """Whether it may be the echo of another rank's end: torch.distributed raises RuntimeError when a peer is gone."""
    error: bytes | None
    """The pickled exception itself, where it is a ShardwiseError."""


def main(descriptor: int) -> None:
    """Serves the parent at the other end of `descriptor` until it says so, or is gone."""
    os.set_inheritable(descriptor, False)
    parent: Connection[Any, Any] = Connection(descriptor)
    os.register_at_fork(after_in_child=parent.close)  # data loader workers must not hold the line open
    seat: Seat = parent.recv()
    end_with_parent(seat.lifeline)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _pass_stdout_through(seat.output)
    gc.freeze()
    _Worker(parent, seat).serve()


class _Worker:
    """Runs orders one after another."""

    def __init__(self, parent: Connection[Any, Any], seat: Seat) -> None:
        self._parent = parent
        self._seat = seat
        self._store: dist.TCPStore | None = None

    def serve(self) -> None:
        """Answers each order, `run` with ("result" or "error", bytes) and `release` with ("idle", b"").

        What a generator yields goes to the parent at once, as ("part", bytes) before the answer.
        """
        while (order := self._next()).verb != "end":
            if order.verb == "run":
                verb, body = self._run(order, self._parent.recv_bytes())
            else:
                verb, body = "idle", b""
                self._leave()
                self._seat.backend.synchronize()  # a device that no longer answers ends this rank here
            sys.stdout.flush()
            sys.stderr.flush()
            self._send(verb, body)
            del body
        self._leave()

    def _send(self, verb: str, body: bytes) -> None:
        small = len(body) <= _SMALL  # in one message, so that the parent wakes once
        self._parent.send((verb, body if small else None))
        if not small:
            self._parent.send_bytes(body)

    def _next(self) -> Order:
        try:
            order: Order = self._parent.recv()
        except EOFError:
            return Order("end")
        return order

    def _run(self, order: Order, body: bytes) -> tuple[str, bytes]:
        try:
            self._leave()
            sys.path[:], sys.argv[:] = order.path, order.argv
            importlib.invalidate_caches()
            torch.set_num_threads(self._seat.threads)
            self._join(order.task)
            target, args = pickle.loads(body)
            found = target(*args)
            if isinstance(found, Generator):
                for part in found:
                    self._send("part", _pack_result(part, self._seat.rank))
                found = None
            return "result", _pack_result(found, self._seat.rank)
        except BaseException as error:
            traceback.print_exc()
            return "error", pickle.dumps(_failure(error))

    def _join(self, task: int) -> None:
        seat = self._seat
        seat.backend.use(seat.local_rank)
        limit = timedelta(seconds=seat.collective_timeout)
        if self._store is None:
            self._store = _open_store(seat, limit)
        store = dist.PrefixStore(f"task{task}", self._store)
        dist.init_process_group(
            seat.backend.dist_backend, store=store, rank=seat.rank, world_size=seat.world, timeout=limit
        )

    def _leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # what still refers to a process group keeps its sockets open


def _open_store(seat: Seat, limit: timedelta) -> dist.TCPStore:
    if seat.listener < 0:
        return dist.TCPStore("127.0.0.1", seat.port, seat.world, False, limit, wait_for_workers=False)
    os.set_inheritable(seat.listener, False)
    return dist.TCPStore(
        "127.0.0.1", seat.port, seat.world, True, limit, wait_for_workers=False, master_listen_fd=seat.listener
    )


def _pass_stdout_through(output: int) -> None:
    """Python's own prints go to the parent; what libraries write to descriptor 1 stays in the log."""
    if output >= 0:
        os.set_inheritable(output, False)
        sys.stdout = io.TextIOWrapper(
            os.fdopen(output, "wb", buffering=0), encoding="utf-8", errors="replace", write_through=True
        )


def _failure(error: BaseException) -> Failure:
    trace = error.__traceback__ and (error.__traceback__.tb_next or error.__traceback__)
    return Failure(
        kind=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(type(error), error, trace)),
        collective=any(isinstance(link, RuntimeError) for link in _chain(error)),
        error=_pack_error(error) if isinstance(error, ShardwiseError) else None,
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or error.__context__
    return links


def _pack_error(error: ShardwiseError) -> bytes | None:
    try:
        return pack(error)
    except Exception:
        return None


def pack(value: Any) -> bytes:
    """Pickles a value for another process of this machine that has the same sys.path.

    Functions and classes travel by name where that process can import them, else (lambdas, `__main__`, files loaded
    by path) by value.
    """
    return _dump(value, _Pickler)


def _pack_result(value: Any, rank: int) -> bytes:
    try:
        return _dump(value, _ResultPickler)
    except Exception as error:
        raise RunError(
            f"the result of rank {rank}, a {type(value).__name__}, cannot be sent to the parent process: "
            f"{type(error).__name__}: {error}; return tensors, numbers, strings or containers of them"
        ) from error


def _dump(value: Any, pickler: type[_Pickler]) -> bytes:
    buffer = io.BytesIO()
    writer = pickler(buffer)
    try:
        writer.dump(value)
    finally:
        writer.forget()
    return buffer.getvalue()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc, unused-ignore]
    """cloudpickle, which also takes by value what a fresh process could not import."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._seen: set[str] = set(cloudpickle.list_registry_pickle_by_value())
        self._by_value: list[ModuleType] = []

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (FunctionType, type)):
            self._meet(obj.__module__)
        elif isinstance(obj, ModuleType):
            if type(obj) is not ModuleType and sys.modules.get(obj.__name__) is obj:
                return importlib.import_module, (obj.__name__,)  # torch.ops and its like, which do not pickle
            self._meet(obj.__name__)
        return super().reducer_override(obj)

    def _meet(self, name: str) -> None:
        if name in self._seen or name == "__main__":
            return
        self._seen.add(name)
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None) or ""
        if module is not None and not _importable(name, file, tuple(sys.path)):
            cloudpickle.register_pickle_by_value(module)
            self._by_value.append(module)

    def forget(self) -> None:
        """Undoes the entries made in cloudpickle's own registry."""
        for module in self._by_value:
            cloudpickle.unregister_pickle_by_value(module)


class _ResultPickler(_Pickler):
    """Sends tensors as they are read: detached, on the CPU, and a view without the rest of its storage."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is torch.Tensor and obj.layout == torch.strided and not obj.is_quantized and _ungainly(obj):
            return obj.detach().cpu().clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return super().reducer_override(obj)


def _ungainly(tensor: torch.Tensor) -> bool:
    if tensor.device.type not in ("cpu", "cuda"):
        return False
    spare = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
    return spare or tensor.device.type != "cpu" or tensor.grad_fn is not None


@lru_cache(maxsize=1024)
def _importable(name: str, here: str, _path: tuple[str, ...]) -> bool:
    """Whether importing `name` in a fresh process finds this source file; so long as sys.path stays as it is."""
    if not here.endswith(".py") or not os.path.isfile(here):
        return True  # built in, compiled, or made up (torch.ops): cloudpickle knows those better
    path: Any = None
    spec: importlib.machinery.ModuleSpec | None = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        spec = _find(".".join(parts[:depth]), path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    if spec is None or spec.origin is None or not spec.has_location:
        return True  # frozen into the interpreter, or a namespace
    return os.path.realpath(spec.origin) == os.path.realpath(here)


def _find(name: str, path: Any) -> importlib.machinery.ModuleSpec | None:
    for finder in sys.meta_path:
        find: Callable[..., importlib.machinery.ModuleSpec | None] | None = getattr(finder, "find_spec", None)
        spec = find(name, path) if find else None
        if spec is not None:
            return spec
    return None
