"""How much slower the planner's pick is than the fastest plan there is, all measured: `python -m benchmarks.regret`.

On 1, 2 and 4 ranks of this machine, and on 2 ranks that a slow link joins. The machine is measured first, unless
`shardwise machine` did it before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import netns
from benchmarks.regret_jobs import JOBS
from benchmarks.regret_rank import measure, watched
from benchmarks.runtime import _machine
from shardwise.engine.launch import Ranks
from shardwise.machine.backend import Backend
from shardwise.machine.cluster import Cluster, Node
from shardwise.machine.curve import Collective
from shardwise.machine.device import Device, Link
from shardwise.machine.here import here, machine_file, measured_file
from shardwise.machine.quantity import Quantity
from shardwise.measure.machine import discover
from shardwise.measure.probes import PROBES, sizes
from shardwise.report.planned import title
from shardwise.search.choose import planner_of
from shardwise.search.planner import Planner, Priced
from shardwise.search.space import Options
from shardwise.search.strategies import Maker, maker_of

RESULTS = Path(__file__).parent / "results" / "regret.json"
RANKS = {"local": (1, 2, 4), "1gbit": (2,), "100mbit": (2,)}
MOST = {"local": 8, "1gbit": 5, "100mbit": 4}
"""Plans of one row that are measured."""
SECONDS = {"local": 20.0, "1gbit": 12.0, "100mbit": 12.0}
"""After which no more rounds over a row's plans begin."""
ROOM = 5e9
"""Bytes that plans held at once may take on all ranks together."""
GOALS = {"regret": (0.03, 0.10), "step error": (0.10, None), "memory error": (0.05, None)}


@dataclass(frozen=True)
class Row:
    """One workload on so many ranks over one link.

    Attributes:
        plans: every plan measured: its text, its figures.
        drift: how many times as long as when the machine was measured its operators took meanwhile.
    """

    workload: str
    link: str
    ranks: int
    picked: str
    best: str
    picked_s: float
    best_s: float
    regret: float
    predicted_s: float
    drift: float
    picked_bytes: float
    predicted_bytes: float
    space: int
    left_out: dict[str, int]
    plans: list[dict[str, Any]]
    machine: str

    @property
    def error(self) -> float:
        """By what part the predicted step of the pick is off."""
        return self.predicted_s / self.picked_s - 1

    @property
    def rest(self) -> float:
        """By what part it is off at the speed that the machine had meanwhile."""
        return self.predicted_s * self.drift / self.picked_s - 1

    @property
    def memory(self) -> float:
        """By what part its memory is off."""
        return self.predicted_bytes / self.picked_bytes - 1

    def line(self) -> str:
        """The row as the table prints it."""
        return (
            f"{self.workload:10} {self.link:8} {self.ranks:2d}  {self.picked_s * 1e3:8.1f} {self.best_s * 1e3:8.1f} "
            f"{self.regret:7.1%}  {self.predicted_s * 1e3:8.1f} {self.error:+7.1%} {self.drift:6.2f} "
            f"{self.rest:+7.1%}  {self.memory:+7.1%}  {len(self.plans):3d} of {self.space:3d}  {self.picked}"
            + (f"; best {self.best}" if self.best != self.picked else "")
        )


HEAD = (
    f"{'workload':10} {'link':8} {'n':>2}  {'pick ms':>8} {'best ms':>8} {'regret':>7}  {'foretold':>8} {'error':>7} "
    f"{'drift':>6} {'rest':>7}  "
    f"{'memory':>7}  {'plans':10}  pick"
)


def chosen(planner: Planner, most: int) -> tuple[Priced, list[Priced], int, dict[str, int]]:
    """The pick, the plans to measure with the pick first, the size of the space, and what is left out by reason."""
    best = planner.search().best
    assert best is not None
    every: list[Priced] = []
    count = 0
    left = {"cannot be made": 0, "more micro-batches of the same split": 0, "priced slowest": 0}
    for shape in planner.space.shapes():
        count += 1
        priced = planner.price(shape)
        if priced is None or not planner.runs(priced.plan):
            left["cannot be made"] += 1
        else:
            every.append(priced)
    every.sort(key=lambda p: p.estimate.step)
    # Of plans that differ in the number of micro-batches alone the two are kept that are priced fastest.
    seen: dict[object, int] = {}
    kept: list[Priced] = []
    for priced in every:
        plan = priced.plan
        key = plan.axes, plan.schedule, plan.stages, plan.zero, plan.recompute
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= 2 or priced.plan == best.plan:
            kept.append(priced)
        else:
            left["more micro-batches of the same split"] += 1
    # Of each mesh with its dims the fastest, whatever its price, then the fastest of all.
    first: dict[object, Priced] = {}
    for priced in kept:
        first.setdefault(priced.plan.axes, priced)
    wanted = [best, *(p for p in first.values() if p.plan != best.plan)][:most]
    wanted += [p for p in kept if all(p.plan != w.plan for w in wanted)][: most - len(wanted)]
    left["priced slowest"] = len(kept) - len(wanted)
    return best, wanted, count, left


class Bench:
    """Measures rows.

    Args:
        pools: ranks of this machine by their number.
    """

    def __init__(self) -> None:
        self.pools: dict[int, Ranks] = {}
        self.makers: dict[tuple[str, str, int], Maker] = {}
        self.machine = _machine()

    def row(self, workload: str, link: str, ranks: int, cluster: Cluster, names: tuple[str, str] | None) -> Row:
        """Measure the plans of a workload."""
        job = JOBS[workload]()
        maker = maker_of(job, cluster=cluster)
        assert isinstance(maker, Maker)
        pick, wanted, space, left = chosen(planner_of(maker, cluster, ranks, Options()), MOST[link])
        size = max(p.estimate.peak for p in wanted) * ranks
        together = max(2, min(len(wanted), int(ROOM / size)))
        plans = [p.plan.text() for p in wanted]
        weighed = plans[: 1 if names else 3]
        task = {
            "what": "plans", "name": workload, "plans": plans, "weighed": weighed, "together": together,
            "seconds": SECONDS[link],
        }  # fmt: skip
        if names is not None:
            found = netns.run(names, "benchmarks.regret_rank", task, ranks, 600)
        else:
            pool = self._pool(ranks)
            found = pool.run(measure, workload, plans, weighed, together, SECONDS[link], timeout=600)[0]
        entries: list[dict[str, Any]] = []
        for k, (priced, times) in enumerate(zip(wanted, found["seconds"], strict=True)):
            low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
            entry = {
                "plan": title(priced), "measured_s": statistics.median(times), "low_s": low, "high_s": high,
                "steps": len(times), "predicted_s": priced.estimate.step, "terms": dict(priced.estimate.seconds),
                "predicted_bytes": priced.estimate.peak, "text": priced.plan.text(),
            }  # fmt: skip
            if k < len(weighed):
                entry["measured_bytes"] = max(found["bytes"][k])
            entries.append(entry)
        fastest = min(entries, key=lambda e: e["measured_s"])
        mine = entries[0]
        regret = mine["measured_s"] / fastest["measured_s"] - 1
        drifted = drift(here(ranks).nodes[0].device, found["speed"])
        return Row(
            workload, link, ranks, mine["plan"], fastest["plan"], mine["measured_s"], fastest["measured_s"], regret,
            pick.estimate.step, drifted, mine["measured_bytes"], pick.estimate.peak, space, left, entries, self.machine,
        )  # fmt: skip

    def _pool(self, ranks: int) -> Ranks:
        if ranks not in self.pools or not self.pools[ranks].usable:
            self.pools[ranks] = Ranks(ranks, backend=Backend.cpu())
        return self.pools[ranks]

    def close(self) -> None:
        """End the ranks."""
        for pool in self.pools.values():
            pool.close()


def drift(device: Device, speed: Sequence[Sequence[float]]) -> float:
    """How many times as long as a device says the probes that are watched took: the median."""
    ratios = []
    for n, (i, j) in enumerate(watched()):
        probe, size = PROBES[i], sizes()[i][j]
        said = 0.0
        for curve in device.operators:
            if curve.op == probe.op and curve.by in (probe.by, "product bytes"):
                count = size[curve.by != "operations"]
                said += curve.seconds(count) + curve.seconds(count, backward=True)
        ratios += [times[n] / said for times in speed]
    return statistics.median(ratios)


def slow_cluster(names: tuple[str, str], link: str, ranks: int) -> Cluster:
    """Two nodes that a measured link joins, each with its share of this machine's cores."""
    found = netns.run(names, "benchmarks.regret_rank", {"what": "link"}, ranks, 300)
    source = f"measured here, over a link of {link}"
    rows = tuple(
        Collective(kind, ranks, Quantity(fixed, source), Quantity(1 / each, source))
        for kind, (fixed, each) in found.items()
    )
    kind = here(ranks).nodes[0].device
    gather = {row.kind: row for row in rows}["all_gather"]
    joins = Link(
        link, Quantity(gather.bandwidth.value / 2, source), Quantity(gather.latency.value / 2, source),
        Quantity(gather.latency.value / 2, source), Quantity(2.0, "rings"), collectives=rows,
    )  # fmt: skip
    return Cluster(f"2 nodes over {link}", (Node(ranks // 2, kind, joins),) * 2)


@dataclass(frozen=True)
class Summary:
    """Medians and worst of some rows, as parts."""

    rows: int
    regret: float
    worst: float
    error: float
    rest: float
    memory: float
    lowest: float

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Summary:
        """Of at least one row."""
        memory = [row.memory for row in rows]
        return cls(
            len(rows), statistics.median(r.regret for r in rows), max(r.regret for r in rows),
            statistics.median(abs(r.error) for r in rows), statistics.median(abs(r.rest) for r in rows),
            statistics.median(map(abs, memory)), min(memory),
        )  # fmt: skip

    def text(self) -> str:
        """The figures with their goals."""
        return (
            f"{self.rows} rows: regret median {self.regret:.1%} (goal 3 %), worst {self.worst:.1%} (10 %); step error "
            f"of picks median {self.error:.1%} (10 %), {self.rest:.1%} at the machine's speed of the time; memory "
            f"error median {self.memory:.1%} (5 %), lowest {self.lowest:+.1%} (-5 %)"
        )


def tables(rows: Sequence[Row]) -> str:
    """The rows, and their medians by link and ranks, as they stand in the documentation."""
    lines = [
        "| workload | link | ranks | pick | pick, ms | fastest, ms | regret | foretold, ms | error | drift | rest | "
        "memory |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r.workload} | {r.link} | {r.ranks} | {r.picked} | {r.picked_s * 1e3:.1f} | {r.best_s * 1e3:.1f} | "
        f"{r.regret:.1%} | {r.predicted_s * 1e3:.1f} | {r.error:+.1%} | {r.drift:.2f} | {r.rest:+.1%} | "
        f"{r.memory:+.1%} |"
        for r in rows
    ]
    lines += [
        "",
        "| | rows | regret, median | worst | step error, median | rest, median | memory error, median | lowest |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        "| goal | | 3 % | 10 % | 10 % | | 5 % | -5 % |",
    ]
    groups = {f"{link}, {n} rank{'s' * (n > 1)}": (link, n) for link in RANKS for n in RANKS[link]}
    parts = {name: [r for r in rows if (r.link, r.ranks) == key] for name, key in groups.items()}
    for name, part in {**parts, "all": rows}.items():
        s = Summary.of(part)
        lines.append(
            f"| {name} | {s.rows} | {s.regret:.1%} | {s.worst:.1%} | {s.error:.1%} | {s.rest:.1%} | {s.memory:.1%} | "
            f"{s.lowest:+.1%} |"
        )
    return "\n".join(lines)


def stored(path: Path = RESULTS) -> list[Row]:
    """The rows of a file; none where there is no file."""
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []


def _merged(path: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows of a file, those measured now replaced."""
    found = {(r.workload, r.link, r.ranks): r for r in [*stored(path), *rows]}
    order = [(w, link, n) for link in RANKS for n in RANKS[link] for w in JOBS]
    return [found[key] for key in order if key in found]


def _names(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    """Measure the rows that are asked for, print a line for each, and write them as they come."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regret", description=__doc__)
    parser.add_argument("--workload", type=_names, default=list(JOBS), metavar="A,B", help=",".join(JOBS))
    parser.add_argument("--link", type=_names, default=list(RANKS), metavar="A,B", help=",".join(RANKS))
    parser.add_argument("--ranks", type=int, default=None, metavar="N", help="1, 2 or 4 (all)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    strange = [*(set(options.workload) - set(JOBS)), *(set(options.link) - set(RANKS))]
    if strange:
        parser.error(f"{', '.join(strange)} is unknown; workloads are {','.join(JOBS)}, links {','.join(RANKS)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    began = time.monotonic()
    if not measured_file().exists():
        found = discover(tell=lambda what: print(f"measuring this machine: {what}", file=sys.stderr))
        measured_file().parent.mkdir(parents=True, exist_ok=True)
        measured_file().write_text(machine_file(found))
    bench = Bench()
    rows: list[Row] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{bench.machine}\n\n{HEAD}", flush=True)

    def add(row: Row) -> None:
        rows.append(row)
        print(row.line(), flush=True)
        options.out.write_text(json.dumps([asdict(r) for r in _merged(options.out, rows)], indent=1) + "\n")

    try:
        for link in options.link:
            counts = [n for n in RANKS[link] if options.ranks in (None, n)]
            if link == "local":
                for n in counts:
                    for workload in options.workload:
                        add(bench.row(workload, link, n, here(n), None))
                continue
            try:
                with netns.link(link) as names:
                    for n in counts:
                        cluster = slow_cluster(names, link, n)
                        for workload in options.workload:
                            add(bench.row(workload, link, n, cluster, names))
            except netns.NoLink as reason:
                print(f"{link}: skipped, {reason}", flush=True)
    finally:
        bench.close()
    print(f"\n{Summary.of(rows).text()}; {time.monotonic() - began:.0f} s" if rows else "\nno rows")


if __name__ == "__main__":
    main()
