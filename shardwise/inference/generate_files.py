"""Generate from file to file: the tokens that follow prompts, a line for each, which a killed run goes on with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from shardwise.engine.progress import SampleProgress
from shardwise.engine.train import data_plan, fitting
from shardwise.errors import FileError
from shardwise.files.formats import Head, Part
from shardwise.files.outputs import ONE
from shardwise.inference.completion import PIECE, TOKENS
from shardwise.inference.generate import generate
from shardwise.inference.identity import settings_of
from shardwise.inference.sampling import Sampling
from shardwise.inference.writing import Writing, writing
from shardwise.job import Job
from shardwise.plan.plan import Plan

_NONE = -1
"""Fills rows of a part that are shorter than others; no token is below 0."""


@dataclass(frozen=True)
class Generated:
    """What a run wrote.

    Attributes:
        output: the file; None where the rows went elsewhere.
        prompts: of which there are tokens.
        before: how many of them an earlier run had written.
        tokens: that this run generated.
        seconds: of this run, in which its ranks start, or join, and load the model.
        plan: that it ran by, as text.
        ranks: that computed.
    """

    output: str | None
    prompts: int
    before: int
    tokens: int
    seconds: float
    plan: str
    ranks: int

    @property
    def rate(self) -> float:
        """New tokens per second of this run."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def text(self) -> str:
        """One line of it."""
        gone_on = f" ({self.before:,} of them by an earlier run)" if self.before else ""
        rate = f"{self.rate:,.{0 if self.rate >= 100 else 1}f} tokens/s with the loading of the model"
        made = f"{_counted(self.prompts, 'prompt')}{gone_on}, {_counted(self.tokens, 'new token')}"
        told = f"{made} in {self.seconds:.1f} s, {rate}"
        return told if self.output is None else f"{told}: {self.output}"

    def to_dict(self) -> dict[str, Any]:
        """The same as numbers and strings."""
        return {**asdict(self), "rate": self.rate}


class _Rows:
    """The file: a line for each prompt, a list of tokens."""

    def check(self, heads: Sequence[Head], one: str) -> None:
        pass

    def write(self, file: IO[bytes], parts: Sequence[Part]) -> None:
        for part in parts:
            for row in part.read()[ONE].tolist():
                file.write(json.dumps([token for token in row if token != _NONE]).encode() + b"\n")


def generate_file(
    job: Job,
    prompts: Sequence[Tensor],
    output: Path | Callable[[list[int]], object],
    *,
    run: Mapping[str, Any],
    plan: Plan | None = None,
    ranks: int | None = None,
    tokens: int = TOKENS,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    end: Sequence[int] = (),
    piece: int = PIECE,
    spec: str | None = None,
) -> Generated | None:
    """Writes the tokens that follow each prompt to a file, in the order of the prompts.

    Under torchrun every rank has to call it; rank 0 writes the file, and the others get None.

    Args:
        output: a .jsonl file, which appears at the end and whole; or what is given each prompt's tokens as they come.
        run: what makes this run another than others, beside the job's settings and how tokens are chosen; an
            unfinished run is gone on with only where it is the same.

    The other arguments are those of `generate`.

    Raises:
        FileError: the file is of another type, or cannot be written.
        UserError, RunError: as `generate`.
    """
    file = output if isinstance(output, Path) else None
    if file is not None and file.suffix != ".jsonl":
        raise FileError(f"{file} has the type {file.suffix!r}, but rows may be of unlike lengths; name a .jsonl file")
    sampling = Sampling(temperature, top_k, top_p, job.seed if seed is None else seed)
    chosen = {**asdict(sampling), "tokens": tokens, "end": list(end)}
    began = time.perf_counter()
    with writing(file, {**settings_of(job), **chosen, **run}, _Rows()) as to:
        if to.place is not None:
            plan = plan or data_plan(to.place.world, job)
        else:
            plan = fitting(plan, ranks, job)
        if to.gets:
            print(_first_line(job, plan, prompts, tokens, sampling), flush=True)
        rows = generate(
            job, prompts[to.before :], plan, ranks=ranks, tokens=tokens, **asdict(sampling), end=end, piece=piece,
            first=to.before, spec=spec,
        )  # fmt: skip
        with closing(rows):
            shown = file is not None and to.gets
            line = SampleProgress(len(prompts), to.before, enabled=shown, unit="prompts")
            made = 0
            for row in _given(rows, output, to, tokens):
                made += len(row)
                line(1)
            line.end()
        if to.outputs is not None:
            to.outputs.finish()
    if not to.gets:
        return None
    seconds = time.perf_counter() - began
    name = str(file) if file is not None else None
    return Generated(name, len(prompts), to.before, made, seconds, plan.text(), plan.ranks)


def _given(
    rows: Iterator[Tensor], output: Path | Callable[[list[int]], object], to: Writing, tokens: int
) -> Iterator[Tensor]:
    """The rows, each once it is where it goes."""
    for row in rows:
        if to.outputs is not None:
            to.outputs.add(torch.cat([row, row.new_full((tokens - len(row),), _NONE)]).unsqueeze(0))
        elif not isinstance(output, Path):
            output(row.tolist())
        yield row


def _first_line(job: Job, plan: Plan, prompts: Sequence[Tensor], tokens: int, sampling: Sampling) -> str:
    lengths = [len(prompt) for prompt in prompts]
    least, most = min(lengths, default=0), max(lengths, default=0)
    of = f" of {least} to {most} tokens" if most > least else f" of {_counted(most, 'token')}" if lengths else ""
    ranks = f"{plan.ranks} ranks ({plan.title()})" if plan.ranks > 1 else "one rank"
    how = "the likeliest"
    if sampling.temperature is not None:
        given = {"temperature": sampling.temperature, "top-k": sampling.top_k, "top-p": sampling.top_p}
        given["seed"] = sampling.seed
        how = "drawn with " + ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
    return (
        f"{job.title()} generates on {ranks}: {_counted(len(prompts), 'prompt')}{of}, "
        f"up to {_counted(tokens, 'new token')} behind each, {how}"
    )


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
