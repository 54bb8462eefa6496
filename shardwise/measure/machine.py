"""The machine at hand, measured: what its operators and collectives take, as a cluster that a file holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.engine.launch import Ranks, joined
from shardwise.errors import MachineError
from shardwise.job import Job
from shardwise.machine.backend import Backend, cores
from shardwise.machine.cluster import Cluster, Node
from shardwise.machine.curve import COLLECTIVES, Collective
from shardwise.machine.device import Device, Link, network
from shardwise.machine.here import accelerator, processor
from shardwise.machine.quantity import Quantity
from shardwise.machine.shared_memory import shares_memory
from shardwise.measure.probes import curves, median_of_means, rates, timed
from shardwise.parallel.mesh import open_group

SECONDS = 65.0
"""That measuring may take, about, besides the start of ranks."""
_SMALL, _LARGE = 1 << 10, 25 << 20
"""Bytes of the tensors whose collectives are timed: for the latency, and, a bucket of gradients, for the bandwidth."""
_REPEATED = 20
_LAYERS, _ROUNDS = 32, 40
"""Of the layers whose backward comes in one piece and in two, in turns; and the number of turns."""
_SIDE = {"cpu": 768, "cuda": 4096}
"""Of the matrices whose product ranks compute before each collective, several milliseconds."""


def discover(seconds: float = SECONDS, tell: Callable[[str], None] = lambda _: None) -> Cluster:
    """Measure the machine at hand: one node, one rank for each accelerator, or core.

    Args:
        seconds: how long it may take, about.
        tell: is told what is measured now.

    Returns:
        A cluster whose devices are, one a node, this machine with 1, 2, 4 ... ranks; what `machine_file` writes.

    Raises:
        MachineError: torch was built without gloo.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        raise MachineError("this torch has no gloo, over which ranks are measured; install a torch that has it")
    backend = Backend.detect()
    most = torch.cuda.device_count() if backend.device_type == "cuda" else cores()
    counts = sorted({1, 2, 4, most} if backend.device_type == "cpu" else {n for n in (1, 2, 4, most) if n <= most})
    computing = [n for n in counts if n <= most]
    found: dict[int, Device] = {}
    for n in counts:
        many = f"{n} rank{'s' * (n > 1)}"
        share = seconds / len(computing) * (0.75 if n in computing else 0.25)
        tell(f"{many}: operators and collectives" if n in computing else f"{many}: collectives")
        with Ranks(n, backend=backend) as pool:
            told = pool.run(_measured, n in computing, share, timeout=10 * share + 120)
        found[n] = _device(n, backend, told, found.get(most if n > most else 0))
    return Cluster("this machine", tuple(Node(n, device, network(device.network)) for n, device in found.items()))


# --- on a rank --------------------------------------------------------------------------------------------------------


def _measured(computing: bool, seconds: float) -> dict[str, Any]:
    """What this rank measures while the others measure the same."""
    with joined() as place:
        found: dict[str, Any] = {"memory": place.backend.total_memory(), "threads": torch.get_num_threads()}

        def together() -> None:
            if place.world > 1:
                dist.barrier()

        if computing:
            found["rates"] = rates(place.backend, together)
            found["times"] = timed(place.backend, seconds * 0.7, together)
            found["step"] = _step(place.world)
            found["halved"] = _halved()
        repeated = max(4, min(_REPEATED, int(4 * seconds)))
        sizes = [n for n in (2, 4, place.world) if place.world > 1 and place.world % n == 0]
        found["collectives"] = {n: collectives(n, place.backend, repeated) for n in dict.fromkeys(sizes)}
        shared = place.world > 1 and shares_memory(open_group(range(place.world), "measured")[0])
        found["link"] = "shared memory" if shared else "gloo" if place.backend.device_type == "cpu" else "NCCL"
        return found


def collectives(group_size: int, backend: Backend, repeated: int = _REPEATED) -> dict[str, tuple[float, float]]:
    """Seconds of an empty collective and of each byte, by kind, over groups of so many neighbouring ranks.

    All groups measure at once. The size is that of the whole tensor; of what a rank sends for "send" and "all_to_all".
    Ranks compute before each, as they do in a step: they come to it at different times, from busy processors, and what
    they wait for each other is part of what it takes.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    # Every rank makes every group.
    starts = range(0, world, group_size)
    groups = [open_group(range(start, start + group_size), "measured")[0] for start in starts]
    group = groups[rank // group_size]
    first = rank // group_size * group_size
    runs = {size: _runs(size, group, group_size, first, backend.device()) for size in (_SMALL, _LARGE)}
    samples: dict[tuple[str, int], list[float]] = {}
    matrix = torch.randn(_SIDE[backend.device_type], _SIDE[backend.device_type], device=backend.device())
    for k in range(repeated):  # in turns, so that what disturbs one disturbs all
        for size, kinds in runs.items():
            for kind, run in kinds.items():
                dist.barrier(group)
                torch.mm(matrix, matrix)
                backend.synchronize()
                start = time.perf_counter()
                run()
                backend.synchronize()
                if k >= 2:
                    ways = 2 if kind == "send" else 1
                    samples.setdefault((kind, size), []).append((time.perf_counter() - start) / ways)
    found = {}
    for kind in COLLECTIVES:
        seconds = {size: _mean(median_of_means(samples[kind, size]), group, backend) for size in runs}
        fixed = seconds[_SMALL]
        each = (seconds[_LARGE] - fixed) / _LARGE
        found[kind] = fixed, max(each, 1e-15)
    return found


def _runs(size: int, group: Any, ranks: int, first: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """What runs each kind once on a tensor of so many bytes."""
    whole = torch.ones(size // 4, device=device)
    parts = list(torch.ones_like(whole).chunk(ranks))
    mine = parts[0].clone()
    other = torch.empty_like(whole)

    def send() -> None:
        # There and back between the first two of the group, for only who waits knows how long a message takes.
        at = dist.get_rank() - first
        if at == 0:
            dist.send(whole, first + 1, group)
            dist.recv(other, first + 1, group)
        elif at == 1:
            dist.recv(other, first, group)
            dist.send(whole, first, group)

    return {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: dist.all_gather(parts, mine, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter(mine, list(whole.chunk(ranks)), group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "broadcast": lambda: dist.broadcast(whole, first, group=group),
        "send": send,
    }


def _mean(seconds: float, group: Any, backend: Backend) -> float:
    found = torch.tensor(seconds, dtype=torch.float64, device=backend.device())
    dist.all_reduce(found, group=group)
    return float(found) / dist.get_world_size(group)


class _Nothing(torch.nn.Module):
    """Two layers that compute next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def _step(ranks: int) -> float:
    """Seconds of a step of next to nothing, split by samples: what a step takes besides its operators."""
    from shardwise.engine.engine import parallelize
    from shardwise.engine.train import data_plan

    samples = 2 * ranks
    data: Any = [(torch.zeros(1), torch.zeros(1))] * samples
    job = Job(model=_Nothing, data=data, loss=lambda out, batch: (out - batch[1]).square().mean(), global_batch=samples)
    engine = parallelize(job, data_plan(ranks, job))
    batch, times = job.batch(range(samples)), []
    for _ in range(60):
        start = time.perf_counter()
        engine.step(batch)
        times.append(time.perf_counter() - start)
    return median_of_means(times[10:])


def _halved() -> float:
    """Seconds that an operator with parameters takes besides where backward comes in two halves."""
    from shardwise.parallel.defer import Recorder, deferred

    layers, linear = [torch.nn.Linear(8, 8) for _ in range(_LAYERS)], torch.nn.functional.linear
    times: dict[bool, list[float]] = {False: [], True: []}
    for k in range(2 * _ROUNDS):
        halves, recorder = k % 2 == 1, Recorder(targets=[(linear, False)])
        x = y = torch.zeros(8, 8, requires_grad=True)
        start = time.perf_counter()
        tape = recorder.start()
        for layer in layers:
            given = y, layer.weight, layer.bias
            y = deferred(recorder, 0, (1, 2), *given) if halves else linear(*given)
        y.backward(torch.ones_like(y))
        tape.play((), ())
        times[halves].append((time.perf_counter() - start) / _LAYERS)
        del x, y
    return max(statistics.median(times[True]) - statistics.median(times[False]), 1e-9)


# --- as a device ------------------------------------------------------------------------------------------------------


def _device(ranks: int, backend: Backend, told: Sequence[dict[str, Any]], most: Device | None) -> Device:
    """What the ranks measured as the device of each."""
    source = f"measured here, {ranks} rank{'s' * (ranks > 1)} of {told[0]['threads']} threads"

    def measured(value: float, source: str = source) -> Quantity:
        return Quantity(float(value), source)

    rows = [
        Collective(kind, n, measured(statistics.mean(f[kind][0] for f in those)),
                   measured(1 / statistics.mean(f[kind][1] for f in those)))
        for n in told[0]["collectives"] for those in [[t["collectives"][n] for t in told]] for kind in COLLECTIVES
    ]  # fmt: skip
    link = _link(rows, measured, told[0]["link"])
    if most is not None:
        slower = ranks / int(most.name.removeprefix("ranks-"))
        more = f"{most.bandwidth.source}, shared by {ranks}"
        return replace(
            most, name=f"ranks-{ranks}", link=link, node=measured(ranks, "as asked for"),
            memory=measured(told[0]["memory"] / ranks, "the machine's, shared by its ranks"),
            bandwidth=measured(most.bandwidth.value / slower, more),
            flops={p: measured(r.value / slower, more) for p, r in most.flops.items()},
            operators=tuple(curve.times(slower) for curve in most.operators),
            step=None if most.step is None else measured(most.step.value * slower, more),
            halved=None if most.halved is None else measured(most.halved.value * slower, more),
            crowd=measured(slower, more),
        )  # fmt: skip

    def mean(key: str) -> float:
        return statistics.mean(float(t["rates"][key]) for t in told)

    times = [
        [tuple(statistics.mean(t["times"][i][j][way] for t in told) for way in (0, 1)) for j in range(len(row))]
        for i, row in enumerate(told[0]["times"])
    ]
    cpu = backend.device_type == "cpu"
    operators = curves(times, source, adds=cpu)
    base = None if cpu else accelerator(torch.cuda.get_device_name(0))
    share = Quantity(1.0, "the measured numbers are those reached")
    return Device(
        name=f"ranks-{ranks}",
        title=f"{processor()}, {told[0]['threads']} threads" if cpu else torch.cuda.get_device_name(0),
        kind=backend.device_type,
        units=measured(told[0]["threads"], "threads of a rank") if base is None else base.units,
        memory=measured(told[0]["memory"] / (ranks if cpu else 1), "the machine's, shared by its ranks"),
        bandwidth=measured(mean("bandwidth")),
        flops={name: measured(mean(name)) for name in ("fp64", "fp32", "bf16")},
        matmul=share,
        attention=share,
        reached=share,
        call=measured(min(c.forward[0] for c in operators)),
        link=link,
        node=measured(ranks, "as asked for"),
        network="ethernet-1" if base is None else base.network,
        operators=operators,
        step=measured(statistics.mean(t["step"] for t in told)),
        halved=measured(statistics.mean(t["halved"] for t in told)),
    )


def _link(rows: Sequence[Collective], measured: Callable[..., Quantity], title: str) -> Link:
    """A link with these collectives; with one rank, which sends nothing, a nominal one."""
    if not rows:
        none = "nominal: one rank sends nothing"
        return Link(title, Quantity(1e9, none), Quantity(1e-4, none), Quantity(1e-5, none), Quantity(1.0, none))
    by_kind = {row.kind: row for row in rows}  # of the largest group
    gather, reduce = by_kind["all_gather"], by_kind["all_reduce"]
    ring = (gather.ranks - 1) / gather.ranks
    return Link(
        title,
        measured(ring * gather.bandwidth.value),
        measured(gather.latency.value / 2),
        measured(gather.latency.value / 2 / max(gather.ranks - 1, 1)),
        measured(gather.bandwidth.value / reduce.bandwidth.value),
        collectives=tuple(rows),
    )
