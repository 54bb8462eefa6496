"""Completion: prompts of one length and the tokens that follow them, on the ranks of one replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.inference.sampling import Sampling
from shardwise.inference.steps import Steps

TOKENS, PIECE = 64, 32
"""Tokens that follow a prompt, and positions of it that go in at once, where nobody says how many."""


@dataclass(frozen=True)
class Wanted:
    """What follows a prompt: at most so many tokens, chosen so, and nothing behind one that ends it."""

    tokens: int
    sampling: Sampling
    end: tuple[int, ...]


def complete(steps: Steps, prompts: Sequence[Tensor], samples: Sequence[int], wanted: Sequence[Wanted]) -> list[Tensor]:
    """The tokens that follow each prompt; on every rank of the replica.

    Args:
        prompts: of one length, [length] each.
        samples: the number of each prompt among all.
        wanted: what follows each prompt.
    """
    rows = [_Row(sample, want) for sample, want in zip(samples, wanted, strict=True)]
    # A model with a cache for so many samples gets copies of the last.
    more = max((steps.fixed or 0) - len(prompts), 0)
    rows += [rows[-1]] * more
    given = torch.stack([*prompts, *[prompts[-1]] * more])
    at, length = 0, given.shape[1]
    steps.begin(len(rows))
    logits = None
    while at < length:
        # What is left of a prompt goes by single positions, which is right whatever the model keeps.
        size = steps.piece if at + steps.piece <= length else 1
        logits = steps.step(given[:, at : at + size], at)
        at += size
    found: list[Tensor] = []
    going = torch.ones(len(rows), dtype=torch.bool)
    most = torch.tensor([row.wanted.tokens for row in rows])
    while bool(going.any()):
        if found:
            logits = steps.step(found[-1].unsqueeze(1), at)
            at += 1
        chosen = torch.empty(len(rows), dtype=torch.int64) if logits is None else _choose(logits, rows, at)
        found.append(steps.agree(chosen))
        ended = [row.ends(token) for row, token in zip(rows, found[-1].tolist(), strict=True)]
        going &= (most > len(found)) & ~torch.tensor(ended)
    kept = torch.stack([tokens.cpu() for tokens in found], 1)[: len(prompts)]
    return [row.cut(tokens) for row, tokens in zip(rows, kept, strict=False)]


@dataclass(frozen=True)
class _Row:
    """A prompt's number among all, and what follows it."""

    number: int
    wanted: Wanted

    def ends(self, token: int) -> bool:
        return token in self.wanted.end

    def cut(self, tokens: Tensor) -> Tensor:
        """The tokens that are wanted: up to the first that ends a sample, and that one."""
        tokens = tokens[: self.wanted.tokens]
        ends = torch.isin(tokens, torch.tensor(self.wanted.end, dtype=torch.int64)).nonzero()
        return tokens[: int(ends[0]) + 1].clone() if len(ends) else tokens.clone()


def _choose(logits: Tensor, rows: Sequence[_Row], at: int) -> Tensor:
    """The next token of each row, [samples]; at once where all are chosen alike."""
    first = rows[0].wanted.sampling
    if all(row.wanted.sampling == first for row in rows):
        return first.choose(logits, [row.number for row in rows], at)
    each = zip(rows, logits.split(1), strict=True)
    return torch.cat([row.wanted.sampling.choose(one, [row.number], at) for row, one in each])
