"""Seconds a step, Shardwise against torch's own ways, in turns in one process group: `python -m benchmarks.runtime`."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.baselines import BASELINES, NoBaseline
from benchmarks.ways import NoPlan, plan_of
from benchmarks.workloads import WORKLOADS
from shardwise.engine.engine import parallelize
from shardwise.engine.launch import Ranks
from shardwise.errors import RunError
from shardwise.job import Job, map_batch
from shardwise.machine.backend import Backend, cores
from shardwise.plan.plan import Plan

STRATEGIES = ("one", "data", "sharded", "tensor", "pipeline")
GOALS = {"one": 1.02, "data": 1.00, "sharded": 1.00, "tensor": 0.85, "pipeline": 1.00}
UNLIKE = ("resnet", "mlp")
UNLIKE_GOAL = 0.90
"""The pipeline's goal where layers are unlike, so that equally many of them are not equal work."""

WARM_UP = 3
SECONDS = 30.0
"""How long one pair may take; rounds are left out, down to `FEWEST`, to keep to it."""
FEWEST = 7
CHECKED, STEPS, TOLERANCE = 8, 3, 1e-9
"""Samples and steps of the check that both sides compute the same, and how far their losses may differ, relatively."""


@dataclass(frozen=True)
class Row:
    """One comparison. Seconds are medians over rounds; `low` and `high` are quartiles of the rounds' own ratios.

    `ours_cpu_s` and `baseline_cpu_s` are processor seconds of all ranks together, which other programs on the machine
    disturb less.
    """

    workload: str
    strategy: str
    ours_s: float
    baseline: str
    baseline_s: float
    ratio: float
    low: float
    high: float
    goal: float
    ours_cpu_s: float
    baseline_cpu_s: float
    rounds: int
    loss_error: float
    machine: str

    def line(self) -> str:
        """The row as the table prints it."""
        met = "" if self.ratio <= self.goal else "  misses"
        return (
            f"{self.workload:12} {self.strategy:9} {self.ours_s * 1e3:9.1f} {self.baseline_s * 1e3:9.1f}  "
            f"{self.ratio:6.3f}  {self.low:.3f}-{self.high:.3f}  {self.goal:5.2f}{met:8}  "
            f"{self.ours_cpu_s / self.baseline_cpu_s:6.3f}  {self.rounds:3d}  {self.baseline}"
        )


HEAD = (
    f"{'workload':12} {'strategy':9} {'ours ms':>9} {'torch ms':>9}  {'ratio':>6}  {'quartiles':11}  {'goal':>5}"
    f"{'':8}  {'cpu':>6}  {'n':>3}  baseline"
)


def goal_of(workload: str, strategy: str) -> float:
    """The ratio that is to be reached."""
    return UNLIKE_GOAL if strategy == "pipeline" and workload in UNLIKE else GOALS[strategy]


# --- on the ranks -----------------------------------------------------------------------------------------------------


def compare(workload: str, strategy: str, rounds: int) -> dict[str, Any]:
    """Time both sides in turns on this rank.

    Returns:
        `baseline`, `loss_error`, and for each side a list of wall seconds and of processor seconds of all ranks.

    Raises:
        NoBaseline: torch has no such way.
        RunError: the two sides do not compute the same losses.
    """
    job = WORKLOADS[workload]()
    plan = plan_of(strategy, job)
    error = _check(job, workload, strategy, plan)
    baseline = BASELINES[strategy](job, workload)
    ours = parallelize(job, plan)
    size = job.global_batch
    batches = [job.batch(range(i * size, (i + 1) * size)) for i in range(4)]
    slowest = 0.0
    for i in range(WARM_UP):
        began = time.perf_counter()
        ours.step(batches[i])
        baseline.step(batches[i])
        slowest = time.perf_counter() - began
    count = torch.tensor(min(rounds, max(FEWEST, int(SECONDS / slowest))))
    dist.broadcast(count, 0)
    wall: tuple[list[float], list[float]] = ([], [])
    cpu: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.disable()
    try:
        for i in range(int(count)):
            for side, step in enumerate((ours.step, baseline.step)):
                seconds, worked = _timed(step, batches[i % len(batches)])
                wall[side].append(seconds)
                cpu[side].append(worked)
    finally:
        gc.enable()
    return {"baseline": baseline.name, "loss_error": error, "wall": wall, "cpu": cpu}


def _check(job: Job, workload: str, strategy: str, plan: Plan) -> float:
    """The largest relative difference between both sides' losses, in steps in float64, where no rounding shows."""
    double = job.with_(model=lambda: job.model().double(), global_batch=CHECKED)
    baseline = BASELINES[strategy](double, workload)
    ours = parallelize(double, plan, dtype=torch.float64)
    errors: list[float] = []
    for i in range(STEPS):
        batch = map_batch(
            job.batch(range(i * CHECKED, (i + 1) * CHECKED)), lambda t: t.double() if t.is_floating_point() else t
        )
        mine, theirs = ours.step(batch), baseline.step(batch)
        errors.append(abs(mine - theirs) / abs(theirs))
    if not max(errors) <= TOLERANCE:
        steps = ", ".join(f"{e:.1e}" for e in errors)
        raise RunError(f"{workload} {strategy}: the losses of ours and the baseline's steps differ by {steps}")
    return max(errors)


def _timed(step: Callable[[Any], float], batch: Any) -> tuple[float, float]:
    """Wall seconds until the last rank is done, and processor seconds of all ranks."""
    dist.barrier()
    worked = time.process_time()
    began = time.perf_counter()
    step(batch)
    dist.barrier()
    seconds = time.perf_counter() - began
    total = torch.tensor(time.process_time() - worked, dtype=torch.float64)
    dist.all_reduce(total)
    return seconds, float(total)


# --- on the command line ----------------------------------------------------------------------------------------------


def _row(workload: str, strategy: str, found: dict[str, Any], machine: str) -> Row:
    ours, theirs = found["wall"]
    low, _, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    ours_s, baseline_s = statistics.median(ours), statistics.median(theirs)
    return Row(
        workload, strategy, ours_s, found["baseline"], baseline_s, ours_s / baseline_s, low, high,
        goal_of(workload, strategy), statistics.median(found["cpu"][0]), statistics.median(found["cpu"][1]), len(ours),
        found["loss_error"], machine,
    )  # fmt: skip


def _machine() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return f"{model[1] if model else platform.machine()}, {cores()} cores, torch {torch.__version__}"


def _wanted(only: list[str]) -> list[tuple[str, str]]:
    pairs = [(w, s) for w in WORKLOADS for s in STRATEGIES]
    if not only:
        return pairs
    words = [set(entry.split(",")) for entry in only]
    strange = set().union(*words) - set(WORKLOADS) - set(STRATEGIES)
    if strange:
        known = ", ".join([*WORKLOADS, *STRATEGIES])
        raise SystemExit(f"--only has {', '.join(sorted(strange))}; it may have {known}")
    return [(w, s) for w, s in pairs if any(names <= {w, s} for names in words)]


def _merged(path: Path, rows: list[Row]) -> list[dict[str, Any]]:
    """The rows of a file, those measured now replaced."""
    before = json.loads(path.read_text()) if path.exists() else []
    fresh = {(r.workload, r.strategy): asdict(r) for r in rows}
    kept = {(r["workload"], r["strategy"]): r for r in before}
    every = {**kept, **fresh}
    return [every[key] for key in _wanted([]) if key in every]


def main() -> None:
    """Measure the pairs that are asked for, print a line for each, and write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime", description=__doc__)
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORKLOAD,STRATEGY", help="one pair, or all of one name"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/runtime.json"))
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    machine = _machine()
    rows: list[Row] = []
    began = time.monotonic()
    print(f"{machine}; seconds of a step, one thread a rank\n\n{HEAD}", flush=True)
    pools = {n: Ranks(n, backend=Backend.cpu(), threads=1) for n in (1, 2)}
    try:
        for workload, strategy in _wanted(options.only):
            pool = pools[1 if strategy == "one" else 2]
            found = pool.run(_compare, workload, strategy, options.rounds, timeout=600)[0]
            if isinstance(found, str):
                print(f"{workload:12} {strategy:9} not compared: {found}", flush=True)
                continue
            rows.append(_row(workload, strategy, found, machine))
            print(rows[-1].line(), flush=True)
    finally:
        for pool in pools.values():
            pool.close()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(_merged(options.out, rows), indent=2) + "\n")
    missed = [f"{r.workload} {r.strategy}" for r in rows if r.ratio > r.goal]
    print(f"\n{len(rows) - len(missed)} of {len(rows)} goals met in {time.monotonic() - began:.0f} s; {options.out}")


def _compare(workload: str, strategy: str, rounds: int) -> dict[str, Any] | str:
    try:
        return compare(workload, strategy, rounds)
    except (NoBaseline, NoPlan) as reason:
        return str(reason)


if __name__ == "__main__":
    main()
