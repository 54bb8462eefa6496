"""The jobs whose plans are all measured: eight models unlike each other, of a size whose steps take 50 to 500 ms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.search import UNet
from benchmarks.workloads import (
    Block,
    Dense,
    Drawn,
    Embed,
    Head,
    Layered,
    Tokens,
    adamw,
    labels_loss,
    lstm,
    resnet,
)  # fmt: skip
from shardwise.job import Job


@dataclass(frozen=True)
class Texts(Drawn):
    """Tokens, which are their own labels."""

    length: int
    vocab: int

    def sample(self, draw: torch.Generator) -> dict[str, Tensor]:
        ids = torch.randint(self.vocab, (self.length,), generator=draw)
        return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Pictures(Drawn):
    """Pictures, and a class for each pixel."""

    side: int
    classes: int

    def sample(self, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        picture = torch.randn(3, self.side, self.side, generator=draw)
        return picture, torch.randint(self.classes, (self.side, self.side), generator=draw)


def small() -> Job:
    """A transformer of 3.3 million parameters: 4 layers of width 256, sequences of 128."""

    def model() -> nn.Module:
        return Layered(Embed(256, 128, 256), *(Block(256, 4) for _ in range(4)), Head(256, 256))

    data = Tokens(128, 256, 256)
    return Job(model=model, data=data, loss=labels_loss, optimizer=adamw, global_batch=8, clip_norm=1.0, name="small")


def wide() -> Job:
    """A transformer of 25.7 million parameters: 2 layers of width 1024, sequences of 32."""

    def model() -> nn.Module:
        return Layered(Embed(256, 32, 1024), *(Block(1024, 16) for _ in range(2)), Head(1024, 256))

    data = Tokens(32, 256, 256)
    return Job(model=model, data=data, loss=labels_loss, optimizer=adamw, global_batch=8, clip_norm=1.0, name="wide")


class Bag(nn.Module):
    """The embeddings of some ids, side by side."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, width)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.table(ids).flatten(1)
        return y


def embedding() -> Job:
    """A wide MLP of 7.4 million parameters behind a table of 6.4 million, 16 ids a sample."""

    def model() -> nn.Module:
        return Layered(Bag(100_000, 64), Dense(1024, 2048), Dense(2048, 2048), Dense(2048, 512), nn.Linear(512, 32))

    data = Tokens(16, 100_000, 32, pooled=True)
    return Job(model=model, data=data, loss=labels_loss, optimizer=adamw, global_batch=256, name="embedding")


def unet() -> Job:
    """A U-Net of 1.9 million parameters, 4 levels from 32 channels, pictures of 64 × 64."""

    def loss(output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output, batch[1])

    data = Pictures(64, 8)
    return Job(model=lambda: UNet(32, 4, 8), data=data, loss=loss, optimizer=adamw, global_batch=8, name="unet")


def bert() -> Job:
    """BERT of 3.7 million parameters, by its configuration class: 4 layers of width 256, sequences of 64."""

    def model() -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        return BertForMaskedLM(  # type: ignore[no-any-return]
            BertConfig(
                vocab_size=2048, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
                max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip

    return Job(model=model, data=Texts(64, 2048), optimizer=adamw, global_batch=16, name="bert")


def moe() -> Job:
    """Mixtral, by its configuration class: 2 layers of width 128 with 4 experts, 2 of them a token."""

    def model() -> nn.Module:
        from transformers import MixtralConfig, MixtralForCausalLM

        return MixtralForCausalLM(  # type: ignore[no-any-return]
            MixtralConfig(
                vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
                use_cache=False, experts_implementation="batched_mm",
            )
        )  # fmt: skip

    return Job(model=model, data=Texts(16, 1024), optimizer=adamw, global_batch=8, name="moe")


JOBS: dict[str, Callable[[], Job]] = {
    "small": small, "wide": wide, "resnet": resnet, "lstm": lstm, "embedding": embedding, "moe": moe, "unet": unet,
    "bert": bert,
}  # fmt: skip
