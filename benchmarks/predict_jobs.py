"""The jobs whose inference is timed: pictures by a convolutional net, text by a transformer encoder; real data."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from shardwise.job import Job


class Digits(Dataset[Tensor]):
    """scikit-learn's handwritten digits, enlarged to 3 x 32 x 32, over and over."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Tensor:
        small = _digits()[i % len(_digits())]
        return small.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(3, 32, 32)


@cache
def _digits() -> Tensor:
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images).float() / 16


class Text(Dataset[Tensor]):
    """Windows of Python's documentation, as bytes, over and over."""

    def __init__(self, count: int, length: int = 128) -> None:
        self._count, self._length = count, length

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Tensor:
        start = i * self._length % (len(_text()) - self._length)
        return _text()[start : start + self._length]


@cache
def _text() -> Tensor:
    from pydoc_data.topics import topics

    return torch.tensor(list("\n".join(topics.values()).encode()))


def convnet() -> nn.Module:
    """A convolutional net for the digits."""
    layers: list[nn.Module] = []
    for ins, outs, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class Encoder(nn.Module):
    """A transformer encoder over bytes, its last states averaged."""

    def __init__(self, width: int = 256, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, norm_first=True) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x.mean(1)


def images(chunks: int) -> Job:
    """Chunks of 32 pictures."""
    return Job(model=convnet, data=Digits(32 * chunks), global_batch=32, name="images")


def text(chunks: int) -> Job:
    """Chunks of 8 windows."""
    return Job(model=Encoder, data=Text(8 * chunks), global_batch=8, name="text")
