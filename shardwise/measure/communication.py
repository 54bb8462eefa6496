"""The share of a step that is spent on communication and nothing else, seen by torch's profiler."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from torch.profiler import ProfilerActivity, profile

from shardwise.engine.base import Engine
from shardwise.engine.train import run_steps
from shardwise.job import Batch
from shardwise.machine.backend import Backend
from shardwise.machine.shared_memory import SPAN

Span = tuple[float, float]

_PAUSE = 200.0  # microseconds between two operators on a processor that are the interpreter's, not a wait


def communication_share(engine: Engine, data: Iterator[Batch], steps: int, backend: Backend) -> float:
    """The part of a step, 0 to 1, in which a collective of this rank is under way and no operator computes.

    It makes one update, and `steps` more under torch's profiler. Waiting for other ranks is included; what overlaps
    with computing is hidden and does not count. On an accelerator, kernels are looked at, otherwise operators.
    """
    if engine.plan.ranks == 1:
        return 0.0
    device = backend.device_type
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    run_steps(engine, data, 1, backend)  # ranks that come late are not waited for in what is looked at
    with profile(activities=kinds) as seen:
        seconds = sum(run_steps(engine, data, steps, backend).seconds)
    sending: list[Span] = []
    computing: list[Span] = []
    inside: list[Span] = []
    for event in seen.events() or []:
        if event.device_type.name.lower() != device:
            continue
        span = (event.time_range.start, event.time_range.end)
        if event.name == SPAN:
            inside.append(span)
        elif event.name.startswith(("gloo:", "nccl")):
            sending.append(span)
        elif device != "cpu" or event.name.startswith("aten::"):
            computing.append(span)
    sending, computing = sending + inside, outside(computing, inside)
    return min(1.0, exposed(sending, computing, _PAUSE if device == "cpu" else 0.0) * 1e-6 / seconds)


def exposed(sending: Iterable[Span], computing: Iterable[Span], pause: float = 0.0) -> float:
    """For how long there is a span of `sending` and none of `computing`, in their unit.

    Gaps in `computing` of up to `pause` belong to it.
    """
    computing = _joined(computing, pause)
    return _length([*sending, *computing]) - _length(computing)


def outside(spans: Iterable[Span], others: Iterable[Span]) -> list[Span]:
    """The spans that do not begin within one of others, such as the operators with which a collective is done."""
    joined = _joined(others, 0.0)
    starts = [start for start, _ in joined]
    found = []
    for span in spans:
        at = bisect_right(starts, span[0]) - 1
        if at < 0 or span[0] >= joined[at][1]:
            found.append(span)
    return found


def _joined(spans: Iterable[Span], pause: float) -> list[Span]:
    """The spans in order, those that touch or are at most `pause` apart as one."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start - joined[-1][1] <= pause:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in _joined(spans, 0.0))
