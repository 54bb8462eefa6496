"""A byte-level language model on the text files you name, as a SPEC: `shardwise train examples/byte_lm.py:job`.

TEXT=path/to/file.txt chooses the text; without it, it learns from the Zen of Python and this file.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import shardwise as sw

CONTEXT = 64


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (w(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        wide: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + wide


class ByteLM(nn.Module):
    """Bytes in, the logits of each next byte out."""

    def __init__(self, width: int = 128, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.place = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.embed(ids) + self.place(positions))))
        return logits


class Text(Dataset[dict[str, Tensor]]):
    """Every window of CONTEXT bytes of a text, with the bytes that follow."""

    def __init__(self, text: bytes) -> None:
        self.bytes = torch.tensor(list(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return max(0, len(self.bytes) - CONTEXT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.bytes[index : index + CONTEXT + 1].long()
        return {"ids": window[:-1], "labels": window[1:]}


def text() -> bytes:
    """The file that TEXT names, or a text that is always there."""
    if "TEXT" in os.environ:
        return Path(os.environ["TEXT"]).read_bytes()
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13").encode() + Path(__file__).read_bytes()


def loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy, in nats a byte."""
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def job() -> sw.Job:
    """What `shardwise train`, `plan` and `verify` take."""
    return sw.Job(model=ByteLM, data=Text(text()), loss=loss, global_batch=16, clip_norm=1.0, name="byte-lm")
