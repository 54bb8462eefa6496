"""What the backward of one operator takes besides what it is given, observed by running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Backward(NamedTuple):
    """What one backward was seen to do.

    Attributes:
        fresh: places, among the tensors that gradients were asked for, of those whose gradient is a tensor of its own.
        room: bytes besides those gradients at its fullest moment, with one sample and with two.
    """

    fresh: tuple[int, ...]
    room: tuple[float, float]


def look_back(outs: Sequence[Tensor], wanted: Sequence[Tensor], size: Callable[[Tensor], tuple[int, int]]) -> Backward:
    """Run backward under fake tensors.

    Args:
        outs: what was computed, with a gradient each.
        wanted: what to take gradients of.
        size: bytes of a tensor with one sample and with two.
    """
    given = [torch.ones_like(out) for out in outs]
    known = {_key(t) for t in [*given, *outs, *wanted]}
    with _Watch(known, size) as watch:
        grads = torch.autograd.grad(outs, wanted, given, allow_unused=True)
    fresh = _fresh(grads, known)
    own = [size(_present(grads[i])) for i in fresh]
    return Backward(fresh, (watch.peak[0] - sum(s[0] for s in own), watch.peak[1] - sum(s[1] for s in own)))


def weigh_back(outs: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[tuple[int, ...], float]:
    """Run backward on the CPU: the places of fresh gradients, and the bytes that torch allocates besides them.

    Raises:
        RuntimeError: a profiler is running, of which there is one in a process.
    """
    if torch.autograd._profiler_enabled():
        raise RuntimeError("a profiler is running")
    given = [torch.ones_like(out) for out in outs]
    known = {_key(t) for t in [*given, *outs, *wanted]}
    # The profiler that reports by itself, and not to kineto, which writes to stderr.
    config = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
    torch.autograd._enable_profiler_legacy(config)
    try:
        # What forward kept is not freed meanwhile: the profiler did not see it allocated, and would take it for
        # something that it saw at that address before.
        grads = torch.autograd.grad(outs, wanted, given, allow_unused=True, retain_graph=True)
    finally:
        threads = torch.autograd._disable_profiler_legacy()
    fullest = 0
    for events in threads:
        now = 0
        for event in events:
            if str(event.kind()) == "memory_alloc":
                now += event.cpu_memory_usage()
                fullest = max(fullest, now)
    fresh = _fresh(grads, known)
    return fresh, fullest - sum(_present(grads[i]).untyped_storage().nbytes() for i in fresh)


def _fresh(grads: Sequence[Tensor | None], known: set[int]) -> tuple[int, ...]:
    seen = set(known)
    found = []
    for i, grad in enumerate(grads):
        if grad is not None and _key(grad) not in seen:
            seen.add(_key(grad))
            found.append(i)
    return tuple(found)


def _present(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Watch(TorchDispatchMode):
    """Adds up tensors from when an operator makes them until they are gone; `known` storages are not counted."""

    def __init__(self, known: set[int], size: Callable[[Tensor], tuple[int, int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known, self.size = set(known), size
        self.alive: dict[int, tuple[StorageWeakRef, tuple[int, int]]] = {}
        self.peak = (0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.alive = {key: each for key, each in self.alive.items() if not each[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _key(tensor) not in self.known:
                reference = StorageWeakRef(tensor.untyped_storage())
                self.alive.setdefault(_key(tensor), (reference, self.size(tensor)))
        now = tuple(sum(size[n] for _, size in self.alive.values()) for n in (0, 1))
        self.peak = max(self.peak, (now[0], now[1]), key=lambda each: each[1])
        return out
