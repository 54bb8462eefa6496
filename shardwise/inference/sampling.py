"""Sampling: the next token from its logits, the same one for the same seed whatever the split and the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.errors import JobError
from shardwise.graph import random

_DRAW = 3
"""Tells the random numbers of generation from those of training (0), evaluation (1) and prediction (2)."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: what logits are divided by before a draw; None takes the likeliest token.
        top_k: draws from so many of the likeliest alone.
        top_p: draws from the fewest likeliest whose probabilities make so much together (Holtzman et al. 2020).
        seed: of the draws.

    Raises:
        JobError: a number is out of range, or says how to draw where nothing is drawn.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature is None and (self.top_k is not None or self.top_p is not None):
            raise JobError(
                "top_k and top_p say what to draw from, but nothing is drawn without a temperature; "
                "give one (1.0 is the model's own), or leave them out"
            )
        if self.temperature is not None and not self.temperature > 0:
            raise JobError(f"temperature must be above 0, but is {self.temperature!r}; None takes the likeliest")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise JobError(f"top_k must be a whole number of at least 1, but is {self.top_k!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise JobError(f"top_p must be above 0 and at most 1, but is {self.top_p!r}")

    def choose(self, logits: Tensor, samples: Sequence[int], position: int) -> Tensor:
        """The tokens at a position, [samples].

        Args:
            logits: [samples, vocabulary].
            samples: the number of each sample among all, which its draws depend on.
            position: the place in the sequence that the tokens get.
        """
        if self.temperature is None:
            return logits.argmax(-1)
        scaled = logits.cpu().double() / self.temperature
        values, tokens = scaled.sort(dim=-1, descending=True, stable=True)
        chances = values.softmax(-1)
        if self.top_k is not None:
            chances[:, self.top_k :] = 0
            chances /= chances.sum(-1, keepdim=True)
        if self.top_p is not None:
            before = chances.cumsum(-1) - chances
            # The likeliest is always there: nothing is before it.
            chances[before >= self.top_p] = 0
        # In the order of the vocabulary: rounding moves the borders by as much, and swaps no two tokens.
        sums = torch.zeros_like(chances).scatter(-1, tokens, chances).cumsum(-1)
        drawn = torch.stack([self._uniform(sample, position) for sample in samples]).unsqueeze(-1) * sums[:, -1:]
        return torch.searchsorted(sums, drawn, right=True).squeeze(-1).to(logits.device)

    def _uniform(self, sample: int, position: int) -> Tensor:
        """A number in [0, 1) of 48 bits."""
        at = torch.tensor([2 * position, 2 * position + 1])
        high, low = random.uniform_at(at, random.stream(self.seed, sample, _DRAW), torch.float64)
        found: Tensor = high + low * 2.0**-24
        return found
