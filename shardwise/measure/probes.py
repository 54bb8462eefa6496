"""Probes: operators that are timed one by one, over sizes, on a rank. What their sizes are, the graph says."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from shardwise.cost.pairs import Array
from shardwise.cost.pricer import Pricer
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.machine.backend import Backend
from shardwise.machine.curve import Curve

_CACHE = 64_000_000
"""Bytes of inputs that are taken in turns, so that none is in a cache that it would not be in between two steps."""
_FEWEST, _MOST, _PASSES = 5, 2000, 3
"""Repetitions of one size in one pass, and passes over all of them."""
_LEAST = 2e-7
"""Seconds below which a time is noise."""
_NEVER = 1e-18
"""Seconds of an operation or a byte that count for nothing."""
_PRODUCT = "aten.linear"


class Run(nn.Module):
    """A function of tensors as a module, with the weights that it needs."""

    def __init__(self, function: Callable[..., Tensor], *weights: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape) * 0.02) for shape in weights)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, *self.weights)


@dataclass(frozen=True)
class Probe:
    """An operator that is timed.

    Attributes:
        op: its name in a graph.
        by: what its size is counted in, as in a `Curve`.
        make: what runs it.
        shapes: of one sample of each input.
        batches: numbers of samples.
        ids: where not 0, a last input of indices below it.
        id_shape: of one sample of them.
    """

    op: str
    by: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    batches: tuple[int, ...]
    ids: int = 0
    id_shape: tuple[int, ...] = ()

    def given(self, batch: int, device: torch.device | str = "cpu") -> list[Tensor]:
        """Inputs of so many samples."""
        found = [torch.randn(1, *shape, device=device).expand(batch, *shape).clone() for shape in self.shapes]
        return found + ([torch.randint(self.ids, (batch, *self.id_shape), device=device)] if self.ids else [])


class Recurrent(nn.Module):
    """An LSTM layer of width 512."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(512, 512, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        return y


def _attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


_same, _larger = partial(F.conv2d, padding=1), partial(F.conv_transpose2d, stride=2)


def _turned(x: Tensor) -> Tensor:
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format)


_ROW, _ROWS = (4096,), (1, 16, 128, 1024)
_PICTURE = (32, 32, 32)

PROBES: tuple[Probe, ...] = (
    # Sizes reach beyond 32 MB, where a CPU's allocator asks the system for every tensor anew.
    # Products: dense ones by operations, those that read more than they compute by bytes.
    Probe("aten.linear", "operations", lambda: Run(F.linear, (256, 256)), ((256,),), (8, 64, 512, 2048)),
    Probe("aten.linear", "operations", lambda: Run(F.linear, (1024, 1024)), ((1024,),), (32, 128, 1024)),
    Probe("aten.linear", "operations", lambda: Run(F.linear, (2048, 2048)), ((2048,),), (16,)),
    Probe("aten.linear", "bytes", lambda: Run(F.linear, (256, 256)), ((256,),), (1,)),
    Probe("aten.linear", "bytes", lambda: Run(F.linear, (2048, 2048)), ((2048,),), (1,)),
    Probe("aten.bmm", "operations", lambda: Run(torch.bmm), ((64, 64), (64, 64)), (1, 16, 256)),
    Probe("aten.bmm", "bytes", lambda: Run(torch.bmm), ((1, 256), (256, 256)), (1, 16, 128, 512)),
    Probe("aten.bmm", "column bytes", lambda: Run(torch.bmm), ((256, 256), (256, 1)), (1, 16, 128, 512)),
    Probe("aten.conv2d", "operations", lambda: Run(_same, (64, 64, 3, 3)), ((64, 16, 16),), (1, 4, 16)),
    Probe("aten.conv2d", "operations", lambda: Run(_same, (128, 128, 3, 3)), ((128, 16, 16),), (16,)),
    Probe("aten.conv2d", "bytes", lambda: Run(F.conv2d, (16, 16, 1, 1)), ((16, 32, 32),), (1, 8, 64)),
    Probe("aten.conv_transpose2d", "operations", lambda: Run(_larger, (64, 32, 2, 2)), ((64, 16, 16),), (1, 4, 16)),
    Probe("aten.lstm", "operations", Recurrent, ((32, 512),), (2, 8, 32)),
    Probe("aten.scaled_dot_product_attention", "operations", lambda: Run(_attention), ((4, 128, 64),), (1, 4, 16)),
    # Bound by memory.
    Probe("elementwise", "bytes", lambda: Run(torch.mul), (_ROW, _ROW), (*_ROWS, 4096)),
    Probe("aten.add", "bytes", lambda: Run(torch.add), (_ROW, _ROW), _ROWS),
    Probe("aten.gelu", "bytes", lambda: Run(F.gelu), (_ROW,), _ROWS),
    Probe("aten.silu", "bytes", lambda: Run(F.silu), (_ROW,), _ROWS),
    Probe("aten.relu", "bytes", lambda: Run(F.relu), (_ROW,), _ROWS),
    Probe("aten.tanh", "bytes", lambda: Run(torch.tanh), (_ROW,), _ROWS),
    Probe("aten.softmax", "bytes", lambda: Run(lambda x: x.softmax(-1)), ((64, 64),), _ROWS),
    Probe("aten.layer_norm", "bytes", lambda: nn.LayerNorm(512), ((8, 512),), _ROWS),
    Probe("aten.group_norm", "bytes", lambda: nn.GroupNorm(8, 32), (_PICTURE,), (1, 8, 32)),
    Probe("aten._native_batch_norm_legit_functional", "bytes", lambda: nn.BatchNorm2d(32), (_PICTURE,), (1, 8, 32)),
    Probe("aten.max_pool2d", "bytes", lambda: Run(lambda x: F.max_pool2d(x, 2)), (_PICTURE,), (1, 8, 32)),
    Probe("aten.cross_entropy_loss", "bytes", lambda: Run(F.cross_entropy), ((512,),), (8, 128, 2048), 512),
    Probe("aten.embedding", "bytes", lambda: Run(F.embedding, (1024, 256)), (), (16,), 1024, (64,)),
    Probe("aten.embedding", "bytes", lambda: Run(F.embedding, (32768, 256)), (), (16,), 32768, (64,)),
    Probe("aten.index", "bytes", lambda: Run(lambda i, w: w[i], (8, 16384)), (), (16, 256, 1024), 8),
    Probe("aten.cat", "bytes", lambda: Run(lambda x, y: torch.cat([x, y], 1)), (_ROW, _ROW), _ROWS),
    Probe("aten.clone", "bytes", lambda: Run(_turned), ((64, 64),), _ROWS),
)  # fmt: skip


# --- sizes ------------------------------------------------------------------------------------------------------------


class _All(nn.Module):
    """All probes side by side, so that one capture tells what each does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.probes = nn.ModuleList(probe.make() for probe in PROBES)

    def forward(self, **inputs: Tensor) -> Tensor:
        total = self.scale
        for i, (probe, module) in enumerate(zip(PROBES, self.probes, strict=True)):
            given = [inputs[f"x{i}_{k}"] for k in range(len(probe.given(1, "meta")))]
            out = module(*(x * self.scale if x.is_floating_point() else x for x in given))
            total = total + out.mean()
        return total


class _Samples(Dataset[Any]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {f"x{i}_{k}": x[0] for i, probe in enumerate(PROBES) for k, x in enumerate(probe.given(1))}


@cache
def sizes() -> list[list[tuple[float, float]]]:
    """For each probe and number of samples the operations and the bytes of its operator, as prices count them."""
    job = Job(model=_All, data=_Samples(), loss=lambda out, _: out, global_batch=2)
    work = Pricer(Graph.of(job)).work(())
    found: list[list[tuple[float, float]]] = []
    for i, probe in enumerate(PROBES):
        row = []
        for batch in probe.batches:
            tasks = [
                t
                for t in work.tasks(batch)
                if f"{t.op.module}.".startswith(f"probes.{i}.") and _is(t.op.name, probe.op)
            ]
            row.append((tasks[-1].flops, tasks[-1].moved))
        found.append(row)
    return found


def _is(name: str, op: str) -> bool:
    return name == ("aten.mul" if op == "elementwise" else op)


# --- times ------------------------------------------------------------------------------------------------------------


def timed(backend: Backend, seconds: float, together: Callable[[], None]) -> list[list[tuple[float, float]]]:
    """Seconds of forward and backward of each probe at each number of samples, on this rank.

    A step takes the sum of its operators' times, which is near the sum of their means, and above that of their medians:
    what holds an operator up now and then is part of it. What disturbs a whole pass is not (a median of means).

    Args:
        backend: what it runs on.
        seconds: that all of it may take, about.
        together: waits for the other ranks, so that all measure the same at once.
    """
    device = backend.device()
    runs = [[(probe, batch) for batch in probe.batches] for probe in PROBES]
    made = [probe.make().to(device) for probe in PROBES]
    each = seconds / sum(len(row) for row in runs) / _PASSES
    samples: dict[tuple[int, int], tuple[list[float], list[float]]] = {}
    nothing = _overhead(backend)
    for _ in range(_PASSES):  # what disturbs one pass leaves the others
        for i, row in enumerate(runs):
            for probe, batch in row:
                together()
                forward, backward = sampled(probe, batch, made[i], backend, each)
                kept = samples.setdefault((i, batch), ([], []))
                kept[0].append(statistics.fmean(forward))
                kept[1].append(statistics.fmean(backward))
    return [
        [
            (statistics.median(samples[i, batch][0]), max(statistics.median(samples[i, batch][1]) - nothing, _LEAST))
            for _, batch in row
        ]
        for i, row in enumerate(runs)
    ]


def sampled(
    probe: Probe, batch: int, module: nn.Module, backend: Backend, seconds: float
) -> tuple[list[float], list[float]]:
    """Seconds of single runs forward and backward, each on other inputs than the one before."""
    first = probe.given(batch, backend.device())
    size = sum(x.numel() * x.element_size() for x in first)
    sets = [first] + [[x.clone() for x in first] for _ in range(min(15, _CACHE // max(size, 1)))]
    for given in sets:
        for x in given:
            x.requires_grad_(x.is_floating_point())
    wanted = [[*(x for x in given if x.requires_grad), *module.parameters()] for given in sets]
    out = module(*first)
    grad = torch.ones_like(out)
    times: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    for k in range(_MOST + 2):
        given = sets[k % len(sets)]
        start = _now(backend)
        out = module(*given)
        middle = _now(backend)
        torch.autograd.grad(out, wanted[k % len(sets)], grad, allow_unused=True)
        end = _now(backend)
        if k >= 1:
            times[0].append(middle - start)
            times[1].append(end - middle)
        if end - began > seconds and (k >= _FEWEST or (k >= 1 and end - began > 5 * seconds)):
            break
    return times


def _overhead(backend: Backend) -> float:
    """Seconds that autograd takes to go backward through nothing."""
    x = torch.zeros(1, device=backend.device(), requires_grad=True)
    found = []
    for _ in range(200):
        out = x.view(1)
        start = _now(backend)
        torch.autograd.grad(out, x, x)
        found.append(_now(backend) - start)
    return statistics.median(found)


def _now(backend: Backend) -> float:
    backend.synchronize()
    return time.perf_counter()


def curves(times: Sequence[Sequence[tuple[float, float]]], source: str, *, adds: bool) -> tuple[Curve, ...]:
    """The curves of all probed operators; larger sizes never take less.

    Args:
        times: as `timed` gives them, of one rank or the mean of several.
        source: where they came from.
        adds: whether a product takes the time of its operations and that of its bytes, and not the longer one: a core
            that moves and packs matrices does not multiply meanwhile.
    """
    points: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for probe, at, row in zip(PROBES, sizes(), times, strict=True):
        points.setdefault((probe.op, probe.by), []).extend(
            (size[probe.by != "operations"], *both) for size, both in zip(at, row, strict=True)
        )
    found = _product_curves(times, source) if adds else []
    for curve in found:
        points.pop((curve.op, curve.by), None)
    for (op, by), rows in points.items():
        alike: dict[float, list[tuple[float, float, float]]] = {}
        for point in sorted(rows):
            alike.setdefault(point[0], []).append(point)
        forward, backward = (
            _growing([statistics.fmean(point[way] for point in those) for those in alike.values()]) for way in (1, 2)
        )
        found.append(Curve(op, by, tuple(alike), forward, backward, source))
    return tuple(found)


def _product_curves(times: Sequence[Sequence[tuple[float, float]]], source: str) -> list[Curve]:
    """What a linear layer takes for its operations and what for its bytes: proportions that fit all of them best."""
    rows = [
        (*size, *both)
        for probe, at, row in zip(PROBES, sizes(), times, strict=True)
        for size, both in zip(at, row, strict=True)
        if (probe.op, probe.by) == (_PRODUCT, "operations")
    ]
    operations, moved, *seconds = np.array(rows).T
    ways = [_proportions(operations / took, moved / took) for took in seconds]
    found = []
    for k, (by, most) in enumerate((("operations", operations.max()), ("product bytes", moved.max()))):
        at = (most * 1e-6, most)  # between them in proportion
        forward, backward = (tuple(size * each[k] for size in at) for each in ways)
        found.append(Curve(_PRODUCT, by, at, forward, backward, source))
    return found


def _proportions(*counts: Array) -> list[float]:
    """What each count takes, above 0, so that the sums come as near to 1 as they can."""
    each = np.linalg.lstsq(np.stack(counts, 1), np.ones(len(counts[0])), rcond=None)[0]
    if each.min() <= 0:  # what measures as a gain is noise
        alone = counts[int(each.argmax())]
        each = np.where(each == each.max(), alone.sum() / (alone**2).sum(), _NEVER)
    found: list[float] = each.tolist()
    return found


def _growing(values: Sequence[float]) -> tuple[float, ...]:
    """Values of which none is below one before it, each changed as little as possible: pairs are averaged."""
    groups: list[tuple[float, int]] = []
    for value in values:
        total, count = math.log(value), 1
        while groups and groups[-1][0] / groups[-1][1] > total / count:
            before, many = groups.pop()
            total, count = total + before, count + many
        groups.append((total, count))
    return tuple(math.exp(total / count) for total, count in groups for _ in range(count))


def median_of_means(values: Sequence[float], parts: int = _PASSES) -> float:
    """The mean of values, but for what disturbed one part of them (Nemirovsky and Yudin, 1983)."""
    parts = min(parts, len(values))
    cuts = [len(values) * k // parts for k in range(parts + 1)]
    return statistics.median(statistics.fmean(values[low:high]) for low, high in pairwise(cuts))


# --- rates ------------------------------------------------------------------------------------------------------------


def rates(backend: Backend, together: Callable[[], None]) -> Mapping[str, float]:
    """Bytes a second to memory as "bandwidth", and operations a second of large products by precision."""
    device = backend.device()
    a, b, c = (torch.ones(1 << 24, device=device) for _ in range(3))
    found = {"bandwidth": 12 * (1 << 24) / _median(backend, lambda: torch.add(a, b, out=c), together)}
    side = 768 if backend.device_type == "cpu" else 4096
    for name, dtype in (("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, y = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        found[name] = 2 * side**3 / _median(backend, partial(torch.mm, x, y), together)
    return found


def _median(backend: Backend, run: Callable[[], object], together: Callable[[], None]) -> float:
    times = []
    together()
    for k in range(_FEWEST + 10):
        start = _now(backend)
        run()
        if k >= 2:
            times.append(_now(backend) - start)
    return statistics.median(times)
