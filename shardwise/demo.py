"""The demo: a small language model on Python's own texts, trained on one rank and by every strategy, with evidence.

Its job is a SPEC of its own: `shardwise.demo:job`.
"""

from __future__ import annotations

import math
import platform
import sysconfig
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from shardwise.engine.launch import Ranks, joined
from shardwise.engine.progress import Progress, median
from shardwise.engine.train import Result, batches, run_steps, train_engine
from shardwise.errors import LaunchError, UserError
from shardwise.job import Batch, Job
from shardwise.machine.backend import cores
from shardwise.measure.communication import communication_share
from shardwise.plan.plan import Plan
from shardwise.report.html import page
from shardwise.report.terminal import Measured, comparison, duration, table

CONTEXT = 128
WIDTH, HEADS, LAYERS = 192, 6, 3
BATCH = 16
_CORPUS = 4_000_000  # bytes of text that are read at most
_HELD_OUT = 50  # one window in so many is kept for evaluation
_EVALUATED = 4  # global batches of them
_PROFILED = 4  # steps looked at for communication
_ROUND = 8  # steps of one turn of the timing
_ROUNDS = 2
_PROMPT = "def main():\n"


# --- the job ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and beside a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        samples, length, width = x.shape
        shape = (samples, length, self.heads, width // self.heads)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(width, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(samples, length, width))
        wide: Tensor = F.gelu(self.up(self.norm2(x)))
        out: Tensor = x + self.down(wide)
        return out


class ByteLM(nn.Module):
    """A decoder-only transformer over bytes: ids (samples, positions) in, logits (samples, positions, 256) out."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, layers: int = LAYERS, context: int = CONTEXT) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.place = nn.Parameter(torch.randn(context, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place[: ids.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


@dataclass(frozen=True, eq=False)
class Windows(Dataset[dict[str, Tensor]]):
    """Windows of `context` bytes of a text, one after another, each with the bytes that follow its bytes."""

    text: Tensor
    starts: tuple[int, ...]
    context: int = CONTEXT

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.text[self.starts[index] : self.starts[index] + self.context + 1].long()
        return {"ids": window[:-1], "labels": window[1:]}


@cache
def corpus() -> bytes:
    """The first megabytes of Python's own documentation and library source, in a fixed order.

    Raises:
        UserError: this Python comes without the source of its library.
    """
    parts = []
    try:
        from pydoc_data.topics import topics

        parts = [topics[name].encode() for name in sorted(topics)]
    except ImportError:
        pass  # some systems leave it out
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts.append(path.read_bytes())
        if sum(map(len, parts)) >= _CORPUS:
            break
    text = b"\n\n".join(parts)[:_CORPUS]
    if len(text) < 100_000:
        raise UserError(
            f"the demo reads the source of Python's library, but this Python has {len(text):,} bytes of it; "
            "use a Python that is installed with its library as .py files"
        )
    return text


def windows(*, held_out: bool = False, context: int = CONTEXT) -> Windows:
    """The windows that are trained on, or those that are kept for evaluation."""
    text = torch.frombuffer(bytearray(corpus()), dtype=torch.uint8)
    starts = range(0, len(text) - context - 1, context)
    return Windows(text, tuple(s for i, s in enumerate(starts) if (i % _HELD_OUT == 0) == held_out), context)


def loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy in nats a byte."""
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def optimizer(params: Iterable[nn.Parameter]) -> Any:
    """AdamW with ten steps of warm-up."""
    adam = torch.optim.AdamW(params, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    return adam, torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1.0, (step + 1) / 10))


def job() -> Job:
    """The demo's job."""
    return Job(
        model=ByteLM, data=windows(), loss=loss, optimizer=optimizer, global_batch=BATCH, clip_norm=1.0, name="byte-lm"
    )


# --- on a rank --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trained:
    """What one rank says after training."""

    result: Result
    held_out: float
    communication: float
    sample: str


def _train(plan: Plan, steps: int, label: str, terminal: bool, sample: bool) -> _Trained:
    whole = job()
    with joined() as place:
        progress = Progress(steps, enabled=place.rank == 0, terminal=terminal, label=label)
        engine, result = train_engine(whole, plan, steps, progress, place)
        held_out = engine.evaluate(_evaluation(whole))
        state = engine.state_dict() if sample else {}
        text = write(whole, state) if sample and place.rank == 0 else ""
        communication = communication_share(engine, batches(whole), _PROFILED, place.backend)
    return _Trained(result, held_out, communication, text)


def _time(plan: Plan, steps: int) -> list[float]:
    """Seconds of `steps` steps; two more before them are not counted."""
    from shardwise.engine.engine import parallelize

    whole = job()
    with joined() as place:
        return run_steps(parallelize(whole, plan), batches(whole), steps + 2, place.backend).seconds[2:]


def _evaluation(whole: Job) -> Iterator[Batch]:
    kept = whole.with_(data=windows(held_out=True))
    return (kept.batch(range(i * BATCH, (i + 1) * BATCH)) for i in range(_EVALUATED))


def write(whole: Job, state: dict[str, Tensor], prompt: str = _PROMPT, length: int = 320) -> str:
    """Text that a model with these weights writes after `prompt`, on one device."""
    module = whole.build()
    module.load_state_dict(state)
    draw = torch.Generator().manual_seed(whole.seed)
    ids = list(prompt.encode())
    with torch.no_grad():
        for _ in range(length):
            logits = module(torch.tensor([ids[-CONTEXT:]]))[0, -1]
            ids.append(int(torch.multinomial((logits / 0.7).softmax(0), 1, generator=draw)))
    return bytes(ids).decode(errors="replace")[len(prompt) :]


# --- the whole demo ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What the demo found."""

    runs: tuple[Measured, ...]
    chosen: Measured
    notes: tuple[str, ...]
    sample: str
    page: Path
    elapsed: float

    def to_dict(self) -> dict[str, object]:
        """The same as numbers, strings, lists and dicts."""
        return {
            "chosen": self.chosen.strategy,
            "runs": [run.to_dict(self.runs[0]) for run in self.runs],
            "notes": list(self.notes),
            "sample": self.sample,
            "page": str(self.page),
            "seconds": self.elapsed,
        }


def demo(*, ranks: int = 2, steps: int = 60, out: Path = Path("shardwise-demo"), terminal: bool = False) -> Outcome:
    """Trains the demo's job on one rank and by every strategy on `ranks`, prints what it measures and writes the page.

    Args:
        out: the folder that gets `report.html`.
        terminal: whether what is printed goes to a terminal, so that a line can be rewritten.

    Raises:
        UserError: the folder cannot be written, or there is nothing to read.
    """
    began = time.monotonic()
    _writable(out)
    whole = job()
    ways, chosen = _ways(whole, ranks)
    _introduce(whole, ways[chosen], ranks)
    threads = max(1, cores() // ranks)
    runs, sample = [], ""
    for index, way in enumerate(ways):
        if way.plan is None:
            runs.append(way)
            continue
        label = f"{way.name:<{max(len(w.name) for w in ways)}}  "
        with Ranks(way.plan.ranks, threads=threads) as pool:
            answers = pool.run(_train, way.plan, steps, label, terminal, index == chosen)
        runs.append(_measured(way, answers))
        sample = answers[0].sample or sample
    print("\ntiming: every way takes turns, so that all meet the same machine ...", flush=True)
    runs, alone = _timed(runs, ranks, threads)
    notes = _notes(runs, ranks, threads, alone)
    print(f"\n{table(comparison(runs))}\n")
    print(*notes, sep="\n")
    for run in runs:
        if run.plan is None:
            print(f"{run.name} does not apply: {run.why}")
    print(f"\nWhat the model writes after {_PROMPT.strip()!r}:\n")
    print("\n".join("    " + line for line in (_PROMPT + sample).splitlines()))
    target = out / "report.html"
    about = _about(whole, steps, threads)
    written = (_PROMPT, sample)
    text = page(
        runs, title="Shardwise demo", about=about, chosen=runs[chosen], notes=notes, sample=written, facts=_facts()
    )
    target.write_text(text, encoding="utf-8")
    elapsed = time.monotonic() - began
    print(f"\nThe page with the plots: {target}  ({elapsed:.0f} s)")
    return Outcome(tuple(runs), runs[chosen], tuple(notes), sample, target, elapsed)


def _writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.html").touch()
    except OSError as error:
        raise LaunchError(f"{out} cannot be written to: {error.strerror}; give another folder with --out") from error


def _ways(whole: Job, ranks: int) -> tuple[list[Measured], int]:
    """What will run, one rank first, and which of it the planner chose."""
    from shardwise.graph.graph import Graph
    from shardwise.search.choose import choose
    from shardwise.search.strategies import strategies

    graph = Graph.of(whole)
    best = choose(whole, ranks, graph)[0]
    ways = [Measured("one rank", "one", "", Plan())]
    for found in strategies(whole, ranks, graph):
        ways.append(Measured(f"{found.strategy}, {ranks} ranks", found.strategy, found.reason, found.plan))
    for index, way in enumerate(ways):
        if index and way.plan == best.plan:
            ways[index] = replace(way, why=best.reason)
            return ways, index
    return [*ways, Measured(f"chosen, {ranks} ranks", "chosen", best.reason, best.plan)], len(ways)


def _measured(way: Measured, answers: list[_Trained]) -> Measured:
    fullest = max(range(len(answers)), key=lambda i: answers[0].result.peak_memory[i])
    result = answers[0].result
    return replace(
        way,
        seconds=result.step_seconds,
        communication=sum(a.communication for a in answers) / len(answers),
        memory=result.peak_memory[fullest],
        memory_before=result.memory_before[fullest],
        losses=result.losses,
        held_out=answers[0].held_out,
        traffic=result.traffic,
    )


def _timed(runs: list[Measured], ranks: int, threads: int) -> tuple[list[Measured], float]:
    """The runs with the median of steps made in turns: A B C A B C; and that of one rank with every core."""
    seconds: list[list[float]] = [[] for _ in runs]
    alone: list[float] = []
    with ExitStack() as stack:
        pools = {n: stack.enter_context(Ranks(n, threads=threads)) for n in {1, ranks}}
        every = stack.enter_context(Ranks(1, threads=cores())) if cores() > threads else None
        for _ in range(_ROUNDS):
            for index, run in enumerate(runs):
                if run.plan is not None:
                    seconds[index] += pools[run.plan.ranks].run(_time, run.plan, _ROUND)[0]
            if every is not None:
                alone += every.run(_time, Plan(), _ROUND)[0]
    found = [replace(run, seconds=median(times)) if times else run for run, times in zip(runs, seconds, strict=True)]
    return found, median(alone) if alone else math.nan


def _introduce(whole: Job, chosen: Measured, ranks: int) -> None:
    assert chosen.plan is not None
    count = sum(p.numel() for p in whole.build("meta").parameters())
    print(f"A byte-level transformer of {count / 1e6:.1f} million parameters learns from Python's documentation and")
    print(f"library, {len(corpus()) / 1e6:.1f} MB of text. The plan for {ranks} ranks:\n")
    print("\n".join("    " + line for line in chosen.plan.text().splitlines()))
    print(f"\nWhy: {chosen.why}\n", flush=True)


def _notes(runs: list[Measured], ranks: int, threads: int, alone: float) -> list[str]:
    spread = [run.held_out for run in runs if run.plan is not None]
    each = "one thread" if threads == 1 else f"{threads} threads"
    notes = [
        f"Each rank stands for a device and has {each}. Loss on text that was kept back: {min(spread):.4f}"
        + (f" to {max(spread):.4f}." if max(spread) - min(spread) >= 5e-5 else " in every row.")
    ]
    if math.isfinite(alone):
        notes.append(f"One rank with all {cores()} cores of this machine takes {duration(alone)} a step.")
    return notes


def _about(whole: Job, steps: int, threads: int) -> str:
    count = sum(p.numel() for p in whole.build("meta").parameters())
    return (
        f"A byte-level decoder-only transformer ({LAYERS} layers, width {WIDTH}, {count / 1e6:.1f} million parameters) "
        f"makes {steps} updates of {BATCH} windows of {CONTEXT} bytes of Python's own documentation and library, once "
        f"on one rank and once for each way to split it. All ranks run on the processors of one machine, {threads} "
        f"thread{'s' * (threads != 1)} each, and talk over its loopback. Times are medians of steps made in turns."
    )


def _facts() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("shardwise")
    except PackageNotFoundError:
        own = "from source"
    return {
        "shardwise": own,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "processor": f"{platform.machine()}, {cores()} cores",
    }
