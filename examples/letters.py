"""A model that counts the letters and the digits of texts, as a SPEC: `shardwise serve examples/letters.py:job`.

Requests have texts, which the job's `collate` turns into the bytes that the model takes.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import Tensor, nn

import shardwise as sw

LENGTH = 64


class Letters(nn.Module):
    """For each byte whether it is a letter, and whether it is a digit, summed over a text."""

    def __init__(self) -> None:
        super().__init__()
        kinds = torch.zeros(256, 2)
        for kind, characters in enumerate((string.ascii_letters, string.digits)):
            kinds[list(characters.encode()), kind] = 1.0
        self.kinds = nn.Embedding(256, 2, _weight=kinds)

    def forward(self, codes: Tensor) -> dict[str, Tensor]:
        letters, digits = self.kinds(codes).sum(1).unbind(-1)
        return {"letters": letters, "digits": digits}


def collate(rows: list[dict[str, str]]) -> dict[str, Tensor]:
    """Texts as [texts, LENGTH] bytes, with zeros behind them."""
    codes = torch.zeros(len(rows), LENGTH, dtype=torch.int64)
    for row, code in zip(rows, codes, strict=True):
        text = row["text"].encode()
        if len(text) > LENGTH:
            raise ValueError(f"a text may have {LENGTH} bytes, but one has {len(text)}")
        code[: len(text)] = torch.tensor(list(text))
    return {"codes": codes}


def job() -> sw.Job:
    """The model, with a text to know what samples look like."""
    data: Any = [{"text": "abc123"}]
    return sw.Job(model=Letters, data=data, collate=collate, global_batch=16)
