"""Seconds to plan, capture included, on one core: `python -m benchmarks.search`.

Each case runs in a process of its own, from the import of the library to the best plan; the page of reasons, which
searches for other machines too, is timed apart. Nothing is run on the clusters.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.published import Shape, Tokens
from benchmarks.published import job as language_job
from shardwise.graph.garbage import uncollected
from shardwise.job import Job

RESULTS = Path(__file__).parent / "results" / "search.json"
LIMIT = 900


@dataclass(frozen=True)
class Row:
    """One case. Seconds of one core; `gap` is how much faster than the pick a plan of the space may be.

    `core_s` is how long this core took for ten million additions in Python right before: machines that others share do
    not always have the same speed.
    """

    case: str
    cluster: str
    batch: int
    capture_s: float
    search_s: float
    total_s: float
    goal_s: float
    explain_s: float
    shapes: int
    gap: float
    pick: str
    step_s: float
    bytes: float
    core_s: float


@dataclass(frozen=True)
class Images(Dataset[Any]):
    """Images and a class for each pixel; nothing is learned from them."""

    side: int

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(3, self.side, self.side, dtype=torch.bfloat16), torch.zeros(
            self.side, self.side, dtype=torch.long
        )


class UNet(nn.Module):
    """Five levels of two convolutions down and up, each level joined to the other side: layers unlike each other."""

    def __init__(self, width: int, levels: int, classes: int) -> None:
        super().__init__()
        widths = [width * 2**k for k in range(levels)]
        pairs = zip([3, *widths], widths, strict=False)
        self.down = nn.ModuleList(self._convolutions(a, b) for a, b in pairs)
        self.grow = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.up = nn.ModuleList(self._convolutions(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _convolutions(inputs: int, outputs: int) -> nn.Module:
        def one(a: int) -> list[nn.Module]:
            return [nn.Conv2d(a, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()]

        return nn.Sequential(*one(inputs), *one(outputs))

    def forward(self, image: Tensor) -> Tensor:
        sides = []
        for k, down in enumerate(self.down):
            image = down(image if k == 0 else F.max_pool2d(image, 2))
            sides.append(image)
        for grow, up, side in zip(self.grow, self.up, reversed(sides[:-1]), strict=True):
            image = up(torch.cat([grow(image), side], dim=1))
        result: Tensor = self.head(image)
        return result


def unet(batch: int) -> Job:
    """A U-Net of 124 million weights on images of 256 × 256."""
    return Job(
        model=lambda: UNet(128, 5, 16).to(torch.bfloat16), data=Images(256), optimizer=torch.optim.AdamW,
        loss=lambda scores, given: F.cross_entropy(scores.float(), given[1]), global_batch=batch, name="U-Net",
    )  # fmt: skip


def mixtral(batch: int) -> Job:
    """Mixtral 8x7B, by its configuration class."""

    def model() -> nn.Module:
        import transformers

        config = transformers.MixtralConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=4096,
            experts_implementation="grouped_mm", use_cache=False,
        )  # fmt: skip
        found: nn.Module = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
        return found

    return Job(model=model, data=Tokens(4096), optimizer=torch.optim.AdamW, global_batch=batch, name="Mixtral 8x7B")


def small(batch: int) -> Job:
    """The transformer of `benchmarks.runtime`."""
    from benchmarks.workloads import WORKLOADS

    return WORKLOADS["transformer"]().with_(global_batch=batch)


def llama(*sizes: int) -> Callable[[int], Job]:
    """A Llama of these layers, hidden size, heads, key-value heads and feed-forward width, at 8,192 tokens."""
    layers, hidden, heads, kv_heads, ffn = sizes
    shape = Shape("llama", layers, hidden, heads, kv_heads, ffn, 128256, 8192, False)
    return lambda batch: language_job(shape, batch)


LLAMA_8B = (32, 4096, 32, 8, 14336)
CASES: dict[str, tuple[Callable[[int], Job], str, int, float]] = {
    "transformer 12M": (small, "this machine, 2 ranks", 32, 2.0),
    "Llama 8B": (llama(*LLAMA_8B), "8x8xh100-sxm", 512, 10.0),
    "Llama 70B": (llama(80, 8192, 64, 8, 28672), "128x8xh100-sxm", 1024, 30.0),
    "Llama 405B": (llama(126, 16384, 128, 8, 53248), "2048x8xh100-sxm", 2048, 60.0),
    "Mixtral 8x7B": (mixtral, "32x8xh100-sxm", 1024, 60.0),
    "U-Net": (unet, "32x8xh100-sxm", 2048, 60.0),
    "Llama 8B, unlike devices": (llama(*LLAMA_8B), "4x8xh100-sxm,4x8xa100-80gb", 512, 60.0),
}


@uncollected()
def run(case: str, began: float) -> Row:
    """Plan one case in this process, which began at a time of `time.time`."""
    from shardwise.graph.graph import Graph
    from shardwise.machine.cluster import Cluster
    from shardwise.machine.here import here
    from shardwise.report.planned import title
    from shardwise.search.choose import search
    from shardwise.search.explain import explain
    from shardwise.search.strategies import Maker

    torch.set_num_threads(1)
    before = time.time()
    core = _core()
    began += time.time() - before
    make, name, batch, goal = CASES[case]
    job = make(batch)
    graph = Graph.of(job)
    captured = time.time()
    cluster = here(2) if name.startswith("this machine") else Cluster.load(name)
    maker = Maker(job, graph, cluster)
    found = search(maker, cluster)
    done = time.time()
    explain(maker, cluster)
    told = time.time()
    best = found.best or found.tight
    assert best is not None
    plan = title(best) if found.best else f"none fits, {title(best)} comes nearest"
    return Row(
        case, name, batch, captured - began, done - captured, done - began, goal, told - done, found.shapes, found.gap,
        plan, best.estimate.step, best.estimate.peak, core,
    )  # fmt: skip


def _core() -> float:
    """Seconds of ten million additions."""
    began = time.perf_counter()
    total = 0
    for n in range(10**7):
        total += n
    return time.perf_counter() - began


def main() -> int:
    """Run the cases, print their table, and write it as JSON."""
    began = time.time()
    parser = argparse.ArgumentParser(description="Seconds to plan, capture included, on one core.")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)} (all)")
    parser.add_argument("--here", action="store_true", help="in this process, and print JSON")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    strange = [case for case in arguments.cases if case not in CASES]
    if strange:
        parser.error(f"there is no case {strange[0]!r}; there are {', '.join(CASES)}")
    if arguments.here:
        print(json.dumps(asdict(run(arguments.cases[0], began))))
        return 0
    rows = []
    for case in arguments.cases or CASES:
        one = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.search", "--here", case]
        found = subprocess.run(command, env=one, stdout=subprocess.PIPE, text=True, timeout=LIMIT, check=True)
        row = Row(**json.loads(found.stdout))
        rows.append(row)
        met = "" if row.total_s <= row.goal_s else ", missed"
        print(f"{row.case} on {row.cluster}, {row.batch:,} samples a step: {row.pick}")
        searched = f"search {row.search_s:.1f} s of {row.shapes:,} shapes, gap {row.gap:.1%}"
        print(
            f"  {row.total_s:.1f} s of {row.goal_s:.0f} s{met}: capture {row.capture_s:.1f} s, {searched}; "
            f"reasons take {row.explain_s:.1f} s more; ten million additions {row.core_s:.2f} s",
            flush=True,
        )
    if not arguments.cases:
        machine = {"cores": 1, "processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        arguments.out.write_text(json.dumps({"machine": machine, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
