"""Prices published runs and says how far off: `python -m benchmarks.published TABLE.csv --out PREDICTED.csv`.

For a folder of tables each is priced, and the page and plot of accuracy are written from all of them.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.published.page import Part, plot, text
from benchmarks.published.rows import price, runs
from benchmarks.published.score import GIB, Scores, held_out, planned, score
from shardwise.cost.estimate import Estimate
from shardwise.errors import ShardwiseError

_NEEDED = {"table", "config_id", "cell", "model", "accelerator", "n_gpus", "step_time_s"}
_SHORT = Path(__file__).parent / "short.md"
_COLUMNS = ("config_id", "step_time_s", "peak_mem_GiB", "fits")


def predictions(rows: Sequence[Mapping[str, str]]) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """The prices of a table's rows, and by reason the rows that have none."""
    found: list[dict[str, Any]] = []
    refused: dict[str, list[str]] = {}
    for row in rows:
        try:
            found.append(line_of(row, price(row)))
        except (ShardwiseError, ValueError, KeyError, ArithmeticError) as error:
            # A model's own configuration refuses some sizes with a text of several lines.
            reason = str(error).partition("\n")[0] or type(error).__name__
            refused.setdefault(reason, []).append(row.get("config_id") or "?")
    return found, refused


def line_of(row: Mapping[str, str], cost: Estimate) -> dict[str, Any]:
    """A line of predictions: the step and the peak, then every item."""
    return {
        "config_id": row["config_id"], "step_time_s": f"{cost.step:.5g}", "peak_mem_GiB": f"{cost.peak / GIB:.4g}",
        "fits": int(cost.fits and runs(row)), **{k: f"{v:.4g}" for k, v in cost.seconds.items()},
        **{f"{k} GiB": f"{v / GIB:.4g}" for k, v in cost.memory.items()},
    }  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where it lacks a column that is needed."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return rows if rows and set(rows[0]) >= _NEEDED else []


def write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write predictions."""
    columns = list(dict.fromkeys([*_COLUMNS, *(key for line in lines for key in line)]))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="0")
        writer.writeheader()
        writer.writerows(lines)


def said(name: str, scores: Scores) -> str:
    """A line of scores."""
    texts = [f"{name:24} {scores.priced} of {scores.plans} plans"]
    for label, (middle, high) in (("step", scores.time), ("one stage", scores.one)):
        if not math.isnan(middle):
            texts.append(f"{label} {middle:.1%}, p90 {high:.1%}")
    if not math.isnan(scores.memory):
        texts.append(f"memory {scores.memory:.1%}")
    if not math.isnan(scores.fit):
        texts.append(f"fit {scores.fit:.3f}")
    if scores.regret:
        losses = list(scores.regret.values())
        texts.append(f"regret {median(losses):.1%}, mean {mean(losses):.1%} of {len(losses)} cells")
    return "; ".join(texts)


def main() -> int:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description="Price the plans of published runs, and score the prices.")
    parser.add_argument("data", nargs="?", default="../shared/published", help="a table, or a folder of tables")
    parser.add_argument("--out", default="", help="where predictions go: a file for a table, a folder for a folder")
    parser.add_argument("--page", default="docs", help="where a folder's page and plot go")
    parser.add_argument("--devices", type=int, default=10**9, help="leave out rows of more devices")
    parser.add_argument("--again", action="store_true", help="score the predictions that are there; price none")
    arguments = parser.parse_args()
    data, most = Path(arguments.data), arguments.devices
    if not data.exists():
        print(f"there is nothing at {data}; name a table or a folder of tables: make bench-published DATA=...")
        return 2
    tables = sorted(data.glob("*.csv")) if data.is_dir() else [data]
    out = Path(arguments.out or ("predictions" if data.is_dir() else "predictions.csv"))
    if data.is_dir():
        out.mkdir(parents=True, exist_ok=True)
    parts, reasons = [], {}
    for path in tables:
        rows = [row for row in read(path) if float(row["n_gpus"] or 1) <= most]
        if not rows:
            print(f"{path.name}: no rows of runs")
            continue
        into, began = out / path.name if data.is_dir() else out, time.monotonic()
        known = into.with_suffix(".json")
        if not arguments.again:
            lines, refused = predictions(rows)
            write(into, lines)
            known.write_text(json.dumps({reason: len(ids) for reason, ids in refused.items()}, indent=1))
            print(f"{path.name}: {len(lines)} of {len(rows)} rows priced in {time.monotonic() - began:.0f} s; {into}")
            for reason, ids in refused.items():
                print(f"  {len(ids)} not priced ({ids[0]} ...): {reason}")
        elif not into.exists():
            continue
        with open(into, newline="", encoding="utf-8") as file:
            found = list(csv.DictReader(file))
        reasons[path.stem] = json.loads(known.read_text()) if known.exists() else {}
        held = held_out(row["cell"] for row in read(path))
        plans = planned(rows, found)
        for out_of in (False, True):
            those = [p for p in plans if (p.cell in held) == out_of]
            part = Part(path.stem, out_of, those, score(those))
            parts.append(part)
            print("  " + said(f"{path.stem}, {'held out' if out_of else 'others'}", part.scores))
    if data.is_dir() and any(part.scores.priced for part in parts):
        page = Path(arguments.page)
        short = _SHORT.read_text(encoding="utf-8")
        (page / "accuracy.md").write_text(text(parts, reasons, short), encoding="utf-8")
        (page / "accuracy.svg").write_text(plot(parts), encoding="utf-8")
        print(f"{page / 'accuracy.md'}, {page / 'accuracy.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
