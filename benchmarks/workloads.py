"""The jobs that are timed: a transformer, a ResNet, an LSTM and a wide MLP, in plain torch, with made-up data.

Every model is an `nn.Module` with a list of `layers`, so that the baseline of the pipeline can give each stage an equal
number of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from shardwise.job import Job

VOCAB, TAGS, LENGTH = 256, 64, 128


@dataclass(frozen=True)
class Drawn(Dataset[Any]):
    """Made-up samples, number `i` drawn from a generator seeded by `i`."""

    count: int = field(default=4096, kw_only=True)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        return self.sample(torch.Generator().manual_seed(i))

    def sample(self, draw: torch.Generator) -> Any:
        """One sample, every random number of it taken from `draw`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Tokens(Drawn):
    """Inputs, and a target for each; or one for all, where they are `pooled`."""

    length: int
    vocab: int
    classes: int
    pooled: bool = False

    def sample(self, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randint(self.vocab, (self.length,), generator=draw)
        return x, torch.randint(self.classes, () if self.pooled else (self.length,), generator=draw)


@dataclass(frozen=True)
class Features(Drawn):
    """Features of a shape, and a class."""

    shape: tuple[int, ...]
    classes: int

    def sample(self, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(self.shape, generator=draw), torch.randint(self.classes, (), generator=draw)


class Layered(nn.Module):
    """Layers, one after the other."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


# --- transformer ------------------------------------------------------------------------------------------------------


class Embed(nn.Module):
    """Bytes and their positions."""

    def __init__(self, vocab: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.places = nn.Embedding(length, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))
        return out


class Block(nn.Module):
    """Causal attention and an MLP, norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.depth = width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).view(b, s, -1, self.depth).transpose(1, 2) for f in (self.query, self.key, self.value))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(b, s, -1))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


class Head(nn.Module):
    """A norm and the logits of the next byte."""

    def __init__(self, width: int, vocab: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, vocab, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.logits(self.norm(x))
        return y


def _transformer() -> nn.Module:
    width, depth, heads = 512, 4, 8
    return Layered(Embed(VOCAB, LENGTH, width), *(Block(width, heads) for _ in range(depth)), Head(width, VOCAB))


# --- ResNet -----------------------------------------------------------------------------------------------------------


class Stem(nn.Module):
    """The first convolution and a pool, which leave a quarter of the height and of the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.norm(self.conv(x))), 3, stride=2, padding=1)


class Residual(nn.Module):
    """Two convolutions and a skip."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.skip: nn.Module | None = None
        if stride > 1 or before != after:
            self.skip = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + (x if self.skip is None else self.skip(x)))


class Pooled(nn.Module):
    """A mean over the picture, and the logits."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.logits = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.logits(x.mean((2, 3)))
        return y


def _resnet() -> nn.Module:
    layers: list[nn.Module] = [Stem(32)]
    before = 32
    for channels, stride in ((32, 1), (64, 2), (128, 2), (256, 2)):
        layers += [Residual(before, channels, stride), Residual(channels, channels, 1)]
        before = channels
    return Layered(*layers, Pooled(before, 10))


# --- LSTM -------------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """One LSTM layer."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(before, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lstm(x)[0]
        return y


def _lstm() -> nn.Module:
    return Layered(nn.Embedding(2048, 256), Recurrent(256, 512), Recurrent(512, 512), nn.Linear(512, TAGS))


# --- wide MLP ---------------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """A linear layer and what follows it."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.linear = nn.Linear(before, after)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x))


MLP_WIDTHS = (512, 2048, 2048, 1024, 1024, 512, 512, 256)


def _mlp() -> nn.Module:
    pairs = itertools.pairwise(MLP_WIDTHS)
    return Layered(*(Dense(a, b) for a, b in pairs), nn.Linear(MLP_WIDTHS[-1], 32))


# --- jobs -------------------------------------------------------------------------------------------------------------


def labels_loss(output: Tensor, batch: Any) -> Tensor:
    """Mean cross-entropy of a batch's second tensor."""
    return F.cross_entropy(output.flatten(0, -2), batch[1].flatten())


def adamw(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of all jobs."""
    return torch.optim.AdamW(params, lr=3e-4, fused=True)


def transformer() -> Job:
    """12.9 million parameters, 4 layers of width 512, bytes in sequences of 128; gradients clipped at norm 1."""
    data = Tokens(LENGTH, VOCAB, VOCAB)
    return Job(
        model=_transformer,
        data=data,
        loss=labels_loss,
        optimizer=adamw,
        global_batch=8,
        clip_norm=1.0,
        name="transformer",
    )


def resnet() -> Job:
    """2.8 million parameters, ResNet-18 with half its channels (He et al. 2016), 96 x 96 pictures."""
    data = Features((3, 96, 96), 10)
    return Job(model=_resnet, data=data, loss=labels_loss, optimizer=adamw, global_batch=32, name="resnet")


def lstm() -> Job:
    """4.2 million parameters, a tagger of two LSTM layers of width 512, sequences of 64; gradients clipped at 1."""
    data = Tokens(64, 2048, TAGS)
    return Job(model=_lstm, data=data, loss=labels_loss, optimizer=adamw, global_batch=32, clip_norm=1.0, name="lstm")


def mlp() -> Job:
    """9.3 million parameters, a tower of 8 linear layers from 2048 down to 256."""
    return Job(model=_mlp, data=Features((512,), 32), loss=labels_loss, optimizer=adamw, global_batch=256, name="mlp")


WORKLOADS: dict[str, Callable[[], Job]] = {f.__name__: f for f in (transformer, resnet, lstm, mlp)}
