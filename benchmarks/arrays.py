"""`sw.map` against one worker and against a plain call: `python -m benchmarks.arrays`.

The ways take turns within a round, and the median over the rounds counts. A ratio below 1 is faster than one worker.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import shardwise as sw

RESULTS = Path(__file__).parent / "results" / "arrays.json"
SIZES = (10, 100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)
ROUNDS = 9
BUDGET = 4.0
"""Seconds for a row of the table, from which fewer rounds follow, but three at least."""


@dataclass(frozen=True)
class Case:
    """A function, and where it runs."""

    name: str
    fn: Callable[[Any], Any]
    backend: Literal["threads", "processes"]
    columns: int = 1
    tensor: bool = False
    most: int = SIZES[-1]


@dataclass(frozen=True)
class Row:
    """Seconds of one call: of the function itself, and of `map` with so many workers."""

    case: str
    elements: int
    plain_s: float
    one_s: float
    two_s: float
    four_s: float

    @property
    def two(self) -> float:
        return self.two_s / self.one_s

    @property
    def four(self) -> float:
        return self.four_s / self.one_s


def gauss(block: Any) -> Any:
    return np.sin(np.exp(-block * block))


def sort(block: Any) -> Any:
    return np.sort(block, axis=1)


def tensor_gauss(block: torch.Tensor) -> torch.Tensor:
    return torch.sin(torch.exp(-block * block))


def python(block: Any) -> Any:
    return np.array([value * value + 1.0 for value in block.tolist()])


def longer(block: Any) -> Any:
    return np.array([sum(value * k for k in range(20)) for value in block.tolist()])


CASES = (
    Case("np.sqrt", np.sqrt, "threads"),
    Case("np.sin(np.exp(-x * x))", gauss, "threads"),
    Case("np.sort of rows of 100", sort, "threads", columns=100),
    Case("torch.sin(torch.exp(-x * x))", tensor_gauss, "threads", tensor=True),
    Case("a loop in Python", python, "processes"),
    Case("a longer loop in Python", longer, "processes", most=1_000_000),
)


def measure(case: Case, elements: int) -> Row:
    """The median seconds of a call, each way."""
    numbers = np.random.default_rng(0).random(elements)
    array: Any = numbers.reshape(-1, case.columns) if case.columns > 1 else numbers
    array = torch.from_numpy(array) if case.tensor else array

    def mapped(workers: int) -> Callable[[], Any]:
        return lambda: sw.map(case.fn, array, workers=workers, backend=case.backend)

    ways = (lambda: case.fn(array), mapped(1), mapped(2), mapped(4))
    once = max(seconds(way, 1) for way in ways)  # the first calls, which are not counted
    once = min(once, max(seconds(way, 1) for way in ways))
    calls = max(1, min(1000, int(0.01 / once)))
    rounds = max(3, min(ROUNDS, int(BUDGET / (once * calls * len(ways)))))
    found = [[seconds(way, calls) for way in ways] for _ in range(rounds)]
    return Row(case.name, elements, *(statistics.median(column) for column in zip(*found, strict=True)))


def seconds(way: Callable[[], Any], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        way()
    return (time.perf_counter() - began) / calls


def startup() -> dict[str, float]:
    """Seconds that `map` weighs: to start and join three threads, and until a process has imported what it needs."""
    boot = "import shardwise.arrays.worker"

    def threads() -> None:
        started = [threading.Thread(target=int) for _ in range(3)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()

    def process(code: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    ways = {"three_threads_s": threads, "process_s": process(boot), "process_with_torch_s": process(f"{boot}, torch")}
    return {name: statistics.median(seconds(way, 1) for _ in range(5)) for name, way in ways.items()}


def table(rows: list[Row]) -> str:
    """The rows as they stand in the documentation; seconds as microseconds."""
    lines = [
        "| function | elements | `fn(array)`, µs | one worker, µs | two / one | four / one |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        micro = f"{row.plain_s * 1e6:,.1f} | {row.one_s * 1e6:,.1f}"
        lines.append(f"| {row.case} | {row.elements:,} | {micro} | {row.two:.2f} | {row.four:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", help="only those whose name has this")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    arguments = parser.parse_args()
    rows = [
        measure(case, size)
        for case in CASES
        if (arguments.cases or "") in case.name
        for size in SIZES
        if case.columns <= size <= case.most
    ]
    started = startup()
    print(table(rows))
    print("\n".join(f"{name}: {value * 1e3:.1f} ms" for name, value in started.items()))
    told = {
        "machine": {"cores": os.cpu_count(), "cpu": platform.machine(), "torch": torch.__version__,
                    "numpy": np.__version__, "python": platform.python_version()},
        "startup": started,
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    arguments.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
