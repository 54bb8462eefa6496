"""The throughput of `shardwise serve` against `sw.predict`'s: `python -m benchmarks.serve`.

Both have the same plan, batch and ranks, and compute samples/s in steady state; they take turns within a run, and the
median over the rounds counts. A ratio below 1 is what HTTP, JSON and gathering cost, clients on this machine included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import shardwise as sw
from benchmarks.workloads import LENGTH, VOCAB, Block, Embed, Features, Layered, Tokens

RESULTS = Path(__file__).parent / "results" / "serve.json"
CLIENTS, ROUNDS, BATCH = 64, 5, 32


class Mean(nn.Module):
    """The mean over positions, and the logits of a class."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.logits = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.logits(x.mean(1))
        return y


def transformer() -> sw.Job:
    """A classifier of 128 bytes with 12.8 million parameters."""
    width = 512

    def model() -> nn.Module:
        return Layered(Embed(VOCAB, LENGTH, width), *(Block(width, 8) for _ in range(4)), Mean(width, 10))

    data = Tokens(count=1 << 20, length=LENGTH, vocab=VOCAB, classes=10, pooled=True)
    return sw.Job(model=model, data=data, global_batch=BATCH)


def mlp() -> sw.Job:
    """Four layers over 256 numbers, which take less time than their JSON."""

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
            nn.Linear(512, 10),
        )  # fmt: skip

    return sw.Job(model=model, data=Features(count=1 << 20, shape=(256,), classes=10), global_batch=BATCH)


CASES = {"transformer": (transformer, 384), "mlp": (mlp, 4096)}
"""Each job, and how many samples of it a turn takes."""


@dataclass(frozen=True)
class Row:
    """Medians over the rounds; rates in samples/s, latencies in seconds."""

    case: str
    clients: int
    predict: float
    serve: float
    ratio: float
    ratios: list[float]
    p50: float
    p99: float
    batch: float
    """Samples of a batch of the server, on average."""


@contextmanager
def served(spec: str, ranks: int) -> Iterator[str]:
    """The address of a server."""
    command = [sys.executable, "-m", "shardwise.cli", "serve", spec, "--ranks", str(ranks), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.match(r"http://(\S+) serves", process.stdout.readline())
        assert found is not None, "the server did not start"
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def predicted(job: sw.Job, samples: int, ranks: int) -> float:
    """Samples/s of `sw.predict` while all its ranks are at work."""
    skip = 2 * ranks
    chunks = samples // job.global_batch
    with closing(sw.predict(job, plan=None, ranks=ranks)) as outputs:
        for _ in range(skip):
            next(outputs)
        began = time.perf_counter()
        for _ in range(chunks):
            next(outputs)
        return chunks * job.global_batch / (time.perf_counter() - began)


def asked(address: str, bodies: list[str], samples: int) -> dict[str, Any]:
    """What the clients measured."""
    host, port = address.split(":")
    told = {"host": host, "port": int(port), "clients": CLIENTS, "warm": 2 * CLIENTS, "requests": samples}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serve_load"], input=json.dumps({**told, "bodies": bodies}),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def counted(address: str) -> tuple[float, float]:
    """Samples and batches of a server, so far."""
    import urllib.request

    text = urllib.request.urlopen(f"http://{address}/metrics").read().decode()
    names = ("shardwise_batch_samples_sum", "shardwise_batch_samples_count")
    samples, batches = (float(re.search(rf"^{name} (\S+)$", text, re.M)[1]) for name in names)  # type: ignore[index]
    return samples, batches


def measure(case: str, ranks: int, rounds: int) -> Row:
    """One case, the two ways in turns."""
    make, samples = CASES[case]
    job = make()
    bodies = [json.dumps({"inputs": {"input": job.data[i][0].tolist()}}) for i in range(256)]
    predict, serve, found = [], [], []
    with served(f"benchmarks.serve:{case}", ranks) as address:
        asked(address, bodies, CLIENTS)
        before = counted(address)
        for _ in range(rounds):
            predict.append(predicted(job, samples, ranks))
            found.append(asked(address, bodies, samples))
            serve.append(found[-1]["rate"])
            print(f"{case}: predict {predict[-1]:,.0f}/s, serve {serve[-1]:,.0f}/s, {found[-1]}", flush=True)
        after = counted(address)
    ratios = [b / a for a, b in zip(predict, serve, strict=True)]
    middle = statistics.median
    return Row(
        case, CLIENTS, middle(predict), middle(serve), middle(ratios), ratios,
        middle(f["p50"] for f in found), middle(f["p99"] for f in found),
        (after[0] - before[0]) / (after[1] - before[1]),
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows as they stand in the documentation."""
    lines = [
        "| model | predict, samples/s | serve, requests/s | ratio | of the rounds | p50, ms | p99, ms | batch |",
        "|---|--:|--:|--:|---|--:|--:|--:|",
    ]
    for row in rows:
        spread = f"{min(row.ratios):.2f} – {max(row.ratios):.2f}"
        lines.append(
            f"| {row.case} | {row.predict:,.0f} | {row.serve:,.0f} | {row.ratio:.2f} | {spread} | "
            f"{row.p50 * 1e3:,.0f} | {row.p99 * 1e3:,.0f} | {row.batch:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES), help="names with commas between them")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    arguments = parser.parse_args()
    rows = [measure(case, arguments.ranks, arguments.rounds) for case in arguments.cases.split(",")]
    print(table(rows))
    told = {
        "machine": {"cores": os.cpu_count(), "cpu": platform.machine(), "torch": torch.__version__,
                    "python": platform.python_version()},
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    arguments.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
