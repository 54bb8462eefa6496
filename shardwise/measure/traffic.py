"""The collectives that a rank performs, seen where torch passes them on: independent of what the program records."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.machine.shared_memory import OBSERVER
from shardwise.parallel.mesh import Recorder, Traffic

# Operator of torch's own library to the kind of the collective, and which argument has what this rank hands in.
_KINDS = {
    "allreduce_": ("all_reduce", 0),
    "allgather_": ("all_gather", 1),
    "_allgather_base_": ("all_gather", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
}
_KINDS_SEEN = frozenset(kind for kind, _ in _KINDS.values())


class Collectives(TorchDispatchMode):
    """While it is active, counts what this rank hands to collectives, by kind and mesh axis.

    A group's description is the name of the axis it serves; the group of all ranks is called "all".
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = Recorder()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            if name in _KINDS:
                kind, at = _KINDS[name]
                self._recorder.add(kind, _axis(args), sum(t.numel() * t.element_size() for t in _tensors(args[at])))
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Collectives:
        self._before = OBSERVER.set(self._see)
        return super().__enter__()  # type: ignore[no-any-return,no-untyped-call]

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)  # type: ignore[no-untyped-call]
        OBSERVER.reset(self._before)

    def _see(self, kind: str, group: dist.ProcessGroup, size: int) -> None:
        if kind in _KINDS_SEEN:
            self._recorder.add(kind, group.group_desc, size)

    def take(self) -> list[Traffic]:
        """What was counted so far; counting starts anew."""
        return self._recorder.take()


def _axis(args: Any) -> str:
    for value in args:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            name: str = dist.ProcessGroup.unbox(value).group_desc
            return "all" if name == "default_pg" else name
    return "all"


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)]
