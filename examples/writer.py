"""The language model of byte_lm.py as one that generates, as a SPEC: `shardwise generate examples/writer.py:job`.

A cache of keys and values is what is added: buffers, to which each layer writes at the positions that it is told. The
names of the weights are the same, so that WEIGHTS=file.safetensors may be what `shardwise train examples/byte_lm.py:job
--save file.safetensors` wrote; without it the weights are those before training. Tokens are bytes.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from byte_lm import CONTEXT, Block, ByteLM
from torch import Tensor, nn

import shardwise as sw

PROMPTS = 8
"""That go through the model together; the cache is for so many."""


class CachedBlock(Block):
    """The same block, which sees the positions before through its cache."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(PROMPTS, heads, CONTEXT, width // heads), persistent=False)
        self.keys: Tensor
        self.values: Tensor

    def step(self, x: Tensor, positions: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (w(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        self.keys[:, :, positions] = k
        self.values[:, :, positions] = v
        seen = torch.arange(CONTEXT, device=x.device) <= positions.unsqueeze(1)
        mixed = F.scaled_dot_product_attention(q, self.keys, self.values, seen)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        wide: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + wide


class Writer(ByteLM):
    """Bytes and their positions in, the logits of each next byte out."""

    def __init__(self, width: int = 128, heads: int = 4, layers: int = 2) -> None:
        super().__init__(width, heads, layers)
        self.blocks = nn.Sequential(*(CachedBlock(width, heads) for _ in range(layers)))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(ids) + self.place(positions)
        for block in self.blocks:
            x = block.step(x, positions)
        logits: Tensor = self.head(self.norm(x))
        return logits


def job() -> sw.Job:
    """What `shardwise generate` takes."""
    return sw.Job(model=Writer, data=[], global_batch=PROMPTS, weights=os.environ.get("WEIGHTS"), name="writer")  # type: ignore[arg-type]
