"""Proves every strategy on every model of the zoo, and writes what came of it as a table: `make prove`.

    python -m tests.coverage_table [--out docs/coverage.md] [--models gpt2,llama] [--ranks 2,4,8]

At 8 ranks only hybrids are run. The exit status is 0 only if nothing failed.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from shardwise.errors import ShardwiseError
from shardwise.measure.verify import Row, verify
from shardwise.search.strategies import STRATEGIES
from tests.pool import Pool
from tests.zoo import ZOO

_ABOUT = """# Coverage

Every strategy on every model of the test suite, against one device: the loss, the gradient of every parameter, the
gradient norm, and every parameter and buffer after {steps} steps of the job's own optimizer, in float64, with the
collectives of every rank as the plan announced them. Written by `make prove`.

- **passes 2, 4**: every error is below 1e-9 at 2 and at 4 ranks (hybrids at 4 and 8).
- **–**: does not apply; the note says why.
- *error* is the largest relative error of any gradient of any strategy.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the proofs and writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="the table; without it only lines are printed")
    parser.add_argument("--models", default=",".join(ZOO), help="names, with commas")
    parser.add_argument("--ranks", default="2,4,8", help="numbers of ranks, with commas")
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # of transformers, about kernels that are not installed
    sizes = [int(n) for n in given.ranks.split(",")]
    found: dict[str, dict[int, list[Row]]] = {name: {} for name in given.models.split(",")}
    for ranks in sizes:
        with Pool() as pool:
            for name in found:
                found[name][ranks] = prove(name, ranks, given.steps, pool)
                if given.out is not None:
                    given.out.write_text(page(found, given.steps), encoding="utf-8")
    failed = [name for name, by_ranks in found.items() if any(map(failing, by_ranks.values()))]
    print(f"{len(found) - len(failed)} of {len(found)} models pass{'; failing: ' * bool(failed)}{', '.join(failed)}")
    return 1 if failed else 0


def prove(name: str, ranks: int, steps: int, pool: Pool) -> list[Row]:
    """The rows of one model at one number of ranks."""
    began = time.monotonic()
    wanted = STRATEGIES if ranks < 8 else ("hybrid",)
    try:
        rows = verify(ZOO[name](), ranks, strategies=wanted, steps=steps, pool=pool)
    except ShardwiseError as error:
        rows = [Row(strategy, None, True, str(error)) for strategy in wanted]
    said = ", ".join(f"{row.strategy} {verdict(row)}" for row in rows)
    print(f"{name:18} {ranks} ranks  {time.monotonic() - began:4.0f} s  {said}", flush=True)
    for row in failing(rows):
        print(f"    {row.strategy}: gradient error {row.grad_error} ({row.worst}); {row.reason[-300:]}", flush=True)
    return rows


def failing(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.applicable and not row.passed]


def verdict(row: Row) -> str:
    if not row.applicable:
        return "–"
    return "passes" if row.passed else "FAILS"


def page(found: Mapping[str, Mapping[int, Sequence[Row]]], steps: int) -> str:
    """The table as Markdown."""
    notes: dict[str, int] = {}
    lines = [_ABOUT.format(steps=steps), "| model | " + " | ".join(STRATEGIES) + " | error |"]
    lines.append("|---|" + "---|" * (len(STRATEGIES) + 1))
    for name, by_ranks in found.items():
        cells = [cell(strategy, by_ranks, notes) for strategy in STRATEGIES]
        errors = [row.grad_error for rows in by_ranks.values() for row in rows if row.grad_error is not None]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {max(errors):.0e} |" if errors else " | – |")
    lines += ["", *(f"{number}. {text}" for text, number in notes.items())]
    return "\n".join(lines) + "\n"


def cell(strategy: str, by_ranks: Mapping[int, Sequence[Row]], notes: dict[str, int]) -> str:
    """What one strategy did at every number of ranks."""
    said: dict[str, list[str]] = {}
    for ranks, rows in by_ranks.items():
        for row in rows:
            if row.strategy == strategy and not (ranks == 2 and strategy == "hybrid"):
                word = verdict(row)
                if word == "–":
                    word = f"– ({notes.setdefault(row.reason, len(notes) + 1)})"
                said.setdefault(word, []).append(str(ranks))
    if len(said) == 1 and next(iter(said)).startswith("–"):
        return next(iter(said))
    return ", ".join(f"{word} {', '.join(ranks)}" for word, ranks in said.items())


if __name__ == "__main__":
    sys.exit(main())
