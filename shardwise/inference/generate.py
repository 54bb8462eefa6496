"""Generate: the tokens that follow prompts, on local ranks or a launch's; in the order of the prompts."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.engine.launch import Place, Ranks, joined, launched
from shardwise.engine.sent import Sent
from shardwise.engine.train import data_plan, fitting
from shardwise.errors import JobError
from shardwise.inference.claims import FOREVER, Claims, StoreQueue, await_others, in_order, leave, shared_store
from shardwise.inference.collect import agreed_number
from shardwise.inference.completion import PIECE, TOKENS, Wanted, complete
from shardwise.inference.limits import Demand
from shardwise.inference.prediction import Replica
from shardwise.inference.prompts import Prompts, checked
from shardwise.inference.sampling import Sampling
from shardwise.inference.steps import Steps, build_steps
from shardwise.job import Job
from shardwise.parallel.mesh import Mesh
from shardwise.plan.plan import Plan


def generate(
    job: Job,
    prompts: Prompts,
    plan: Plan | None = None,
    *,
    ranks: int | None = None,
    tokens: int = TOKENS,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    end: int | Iterable[int] | None = None,
    piece: int = PIECE,
    first: int = 0,
    dtype: torch.dtype | None = None,
    spec: str | None = None,
    log_dir: Path | None = None,
    threads: int | None = None,
) -> Generator[Tensor, None, None]:
    """The tokens that a job's model puts behind each prompt, in the order of the prompts, each prompt once.

    The model keeps a cache of keys and values, which is cut as the plan cuts its heads and its layers and never put
    together. It is a model whose `forward` takes `past_key_values` (transformers' interface of caches), or one that is
    called with `(tokens [samples, length], positions [length])` and writes its cache to buffers, whose first dim is
    `job.global_batch` samples. It returns logits, [samples, length, vocabulary].

    Up to `job.global_batch` prompts of one length go through the model together. Axes of the plan that split the batch
    make replicas, each of which takes prompts when it is free; the other axes split the model within a replica, where
    samples are not cut. What a plan says for training alone is not looked at, and neither are micro-batches.

    Local ranks and a launch's are used as by `predict`; under torchrun every rank has to iterate, and rank 0 gets the
    tokens.

    Args:
        job: its model, `global_batch`, `seed` and weights; data, loss and optimizer are not looked at.
        prompts: sequences of tokens.
        plan: how to split; None makes a replica of each of `ranks`.
        ranks: how many local ranks to start; None means those of the plan, or one for each device or core.
        tokens: the most that follow a prompt.
        temperature: what logits are divided by before the next token is drawn; None takes the likeliest.
        top_k: draws from so many of the likeliest tokens alone.
        top_p: draws from the fewest likeliest tokens whose probabilities make so much together.
        seed: of the draws, which depend on it, the prompt's number and the position alone; None means the job's.
        end: a token, or several, behind which nothing follows; it is the last that is given.
        piece: positions of a prompt that go in at once; what is left over goes by single ones.
        first: number of the first prompt, for a run that goes on behind others.
        dtype: runs everything in this dtype (float64 for proofs); None leaves the model's own.
        spec: where given, each rank loads the job from this SPEC instead of receiving it from this process.
        log_dir: gets a log per rank; None means a temporary directory that is kept only on failure.
        threads: of each rank; None means the cores divided by the ranks of this machine.

    Returns:
        an iterator over the new tokens of each prompt, [up to `tokens`], int64, on the CPU.

    Raises:
        UserError: a prompt, a number or the plan does not fit, or the model has no cache.
        RunError: a rank failed.
    """
    given = checked(prompts)
    for name, number in (("tokens", tokens), ("piece", piece)):
        if not isinstance(number, int) or number < 1:
            raise JobError(f"{name} must be a whole number of at least 1, but is {number!r}")
    ends = () if end is None else (end,) if isinstance(end, int) else tuple(end)
    sampling = Sampling(temperature, top_k, top_p, job.seed if seed is None else seed)
    task = _Task(Sent.of(job, spec), tuple(given), plan, Wanted(tokens, sampling, ends), piece, first, dtype)
    if launched() or dist.is_initialized():
        return _generate_joined(job, task, threads)
    plan = fitting(plan, ranks, job)
    return _generate_locally(replace(task, plan=plan), plan.ranks, threads, log_dir) if given else _nothing()


def _nothing() -> Generator[Tensor, None, None]:
    yield from ()


def groups(lengths: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """The numbers of prompts that go together: up to `size` of one length, in the order of their first ones."""
    found: list[list[int]] = []
    open_: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        if len(open_.get(length, ())) in (0, size):
            open_[length] = []
            found.append(open_[length])
        open_[length].append(number)
    return [tuple(group) for group in found]


# --- local ranks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What a rank is told."""

    job: Sent
    prompts: tuple[Tensor, ...]
    plan: Plan | None
    wanted: Wanted
    piece: int
    first: int
    dtype: torch.dtype | None


@dataclass(frozen=True)
class _Part:
    """Tokens on their way to the process that started the ranks: of which group, and of each of its prompts."""

    group: int
    tokens: list[list[int]]


def _generate_locally(
    task: _Task, ranks: int, threads: int | None, log_dir: Path | None
) -> Generator[Tensor, None, None]:
    sizes = [len(prompt) for prompt in task.prompts]
    with (
        Ranks(ranks, threads=threads, log_dir=log_dir) as live,
        closing(live.stream(_rank, task)) as parts,
    ):
        yield from _in_order(groups(sizes, task.job.settings["global_batch"]), ((p.group, p.tokens) for p in parts))


def _in_order(made: Sequence[tuple[int, ...]], parts: Iterator[tuple[int, list[list[int]]]]) -> Iterator[Tensor]:
    """Each prompt's tokens in the order of the prompts, from groups in any order."""
    each = (pair for group, tokens in parts for pair in zip(made[group], tokens, strict=True))
    return (torch.tensor(tokens, dtype=torch.int64) for tokens in in_order(each))


def _rank(task: _Task) -> Iterator[_Part]:
    with joined() as place:
        assert task.plan is not None
        work = _Work.on(task.job.loaded(), task, task.plan, place)
        claims = work.claims(shared_store("generate"), place)
        for group, tokens in work.completed(claims):
            if work.gives:
                yield _Part(group, tokens)


@dataclass(frozen=True, eq=False)
class _Work:
    """What a rank needs to complete prompts."""

    replica: Replica
    groups: list[tuple[int, ...]]
    gives: bool
    steps: Steps
    task: _Task

    @classmethod
    def on(cls, job: Job, task: _Task, plan: Plan, place: Place) -> _Work:
        sizes = [len(prompt) for prompt in task.prompts]
        # The last token is not put in.
        demand = Demand(
            longest=max(sizes) + task.wanted.tokens - 1,
            piece=min(task.piece, max(sizes)),
            largest=max(int(prompt.max()) for prompt in task.prompts),
        )
        steps = build_steps(job, plan, Mesh.build(plan.axes), demand, place.device, task.dtype)
        place.backend.reset_peak_memory()  # gives what was needed to build the model back
        replica = Replica.of(plan, place.rank)
        return cls(replica, groups(sizes, job.global_batch), replica.giver == place.rank, steps, task)

    def claims(self, store: dist.Store, place: Place) -> Claims:
        """Who takes which group; tokens are small, so that no group waits for room."""
        return Claims(StoreQueue(store), store, self.replica, place.rank, len(self.groups) + place.world)

    def completed(self, claims: Claims) -> Iterator[tuple[int, list[list[int]]]]:
        """The groups that this rank's replica takes, and the tokens of each prompt."""
        while 0 <= (number := claims.next()) < len(self.groups):
            group = self.groups[number]
            prompts = [self.task.prompts[i] for i in group]
            samples = [self.task.first + i for i in group]
            wanted = [self.task.wanted] * len(group)
            yield number, [t.tolist() for t in complete(self.steps, prompts, samples, wanted)]


# --- a launch's ranks -------------------------------------------------------------------------------------------------


def _generate_joined(job: Job, task: _Task, threads: int | None) -> Generator[Tensor, None, None]:
    with joined(threads=threads) as place:
        if not task.prompts:
            return
        work = _Work.on(job, task, task.plan or data_plan(place.world, job), place)
        store = shared_store(f"generate-{agreed_number(place)}")
        claims = work.claims(store, place)
        if place.rank == 0:
            with closing(_collected(work, claims, store)) as parts:
                try:
                    yield from _in_order(work.groups, parts)
                except GeneratorExit:
                    StoreQueue(store).stop()
                    claims.tell(-1)
                    await_others(store, place)
                    raise
            await_others(store, place)
            return
        for number, tokens in work.completed(claims):
            if work.gives:
                store.set(f"group/{number}", json.dumps(tokens))
        leave(store, place)


def _collected(work: _Work, claims: Claims, store: dist.Store) -> Generator[tuple[int, list[list[int]]], None, None]:
    """All groups, computed here or on the other ranks, as they come; on rank 0, which leads its replica."""
    left = set(range(len(work.groups)))
    for number, tokens in work.completed(claims):
        if work.gives:
            left.remove(number)
            yield number, tokens
        for other in [n for n in sorted(left) if store.check([f"group/{n}"])]:
            left.remove(other)
            yield other, json.loads(store.get(f"group/{other}"))
    for other in sorted(left):
        store.wait([f"group/{other}"], FOREVER)
        yield other, json.loads(store.get(f"group/{other}"))
