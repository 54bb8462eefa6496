"""Text for people: numbers with units, tables, and the report of a run."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shardwise.engine.train import Result
from shardwise.parallel.mesh import Traffic
from shardwise.plan.plan import Plan


@dataclass(frozen=True)
class Measured:
    """What was measured of one way to run a job.

    Attributes:
        name: what tables and plots call it, e.g. "tensor, 2 ranks".
        strategy: "one" for the run that the others are compared with, else the strategy.
        why: why this plan, or why there is none.
        plan: the plan that ran; None where the strategy does not apply.
        seconds: median of a step.
        communication: the part of a step in which a collective is under way and nothing is computed, from 0 to 1.
        memory: largest peak of a rank, in bytes.
        memory_before: what of it that rank had before the model was built.
        losses: of each step.
        held_out: loss on data that was not trained on.
        traffic: collectives of one step on rank 0.
    """

    name: str
    strategy: str
    why: str
    plan: Plan | None
    seconds: float = math.nan
    communication: float = math.nan
    memory: int = 0
    memory_before: int = 0
    losses: tuple[float, ...] = ()
    held_out: float = math.nan
    traffic: tuple[Traffic, ...] = ()

    def difference(self, other: Measured) -> float:
        """The largest difference between the losses of two runs, step by step."""
        return max((abs(a - b) for a, b in zip(self.losses, other.losses, strict=False)), default=math.nan)

    def to_dict(self, one: Measured) -> dict[str, object]:
        """The same as numbers, strings and lists, with the comparison with `one`."""
        if self.plan is None:
            return {"name": self.name, "strategy": self.strategy, "applicable": False, "reason": self.why}
        return {
            "name": self.name,
            "strategy": self.strategy,
            "applicable": True,
            "reason": self.why,
            "plan": self.plan.text(),
            "seconds_per_step": self.seconds,
            "speedup": one.seconds / self.seconds,
            "communication_share": self.communication,
            "peak_memory_bytes": self.memory,
            "memory_before_bytes": self.memory_before,
            "largest_loss_difference": self.difference(one),
            "losses": list(self.losses),
            "held_out_loss": self.held_out,
            "traffic": [t._asdict() for t in self.traffic],
        }


# --- numbers ----------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them, e.g. `12.3 ms`."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= scale:
            return f"{_three(seconds / scale)} {unit}"
    return "0 s" if seconds == 0 else f"{_three(seconds / 1e-9)} ns" if math.isfinite(seconds) else "–"


def size(count: float) -> str:
    """Bytes in the unit that suits them, e.g. `4.2 MB`."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= scale:
            return f"{_three(count / scale)} {unit}"
    return f"{count:.0f} B"


def percent(share: float) -> str:
    """A share of 1 as `12 %`."""
    return f"{share * 100:.0f} %" if math.isfinite(share) else "–"


def times(ratio: float) -> str:
    """A ratio as `1.85×`."""
    return f"{ratio:.2f}×" if math.isfinite(ratio) else "–"


def small(value: float) -> str:
    """A difference or an error, e.g. `3.1e-07`."""
    return "–" if not math.isfinite(value) else "0" if value == 0 else f"{value:.1e}"


def _three(value: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(2, digits)}f}"


# --- tables -----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Sequence[str]], *, left: int = 1, last: bool = False) -> str:
    """Rows as aligned text, the first being the heads, with a rule below it.

    Args:
        rows: of cells.
        left: how many columns are aligned to the left.
        last: whether the last one is too.
    """
    columns = range(len(rows[0]))
    at_left = {i for i in columns if i < left or (last and i == columns[-1])}
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i in at_left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(rows[0]), "  ".join("─" * w for w in widths), *map(line, rows[1:])])


def comparison(runs: Sequence[Measured]) -> list[list[str]]:
    """The table that compares runs with the first of them, as cells; those without a plan are left out."""
    one = runs[0]
    rows = [["", "a step", "speed-up", "communication", "peak memory", "largest loss difference"]]
    for run in runs:
        if run.plan is None:
            continue
        first = run is one
        rows.append(
            [
                run.name,
                duration(run.seconds),
                "1" if first else times(one.seconds / run.seconds),
                "–" if first else percent(run.communication),
                size(run.memory),
                "–" if first else small(run.difference(one)),
            ]
        )
    return rows


def traffic_rows(traffic: Sequence[Traffic]) -> list[list[str]]:
    """Collectives of a step as cells."""
    rows = [["collective", "axis", "count", "bytes"]]
    return rows + [[t.kind, t.axis, f"{t.count:,}", size(t.bytes)] for t in traffic]


def proof_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a proof, as `verify --json` prints them, for people."""
    cells = [["strategy", "result", "loss", "gradients", "parameters", "collectives", ""]]
    for row in rows:
        if not row["applicable"]:
            cells.append([row["strategy"], "does not apply", "", "", "", "", row["reason"]])
            continue
        found = [row[key] for key in ("loss_error", "grad_error", "param_error")]
        errors = ["–" if error is None else small(error) for error in found]
        same = row["collectives_announced"] == row["collectives_recorded"]
        verdict = "passed" if row["passed"] else "unclear" if row["unclear"] else "FAILED"
        # Of a run that failed the first line; its trace is in the log that this names.
        told = row["reason"].partition("\n")[0]
        cells.append([row["strategy"], verdict, *errors, "as announced" if same else "not as announced", told])
    return table(cells, left=7)


def proof_failures(rows: Sequence[Mapping[str, Any]]) -> str:
    """What did not pass of a proof and how far off it is, in a sentence; empty where all that applies passed."""
    failed, unclear = [], {}
    for row in rows:
        name, error = row["strategy"], row["grad_error"]
        if not row["applicable"] or row["passed"]:
            continue
        if row["unclear"]:
            unclear[name] = row["rounding"]
        elif error is None:
            failed.append(f"{name} (the run failed)")
        elif row["collectives_announced"] != row["collectives_recorded"]:
            failed.append(f"{name} (sends other collectives than announced)")
        else:
            failed.append(f"{name} ({row['worst']} is off by {small(error)})")
    told = [f"{', '.join(failed)}: not what one device computes"] if failed else []
    if unclear:
        told.append(
            f"{', '.join(unclear)} cannot be told from rounding: with the last bit of every weight changed, one device "
            f"differs from itself by up to {small(max(unclear.values()))}; prove it with weights of which that is not "
            "so, trained or smaller"
        )
    return "; ".join(told)


# --- one run ----------------------------------------------------------------------------------------------------------


def report(plan: Plan, result: Result, predicted: Mapping[str, float] | None = None) -> str:
    """What a run did as text: its plan, speed, memory and collectives.

    Args:
        predicted: seconds of a step by term, where they were estimated; their sum is set against the measured step.
    """
    lines = [
        f"{result.name}: {len(result.losses)} steps on {_ranks(result)}, {plan.title()}",
        f"  loss         {result.losses[0]:.4f} → {result.losses[-1]:.4f}",
        f"  a step       {duration(result.step_seconds)} (median), {result.rate:,.0f} {result.unit}/s",
        f"  peak memory  {size(max(result.peak_memory))} on the fullest rank, "
        f"{size(max(p - b for p, b in zip(result.peak_memory, result.memory_before, strict=True)))} of it for the job",
    ]
    if predicted:
        total = sum(predicted.values())
        terms = ", ".join(f"{name} {duration(seconds)}" for name, seconds in predicted.items())
        ratio = result.step_seconds / total if total else math.nan
        lines.append(f"  predicted    {duration(total)} ({terms}); measured / predicted = {ratio:.2f}")
    if result.traffic:
        lines.append("  collectives of a step:")
        lines += ["    " + line for line in table(traffic_rows(result.traffic), left=2).splitlines()]
    return "\n".join(lines)


def _ranks(result: Result) -> str:
    ranks = "1 rank" if result.ranks == 1 else f"{result.ranks} ranks"
    threads = "" if result.device == "cuda" else f" of {result.threads} thread{'s' * (result.threads != 1)}"
    return f"{ranks}{threads} ({result.device})"


@contextmanager
def search_progress() -> Iterator[Callable[[Any, int], None] | None]:
    """What a search is told to call: one line on a terminal, wiped out at the end; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    told, began = 0.0, time.monotonic()

    def tell(found: Any, left: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told < 0.1:
            return
        told = now
        best = f", best {duration(found.best.estimate.step)} a step; Ctrl-C takes it" if found.best is not None else ""
        seen = f"{found.shapes - left:,} of {found.shapes:,} shapes looked at in {now - began:.0f} s"
        print(f"\r\033[K{seen}{best}", end="", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
