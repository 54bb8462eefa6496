"""Completion: prompts of one length and the tokens that follow them, on the ranks of one replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.inference.sampling import Sampling
from shardwise.inference.steps import Steps


@dataclass(frozen=True)
class Wanted:
    """What follows a prompt: at most so many tokens, chosen so, and nothing behind one that ends it."""

    tokens: int
    sampling: Sampling
    end: tuple[int, ...]


def complete(steps: Steps, prompts: Sequence[Tensor], samples: Sequence[int], wanted: Wanted) -> list[Tensor]:
    """The tokens that follow each prompt; on every rank of the replica.

    Args:
        prompts: of one length, [length] each.
        samples: the number of each prompt among all.
        wanted: what follows.
    """
    # A model with a cache for so many samples gets copies of the last.
    rows = [*prompts, *[prompts[-1]] * ((steps.fixed or 0) - len(prompts))]
    numbers = [*samples, *[samples[-1]] * (len(rows) - len(samples))]
    given = torch.stack(rows)
    at, length = 0, given.shape[1]
    steps.begin(len(rows))
    logits = None
    while at < length:
        # What is left of a prompt goes by single positions, which is right whatever the model keeps.
        size = steps.piece if at + steps.piece <= length else 1
        logits = steps.step(given[:, at : at + size], at)
        at += size
    found: list[Tensor] = []
    ended = torch.zeros(len(rows), dtype=torch.bool)
    for _ in range(wanted.tokens):
        if found:
            logits = steps.step(found[-1].unsqueeze(1), at)
            at += 1
        chosen = torch.empty(len(rows), dtype=torch.int64) if logits is None else None
        if logits is not None:
            chosen = wanted.sampling.choose(logits, numbers, at)
        assert chosen is not None
        found.append(steps.agree(chosen))
        ended |= torch.isin(found[-1].cpu(), torch.tensor(wanted.end, dtype=torch.int64))
        if bool(ended.all()):
            break
    rows_found = torch.stack([tokens.cpu() for tokens in found], 1)[: len(prompts)]
    return [_up_to_end(row, wanted.end) for row in rows_found]


def _up_to_end(row: Tensor, end: Sequence[int]) -> Tensor:
    """The tokens up to the first that ends a sample, and that one."""
    ends = torch.isin(row, torch.tensor(end, dtype=torch.int64)).nonzero()
    return row[: int(ends[0]) + 1].clone() if len(ends) else row.clone()
