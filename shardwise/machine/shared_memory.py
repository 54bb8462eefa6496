"""A backend of torch.distributed for the CPU: collectives between processes of one machine, through shared memory.

Gloo sends over sockets also where both ends are on one machine: each message wakes a thread on either side, and the
kernel copies it twice. This does the same through memory that both map. Where ranks are on several machines, or on
processors that it cannot trust with it (see `slots`), gloo does the work; and always what ranks send to single others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.profiler import record_function

from shardwise.machine.pieces import Pieces, alike, fill, flat, get, give, join, rows
from shardwise.machine.slots import SLOT_BYTES, Exchange, Put, Slots, Take, meet

NAME = "shardwise"
"""What torch.distributed calls the backend."""
_DIRECT_BYTES = 1 << 16
"""Up to here each of several ranks sums everything, in one round; above, it sums its part and gathers the others'."""
_FOLDS: tuple[tuple[Any, Callable[..., Tensor]], ...] = (
    (dist.ReduceOp.SUM, torch.add),
    (dist.ReduceOp.MAX, torch.maximum),
    (dist.ReduceOp.MIN, torch.minimum),
    (dist.ReduceOp.PRODUCT, torch.mul),
)
_KINDS = ("all_reduce", "reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all")
SPAN = "shardwise:collective"
"""What torch's profiler calls the time that a rank spends in a collective, waiting for others included."""

Observer = Callable[[str, dist.ProcessGroup, int], None]
OBSERVER: ContextVar[Observer | None] = ContextVar("observer", default=None)
"""Is told of each collective through shared memory its kind, its group and the bytes that this rank hands in.

torch's dispatcher sees the others.
"""


def register() -> str:
    """Makes the backend known to torch.distributed, and returns its name."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, SharedMemoryGroup, devices=["cpu"])
    return NAME


def shares_memory(group: dist.ProcessGroup) -> bool:
    """Whether a group's collectives go through shared memory."""
    return isinstance(group, SharedMemoryGroup) and group.shares_memory


class Pending:
    """A collective under way.

    Args:
        slots: what it goes through.
        rounds: of the group, after which it is done.
    """

    def __init__(self, slots: Slots, rounds: int) -> None:
        self._slots, self._rounds = slots, rounds

    def is_completed(self) -> bool:
        """Whether this rank has all that is meant for it; goes on as far as it can without waiting."""
        self._slots.advance()
        return self._slots.taken >= self._rounds

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until this rank has all that is meant for it.

        Args:
            timeout: how long the others may do nothing; None means as long as the group allows.

        Raises:
            RuntimeError: another rank is gone, takes too long, or does something else.
        """
        with _span():
            self._slots.wait(self._rounds, timeout.total_seconds() if timeout else None)
        return True


_ProcessGroup: Any = dist.ProcessGroup  # whose methods are declared for C++ alone


class SharedMemoryGroup(_ProcessGroup):  # type: ignore[misc]
    """A process group of ranks on one machine; where they are not, one of gloo.

    Sums are taken in the order of the ranks, so that all ranks get the same bits.

    Args:
        store: where the ranks meet.
        rank, size: this rank's place in the group.
        timeout: how long to wait for another rank.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo: Any = _gloo(store, rank, size, timeout)
        file = meet(store, rank, size)
        self._slots = None if file is None else Slots(file, rank, size, timeout.total_seconds())
        self.shares_memory = file is not None

    @property
    def group_name(self) -> str:
        """What torch.distributed calls this group."""
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name
        self._gloo._set_group_name(name)

    def _set_group_desc(self, desc: str) -> None:
        super()._set_group_desc(desc)
        self._gloo._set_group_desc(desc)

    def shutdown(self) -> None:
        """Take no further part, and let go of memory and connections; others that wait for this rank fail."""
        if self._slots is not None:
            self._slots.close()
        self._gloo.shutdown()
        self._slots = self._gloo = None  # torch itself may keep groups, in default arguments of its own functions

    # -- what torch.distributed calls ----------------------------------------------------------------------------------

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Any:
        fold = _fold_of(opts.reduceOp)
        if self._slots is None or fold is None:
            return self._gloo.allreduce(tensors, opts)
        self._tell("all_reduce", tensors)
        x = flat(tensors[0])[None]
        if self.size() > 2 and x.nbytes > _DIRECT_BYTES:
            parts = x.split(-(-x.numel() // self.size()), dim=1)
            parts += (x[:, :0],) * (self.size() - len(parts))
            self._reduce_scatter(parts[self.rank()], parts, fold)
            return self._gather(parts, parts[self.rank()], after=True)
        return self._reduce("all_reduce", x, fold, range(self.size()))

    def reduce(self, tensors: list[Tensor], opts: Any) -> Any:
        fold = _fold_of(opts.reduceOp)
        if self._slots is None or fold is None:
            return self._gloo.reduce(tensors, opts)
        self._tell("reduce", tensors)
        return self._reduce("reduce", flat(tensors[0])[None], fold, (opts.rootRank,))

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Any:
        fold = _fold_of(opts.reduceOp)
        if self._slots is None or fold is None:
            return self._gloo.reduce_scatter(outputs, inputs, opts)
        self._tell("reduce_scatter", inputs[0])
        return self._reduce_scatter(*alike(outputs[0], inputs[0]), fold)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Any:
        if self._slots is None:
            return self._gloo.allgather(outputs, inputs, opts)
        self._tell("all_gather", inputs)
        x, outs = alike(inputs[0], outputs[0])
        return self._gather(outs, x)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Any:
        if self._slots is None:
            return self._gloo.gather(outputs, inputs, opts)
        self._tell("gather", inputs)
        return self._collect(alike(inputs[0], outputs[0])[1] if outputs else (), alike(inputs[0], inputs)[0])

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:
        if self._slots is None:
            return self._gloo.broadcast(tensors, opts)
        self._tell("broadcast", tensors)
        return self._broadcast(flat(tensors[0])[None], opts.rootRank)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any
    ) -> Any:
        if self._slots is None:
            return self._gloo.all_to_all_single(output, input, output_splits, input_splits, opts)
        self._tell("all_to_all", [input])
        return self._all_to_all(output, input, output_splits, input_splits)

    def alltoall_base(self, *args: Any) -> Any:
        """What `all_to_all_single` is called before torch 2.13."""
        if self._slots is None:
            return self._gloo.alltoall_base(*args)
        self._tell("all_to_all", args[1:2])
        return self._all_to_all(*args[:4])

    def barrier(self, opts: Any) -> Any:
        if self._slots is None:
            return self._gloo.barrier(opts)
        return self._reduce("all_reduce", torch.zeros(1, 1, dtype=torch.uint8), torch.add, range(self.size()))

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Any:
        return self._gloo.send(tensors, to, tag)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Any:
        return self._gloo.recv(tensors, source, tag)

    def _tell(self, kind: str, given: Sequence[Tensor]) -> None:
        observer = OBSERVER.get()
        if observer is not None:
            observer(kind, self, sum(x.nbytes for x in given))

    # -- through slots -------------------------------------------------------------------------------------------------

    def _reduce(self, kind: str, x: Tensor, fold: Callable[..., Tensor], roots: Sequence[int]) -> Pending:
        """Every root sums what all put."""
        pieces = Pieces.of(x, SLOT_BYTES)

        def put(k: int, slot: Tensor) -> None:
            give(pieces[x, k], slot)

        def take(k: int, slots: Sequence[Tensor]) -> None:
            join(pieces[x, k], slots, fold)

        return self._begin(kind, x, pieces, put, take if self.rank() in roots else None)

    def _reduce_scatter(self, out: Tensor, parts: Sequence[Tensor], fold: Callable[..., Tensor]) -> Pending:
        """A slot has a piece for each rank, who sums its own of every slot."""
        pieces = Pieces.of(parts[0], SLOT_BYTES // self.size())
        mine = self.rank() * pieces.each

        def put(k: int, slot: Tensor) -> None:
            for rank, part in enumerate(parts):
                give(pieces[part, k], slot[rank * pieces.each :])

        def take(k: int, slots: Sequence[Tensor]) -> None:
            join(pieces[out, k], [slot[mine:] for slot in slots], fold)

        return self._begin("reduce_scatter", out, pieces, put, take)

    def _gather(self, outs: Sequence[Tensor], x: Tensor, *, after: bool = False) -> Pending:
        """Every rank takes what all put."""
        # Parts have one shape, but for the last of those into which an all-reduce cuts a tensor.
        pieces = Pieces.of(outs[0], SLOT_BYTES)

        def put(k: int, slot: Tensor) -> None:
            give(pieces[x, k], slot)

        def take(k: int, slots: Sequence[Tensor]) -> None:
            for rank, (out, slot) in enumerate(zip(outs, slots, strict=True)):
                if rank != self.rank():
                    get(pieces[out, k], slot)

        if outs[self.rank()].data_ptr() != x.data_ptr():
            outs[self.rank()].copy_(x.view(outs[self.rank()].shape))
        return self._begin("all_gather", x, pieces, put, take, after=after)

    def _collect(self, outs: Sequence[Tensor], x: Tensor) -> Pending:
        """The rank that has room for it takes what all put; the others do not know into what rows."""
        pieces = Pieces.of(x, SLOT_BYTES)

        def put(k: int, slot: Tensor) -> None:
            give(pieces[x, k], slot)

        def take(k: int, slots: Sequence[Tensor]) -> None:
            for rank, (out, slot) in enumerate(zip(outs, slots, strict=True)):
                if rank != self.rank():
                    fill(out, k * pieces.each, slot[: pieces[x, k].numel()])

        if outs:
            outs[self.rank()].copy_(x.view(outs[self.rank()].shape))
        return self._begin("all_gather", x, pieces, put, take if outs else None)

    def _broadcast(self, x: Tensor, root: int) -> Pending:
        pieces = Pieces.of(x, SLOT_BYTES)

        def put(k: int, slot: Tensor) -> None:
            give(pieces[x, k], slot)

        def take(k: int, slots: Sequence[Tensor]) -> None:
            get(pieces[x, k], slots[root])

        here = self.rank() == root
        return self._begin("broadcast", x, pieces, put if here else None, None if here else take)

    def _all_to_all(self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int]) -> Pending:
        """A slot has a piece for each rank, as long as the longest message needs."""
        out = [rows(part) for part in flat(output).split(_lengths(output, output_splits, self.size()))]
        parts = [rows(part) for part in flat(input).split(_lengths(input, input_splits, self.size()))]
        longest = parts[0].numel()
        if output_splits or input_splits:  # messages may differ, and each rank knows only its own
            found = torch.tensor([[max(part.numel() for part in parts)]])
            self._reduce("all_reduce", found, torch.maximum, range(self.size())).wait()
            longest = int(found)
        pieces = Pieces(1, longest, SLOT_BYTES // self.size() // input.itemsize)
        mine = self.rank() * pieces.each

        def put(k: int, slot: Tensor) -> None:
            for rank, part in enumerate(parts):
                give(pieces[part, k], slot[rank * pieces.each :])

        def take(k: int, slots: Sequence[Tensor]) -> None:
            for part, slot in zip(out, slots, strict=True):
                get(pieces[part, k], slot[mine:])

        return self._begin("all_to_all", input, pieces, put, take)

    def _begin(
        self, kind: str, x: Tensor, pieces: Pieces, put: Put | None, take: Take | None, *, after: bool = False
    ) -> Pending:
        assert self._slots is not None
        numbers = pieces.rows * pieces.columns * x.itemsize * 1_000_003 + pieces.columns
        sign = _KINDS.index(kind) << 56 | numbers % (1 << 56)
        with _span():
            rounds = self._slots.begin(Exchange(sign, x.dtype, pieces.count, put, take, after))
        return Pending(self._slots, rounds)


def _gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    """A process group of gloo, put together as torch.distributed does it."""
    kind: Any = dist.ProcessGroup
    group, backend = kind(store, rank, size), dist.ProcessGroupGloo(store, rank, size, timeout)
    backend._set_sequence_number_for_group()
    group._set_default_backend(kind.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), kind.BackendType.GLOO, backend)
    return group


def _span() -> AbstractContextManager[object]:
    return record_function(SPAN) if torch.autograd._profiler_enabled() else nullcontext()


def _fold_of(op: Any) -> Callable[..., Tensor] | None:
    """What joins two ranks' numbers; None where only gloo knows. An operation equals its name, but hashes otherwise."""
    return next((fold for known, fold in _FOLDS if op == known), None)


def _lengths(x: Tensor, splits: list[int], size: int) -> list[int]:
    """Numbers that go to or come from each rank; `splits` counts them in rows."""
    if not splits:
        return [x.numel() // size] * size
    row = x.numel() // x.shape[0] if x.shape[0] else 0
    return [n * row for n in splits]
