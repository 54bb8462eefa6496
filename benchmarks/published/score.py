"""How far predictions are from measurements: errors, who runs out of memory, and what the predicted choice loses.

The reckoning is that of the tables' own scorer. A third of each table's cells, a cell being a model on a number of
devices, are held out: no number of the library was fitted on them.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

GIB = 2**30
EIGHT = re.compile(r"fp8|float8", re.I)
"""Precisions of products in 8 bits."""
_CONFIG = (
    "cell", "tp", "pp", "vpp", "dp", "cp", "ep", "zero_fsdp", "micro_batch", "global_batch", "recompute",
    "sequence_parallel", "precision", "compile", "seq_len",
)  # fmt: skip
"""Columns that tell plans apart; rows that agree in them are one plan, measured several times."""


@dataclass(frozen=True)
class Planned:
    """A plan of a table: what was measured and what was predicted, in seconds and GiB; NaN where there is none.

    `eight` is whether its products are in 8 bits.
    """

    cell: str
    stages: int
    devices: int
    batch: str
    ran: bool
    short: bool
    measured: float
    predicted: float
    memory: float
    peak: float
    fits: bool
    eight: bool = False


@dataclass(frozen=True)
class Scores:
    """Scores of some plans.

    Attributes:
        plans, priced: how many ran, and how many of these have a price.
        time, one: median and 90th percentile of the relative error of step time; the same of plans with one stage.
        memory: median relative error of memory.
        fit: balanced accuracy of who runs out of memory.
        regret: by cell and batch, the share of throughput that the predicted choice loses; 1 where it does not run.
    """

    plans: int
    priced: int
    time: tuple[float, float]
    one: tuple[float, float]
    memory: float
    fit: float
    regret: Mapping[str, float]


def held_out(cells: Iterable[str]) -> set[str]:
    """A third of a table's cells, those whose names hash lowest."""
    found = sorted(set(cells), key=lambda cell: hashlib.sha256(cell.encode()).hexdigest())
    return set(found[: round(len(found) / 3)])


def planned(rows: Sequence[Mapping[str, str]], predicted: Sequence[Mapping[str, str]]) -> list[Planned]:
    """The plans of a table.

    Args:
        rows: measured ones; those marked INCONSISTENT are left out.
        predicted: lines with their rows' config_id, in the order of the rows.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        if "INCONSISTENT" not in (row.get("notes") or ""):
            groups.setdefault(tuple(row.get(key) or "" for key in _CONFIG), []).append(i)
    lines = _paired(rows, predicted)
    found = []
    for those in groups.values():
        group = [rows[i] for i in those]
        first = group[0]
        prices = [lines[i] for i in those if i in lines]
        ran = [row for row in group if (row.get("status") or "ok") == "ok" and row.get("step_time_s")]
        found.append(
            Planned(
                first["cell"],
                int(float(first.get("pp") or 1)),
                int(float(first.get("n_gpus") or 1)),
                first.get("global_batch") or "",
                bool(ran),
                all("OOM" in (r.get("status") or "") for r in group),
                _middle(row.get("step_time_s") for row in group),
                _middle(p["step_time_s"] for p in prices),
                _middle(row.get("peak_mem_GB") for row in group),
                _middle(p["peak_mem_GiB"] for p in prices),
                _middle(p["fits"] for p in prices) > 0.5,
                EIGHT.search(first.get("precision") or "") is not None,
            )
        )
    return found


def _paired(rows: Sequence[Mapping[str, str]], predicted: Sequence[Mapping[str, str]]) -> dict[int, Mapping[str, str]]:
    """By a row's number its line: some tables have one config_id for several plans, whose lines follow each other."""
    named: dict[str, tuple[list[int], list[Mapping[str, str]]]] = {row["config_id"]: ([], []) for row in rows}
    for i, row in enumerate(rows):
        named[row["config_id"]][0].append(i)
    for line in predicted:
        if line["config_id"] in named:
            named[line["config_id"]][1].append(line)
    # Where one of them has no line, nobody knows whose is missing.
    return {i: line for those, lines in named.values() if len(those) == len(lines)
            for i, line in zip(those, lines, strict=True)}  # fmt: skip


def score(plans: Sequence[Planned]) -> Scores:
    """Scores of these plans."""
    ran = [p for p in plans if p.ran]
    priced = [p for p in ran if p.predicted == p.predicted]
    memory = [abs(p.peak / p.memory - 1) for p in plans if p.memory == p.memory and p.peak == p.peak and not p.short]
    known = [p for p in plans if (p.ran or p.short) and p.predicted == p.predicted]
    fit = math.nan
    if any(p.short for p in known) and any(p.ran for p in known):
        fit = (mean(p.fits for p in known if p.ran) + mean(not p.fits for p in known if p.short)) / 2
    cells: dict[tuple[str, str], list[Planned]] = {}
    for p in plans:
        cells.setdefault((p.cell, p.batch), []).append(p)
    regret = {f"{cell}, batch {batch}": _regret(those) for (cell, batch), those in cells.items()
              if sum(p.ran for p in those) >= 3 and any(p.predicted == p.predicted for p in those)}  # fmt: skip
    one = [p for p in priced if p.stages <= 1]
    return Scores(len(ran), len(priced), _errors(priced), _errors(one), _median(memory), fit, regret)


def _regret(plans: Sequence[Planned]) -> float:
    may = [p for p in plans if p.predicted == p.predicted and p.fits]
    if not may:
        return 1.0
    pick = min(may, key=lambda p: p.predicted)
    return 1 - min(p.measured for p in plans if p.ran) / pick.measured if pick.ran else 1.0


def _errors(plans: Sequence[Planned]) -> tuple[float, float]:
    errors = sorted(abs(p.predicted / p.measured - 1) for p in plans)
    if not errors:
        return math.nan, math.nan
    at = 0.9 * (len(errors) - 1)
    low = int(at)
    return median(errors), errors[low] + (errors[min(low + 1, len(errors) - 1)] - errors[low]) * (at - low)


def _median(values: Sequence[float]) -> float:
    return median(values) if values else math.nan


def _middle(texts: Iterable[str | None]) -> float:
    return _median([float(text) for text in texts if text])
