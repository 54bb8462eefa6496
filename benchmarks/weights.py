"""Loading: each rank's slices read from a file, against the whole file loaded on each rank and cut there.

    python -m benchmarks.weights [seconds] [memory]

Two ranks, a stack of MLP blocks in one safetensors file that is in the page cache. Three ways, in turn, seconds until
the slowest rank has its parameters (capture, the same for all, is left out):

- sliced: the module with its parameters on `meta`, and the slices read into place;
- whole: the module with its parameters on `meta`, all of the file read, then cut;
- usual: the module with drawn weights, `safetensors.torch.load_file`, `load_state_dict`, then cut.

Prints the median of each and the ratios. Then the peak of each rank's memory, above what it had before, while it loads
and evaluates one batch, against one rank that has all.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise.engine.engine import parallelize
from shardwise.engine.launch import Ranks, joined
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.parallel.hybrid import Split
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.rank import RankModel
from shardwise.plan.plan import Plan, PlanAxis
from shardwise.weights.save import save_weights

WAYS = ("sliced", "whole", "usual")
ROUNDS = 3


class Block(nn.Module):
    """LayerNorm and an MLP, added to what comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


def stack(width: int, blocks: int, weights: Path | None = None) -> Job:
    """Blocks one after the other; 2048 and 8 are 1 GiB."""
    rows = TensorDataset(torch.randn(8, width, generator=torch.Generator().manual_seed(0)))
    return Job(
        model=lambda: nn.Sequential(*(Block(width) for _ in range(blocks))),
        data=rows,
        loss=lambda output, batch: output.pow(2).mean(),
        optimizer=lambda params: torch.optim.SGD(params, lr=1e-3),
        global_batch=4,
        weights=weights,
    )


def plans(job: Job, blocks: int) -> dict[str, Plan]:
    """Over two ranks by tensor, by pipeline and by ZeRO-3."""
    middle = next(op.id for op in Graph.of(job).ops if op.module.startswith(f"{blocks // 2}"))
    return {
        "tensor": Plan(axes=(PlanAxis("tensor", 2, ("width@*",)),)),
        "pipeline": Plan(axes=(PlanAxis("pipeline", 2),), cuts=(middle,)),
        "zero3": Plan(axes=(PlanAxis("data", 2, ("batch",)),), zero=3),
    }


def load_seconds(job: Job, plan: Plan, rounds: int = ROUNDS, ways: tuple[str, ...] = WAYS) -> dict[str, list[float]]:
    """On every rank of the plan, for each way the seconds of the slowest rank."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    with joined() as place:
        split = Split(Graph.of(job), plan, Mesh.build(plan.axes))
        for _ in range(rounds + 1):
            for way in ways:
                model = RankModel(split, place.device)
                gc.collect()
                dist.barrier()
                began = time.perf_counter()
                _load(job, model, way)
                took = torch.tensor(time.perf_counter() - began)
                dist.all_reduce(took, op=dist.ReduceOp.MAX)
                found[way].append(float(took))
                del model
    return {way: seconds[1:] for way, seconds in found.items()}


def _load(job: Job, model: RankModel, way: str) -> None:
    if way == "sliced":
        module, weights = job.bare()
        model.load(module, weights=weights)
    elif way == "whole":
        model.load(job.build(), frees=True)
    else:
        from safetensors.torch import load_file

        assert job.weights is not None
        module = job.with_(weights=None).build()
        module.load_state_dict(load_file(job.weights))
        model.load(module, frees=True)


def peak(job: Job, plan: Plan, small: Job) -> tuple[int, int]:
    """Bytes at the peak above what the rank had before: until it has loaded, and until it has evaluated a batch."""
    with joined() as place:
        # What the first job of a process loads and caches is not this one's.
        parallelize(small, Plan(axes=tuple(PlanAxis("data", plan.ranks, ("batch",)) for _ in plan.axes[:1])))
        place.backend.reset_peak_memory()
        before = place.backend.peak_memory()
        engine = parallelize(job, plan)
        loaded = place.backend.peak_memory()
        engine.evaluate([job.batch(range(4))])
        return loaded - before, place.backend.peak_memory() - before


def main(wanted: list[str], width: int = 2048, blocks: int = 8) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        job = stack(width, blocks, file)
        save_weights(job.with_(weights=None).build().state_dict(), file)
        print(f"{file.stat().st_size / 2**20:.0f} MiB in one file, 2 ranks, 1 thread each", flush=True)
        chosen = plans(job, blocks)
        if "seconds" in wanted:
            _print_seconds(job, {name: chosen[name] for name in ("tensor", "pipeline")})
        if "memory" in wanted:
            _print_peaks(job, chosen, stack(8, 2))


def _print_seconds(job: Job, chosen: dict[str, Plan]) -> None:
    with Ranks(2, threads=1) as ranks:
        for name, plan in chosen.items():
            seconds = ranks.run(load_seconds, job, plan)[0]
            sliced, whole, usual = (statistics.median(seconds[way]) for way in WAYS)
            print(
                f"{name:9} sliced {sliced:.3f} s, whole {whole:.3f} s, usual {usual:.3f} s: "
                f"{sliced / whole:.2f} of whole, {sliced / usual:.2f} of usual",
                flush=True,
            )


def _print_peaks(job: Job, chosen: dict[str, Plan], small: Job) -> None:
    one = [0.0, 0.0]
    for name, plan in {"one rank": Plan(), **chosen}.items():
        with Ranks(plan.ranks, threads=1) as ranks:
            found = [max(each) / 2**20 for each in zip(*ranks.run(peak, job, plan, small), strict=True)]
        one = found if name == "one rank" else one
        told = (f"{most:.0f} MiB ({most / least:.2f} of one rank)" for most, least in zip(found, one, strict=True))
        print(f"{name:9} at the peak: loading {', evaluating too '.join(told)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["seconds", "memory"])
