"""ZeRO-3 for a module that is run as it is: an operator that reads a parameter has its bucket gathered first.

What is read, how often and in which order may depend on the data and differ between ranks, while a collective needs all
of them. So in each pass (forward over a micro-batch, or its backward) every rank gathers every bucket once and in one
order, backward in the opposite one: whoever needs a bucket begins all up to it, and at the end of its pass all that are
left. A rank that needs a bucket again after it let go of it begins all that are left, and then asks for it; the others
have ended their pass and wait for questions, until nobody asks. What was asked for is from then on gathered first in
every pass and kept to its end, which suits tied weights and loops. So nothing here can wait for ever.

Gradients are reduced in an order of their own, on a group of their own, when all of a bucket have arrived.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardwise.errors import RunError
from shardwise.parallel.data import weakly
from shardwise.parallel.mesh import Axis, Mesh, Recorder, open_group
from shardwise.parallel.sharded import FlatBucket

_READING = frozenset(("data", "T", "mT", "H", "mH", "real", "imag"))
"""Attributes of a tensor that are views of its values."""


@dataclass(frozen=True, eq=False)
class _Kept:
    """A tensor that backward needs, as a part of a bucket."""

    bucket: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


@dataclass(eq=False)
class _Pass:
    """One pass over the module.

    Attributes:
        order: the buckets in the order in which all ranks gather them.
        backward: whether gradients arrive.
        begun: how many of `order` are gathered or on their way.
        coming: those on their way.
        read: those that an operator has read.
        arrived: names of the parameters that have their gradient.
        ready: gradients of whole buckets, still to be reduced.
        sent: how many buckets are reduced or being so, counted from the last one.
        sending: those that are being reduced.
        parts: this rank's parts of those that are reduced.
    """

    order: list[int]
    backward: bool
    begun: int = 0
    coming: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)
    read: set[int] = field(default_factory=set)
    arrived: set[str] = field(default_factory=set)
    ready: dict[int, Tensor] = field(default_factory=dict)
    sent: int = 0
    sending: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)
    parts: dict[int, Tensor] = field(default_factory=dict)


class OnDemand(TorchFunctionMode):
    """The parameters of a module, in parts, and whole while something reads them.

    Args:
        buckets: the parameters, all cut over one axis.
        params: the module's parameters by name; they keep shape and dtype, and their values come and go.
        mesh: this rank's place.

    Attributes:
        used: names of the parameters that a gradient has arrived for; whoever reads it empties it.
    """

    def __init__(self, buckets: Sequence[FlatBucket], params: Mapping[str, nn.Parameter], mesh: Mesh) -> None:
        super().__init__()
        self._buckets = buckets
        self._params = [[params[name] for name in bucket.names] for bucket in buckets]
        self._index = {id(p): i for i, members in enumerate(self._params) for p in members}
        self._axis = buckets[0].axis
        self._reducing = _group_beside(mesh, self._axis)
        self._asked: list[int] = []
        self._pass: _Pass | None = None
        self._full: dict[int, Tensor] = {}
        self._at: dict[int, int] = {}
        self._kept: list[set[_Kept]] = [set() for _ in buckets]
        device = buckets[0].shard.device
        self._device = device
        self._anchor = torch.zeros((), dtype=buckets[0].shard.dtype, device=device, requires_grad=True)
        self._blank = [[p.new_full((), math.nan, device=device).expand(p.shape) for p in m] for m in self._params]
        self.used: set[str] = set()
        for i, members in enumerate(self._params):
            for name, param in zip(buckets[i].names, members, strict=True):
                param.register_post_accumulate_grad_hook(partial(weakly(self._arrived), i, name))
            self._let_go(i)

    def announce(self, recorder: Recorder, micros: int) -> None:
        """The collectives of `micros` forward and backward passes in which nothing has to be asked for."""
        axis = self._axis.name
        for _ in range(micros):
            for bucket in self._buckets:
                size = bucket.shard.element_size()
                for _ in range(2):
                    recorder.add("all_gather", axis, bucket.part * size)
                recorder.add("reduce_scatter", axis, bucket.length * size)
                for also in bucket.also:
                    recorder.add("all_reduce", also.name, bucket.part * size)
            for _ in range(2):
                recorder.add("all_reduce", axis, torch.int64.itemsize)

    # -- passes ------------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self) -> Iterator[None]:
        """While it is active operators find their parameters, in forward passes and in the backward passes of them."""
        # Backward may run a part of the module again.
        with self, torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward pass; all ranks make as many."""
        self._start(backward=False)
        yield
        self._end()
        self._pass = None

    def anchored(self, loss: Tensor) -> Tensor:
        """The loss, so that its backward is a pass: on every rank, even where no parameter was used."""
        if not torch.is_grad_enabled():
            return loss
        loss = loss + self._anchor
        loss.register_hook(self._start_backward)
        return loss

    def _start_backward(self, grad: Tensor) -> None:
        self._start(backward=True)
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _start(self, *, backward: bool) -> None:
        rest = [i for i in range(len(self._buckets)) if i not in self._asked]
        self._pass = _Pass(self._asked + (rest[::-1] if backward else rest), backward)

    def _end(self) -> None:
        now = self._now
        self._begin(len(now.order))
        while self._ask(None) is not None:
            pass
        for work, _ in now.coming.values():
            work.wait()
        for i in list(self._full):
            self._let_go(i)

    def _end_backward(self) -> None:
        now = self._now
        for i in range(len(self._buckets) - now.sent):
            if i not in now.ready:
                self._collect(i)
        self._send()
        self._end()
        self._settle(wait=True)
        for i, part in sorted(now.parts.items()):
            bucket = self._buckets[i]
            for axis in bucket.also:
                axis.record("all_reduce", part.numel() * part.element_size())
                dist.all_reduce(part, group=axis.group)
            bucket.shard.grad = part if bucket.shard.grad is None else bucket.shard.grad.add_(part)
        self.used |= now.arrived
        self._anchor.grad = None
        for kept in self._kept:
            kept.clear()
        self._pass = None

    @property
    def _now(self) -> _Pass:
        assert self._pass is not None
        return self._pass

    # -- reading -----------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._pass is not None and _reads(func):
            wanted = {i for x in _leaves((args, *kwargs.values())) if (i := self._index.get(id(x))) is not None}
            if wanted:
                self._need(wanted)
        return func(*args, **kwargs)

    def _need(self, wanted: set[int]) -> None:
        now = self._now
        missing = wanted.difference(self._full)
        for i in sorted(missing, key=now.order.index):
            self._fetch(i)
        now.read |= wanted
        if missing and not now.backward:
            # The module has moved on.
            for i in now.read.difference(wanted, self._asked).intersection(self._full):
                self._let_go(i)

    def _fetch(self, i: int) -> None:
        """Have bucket `i` whole."""
        now = self._now
        if i in self._full:
            return
        place = now.order.index(i)
        if place < now.begun and i not in now.coming:
            self._begin(len(now.order))
            while i not in self._full:
                self._ask(i)
            return
        # The next one may travel while this one is used.
        self._begin(place + 2)
        work, full = now.coming.pop(i)
        work.wait()
        self._receive(i, full)

    def _begin(self, count: int) -> None:
        """Begin to gather the first `count` buckets of this pass."""
        now = self._now
        for i in now.order[now.begun : count]:
            now.coming[i] = self._gather(i)
            now.begun += 1

    def _gather(self, i: int) -> tuple[Any, Tensor]:
        own = self._buckets[i].shard.detach()
        full = own.new_empty(self._buckets[i].length)
        self._axis.record("all_gather", own.numel() * own.element_size())
        work = dist.all_gather(list(full.chunk(self._axis.size)), own, group=self._axis.group, async_op=True)
        return work, full

    def _ask(self, wanted: int | None) -> int | None:
        """Gather a bucket that some rank asks for, and say which; None if none does. All ranks have begun all."""
        asked = torch.tensor(-1 if wanted is None else wanted, device=self._device)
        self._axis.record("all_reduce", asked.element_size())
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._axis.group)
        found = int(asked)
        if found < 0:
            return None
        work, full = self._gather(found)
        work.wait()
        if found == wanted:
            self._receive(found, full)
        if found not in self._asked:
            self._asked.append(found)
        return found

    def _receive(self, i: int, full: Tensor) -> None:
        self._full[i] = full
        self._at[full.untyped_storage().data_ptr()] = i
        for param, view in zip(self._params[i], self._buckets[i].views(full), strict=True):
            param.data = view

    def _let_go(self, i: int) -> None:
        for param, blank in zip(self._params[i], self._blank[i], strict=True):
            param.data = blank
        full = self._full.pop(i, None)
        if full is not None:
            del self._at[full.untyped_storage().data_ptr()]

    # -- backward ----------------------------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> Any:
        i = self._at.get(tensor.untyped_storage().data_ptr()) if self._at else None
        if i is None:
            return tensor
        stride = tuple(int(n) for n in tensor.stride())
        kept = _Kept(i, int(tensor.storage_offset()), tensor.shape, stride)
        self._kept[i].add(kept)
        return kept

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _Kept):
            self._fetch(packed.bucket)
            self._kept[packed.bucket].discard(packed)
            return self._full[packed.bucket].as_strided(packed.size, packed.stride, packed.offset)
        assert isinstance(packed, Tensor)
        return packed

    def _arrived(self, i: int, name: str, param: Tensor) -> None:
        """A gradient is there."""
        now = self._now
        if name in now.arrived:
            raise RunError(
                f"the gradient of {name} comes in two parts in one backward pass (activation checkpointing with "
                "use_reentrant=True does that), which zero 3 cannot see; use use_reentrant=False, or zero 2"
            )
        now.arrived.add(name)
        if not now.arrived.issuperset(self._buckets[i].names):
            return
        self._collect(i)
        self._send()
        self._settle(wait=False)
        if not self._kept[i] and i in self._full and i not in self._asked:
            self._let_go(i)

    def _collect(self, i: int) -> None:
        bucket = self._buckets[i]
        flat = bucket.shard.new_zeros(bucket.length)
        for view, param in zip(bucket.views(flat), self._params[i], strict=True):
            if param.grad is not None:
                view.copy_(param.grad)
            param.grad = None
        self._now.ready[i] = flat

    def _send(self) -> None:
        """Reduce the buckets whose turn it is, the last one first."""
        now = self._now
        while (i := len(self._buckets) - 1 - now.sent) in now.ready:
            flat = now.ready.pop(i)
            part = flat.new_empty(self._buckets[i].part)
            self._axis.record("reduce_scatter", flat.numel() * flat.element_size())
            parts = list(flat.chunk(self._axis.size))
            now.sending[i] = (dist.reduce_scatter(part, parts, group=self._reducing, async_op=True), part)
            now.sent += 1

    def _settle(self, *, wait: bool) -> None:
        """Keep the parts that are reduced, and nothing else of their buckets."""
        now = self._now
        for i, (work, part) in list(now.sending.items()):
            # A rank that waited here could be waited for elsewhere.
            if wait or work.is_completed():
                work.wait()
                now.parts[i] = part
                del now.sending[i]


def _reads(func: Any) -> bool:
    """Whether a function needs the values of a tensor: most attributes can be had, and set, without them."""
    name = getattr(func, "__name__", "")
    return name != "__set__" and (name != "__get__" or getattr(func.__self__, "__name__", "") in _READING)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _group_beside(mesh: Mesh, axis: Axis) -> dist.ProcessGroup | None:
    """One more group of the ranks along an axis. Every rank makes all groups."""
    groups = [open_group(column, axis.name, "beside")[0] for column in mesh.columns(axis)]
    return groups[[mesh.rank in column for column in mesh.columns(axis)].index(True)]
