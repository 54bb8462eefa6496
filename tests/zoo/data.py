"""Small deterministic datasets: sample `i` is drawn from a generator seeded by the dataset's seed and `i`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

Sample = dict[str, Tensor]

PAD, BOS, EOS, MASK = 0, 1, 2, 3
FIRST_ID = 4
"""Token ids below this one are special and are never drawn as content."""

IGNORE = -100


def _between(low: int, high: int, draw: Generator) -> int:
    """A whole number from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, (), generator=draw))


def _tokens(vocab: int, length: int, draw: Generator) -> Tensor:
    return torch.randint(FIRST_ID, vocab, (length,), generator=draw)


def _prefix_mask(length: int, kept: int) -> Tensor:
    """`kept` ones, then zeros up to `length`."""
    return (torch.arange(length) < kept).long()


@dataclass(frozen=True, kw_only=True)
class Seeded(Dataset[Any]):
    """A map-style dataset whose samples depend on `seed` and the index alone."""

    count: int = 64
    seed: int = 25
    """With 25 no split of the first 8 samples in 2 or 4 has equal numbers of labels."""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.sample(Generator().manual_seed(self.seed * 1_000_003 + index))

    def sample(self, draw: Generator) -> Any:
        """One sample, every random number of it taken from `draw`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class CausalTokens(Seeded):
    """Ids and labels of a causal LM; a prompt of its own length per sample has no labels."""

    vocab: int = 128
    length: int = 16
    padded: bool = False

    def sample(self, draw: Generator) -> Sample:
        ids = _tokens(self.vocab, self.length, draw)
        labels = ids.clone()
        labels[: _between(0, self.length // 2, draw)] = IGNORE
        if not self.padded:
            return {"input_ids": ids, "labels": labels}
        mask = _prefix_mask(self.length, _between(self.length * 3 // 4, self.length, draw))
        return {
            "input_ids": ids.masked_fill(mask == 0, PAD),
            "attention_mask": mask,
            "labels": labels.masked_fill(mask == 0, IGNORE),
        }


@dataclass(frozen=True, kw_only=True)
class MaskedTokens(Seeded):
    """Ids, ragged padding and labels of a masked LM; one to four positions of a sample have a label."""

    vocab: int = 128
    length: int = 16

    def sample(self, draw: Generator) -> Sample:
        kept = _between(self.length // 2, self.length, draw)
        mask = _prefix_mask(self.length, kept)
        ids = _tokens(self.vocab, self.length, draw).masked_fill(mask == 0, PAD)
        hidden = torch.randperm(kept, generator=draw)[: _between(1, 4, draw)]
        labels = torch.full_like(ids, IGNORE)
        labels[hidden] = ids[hidden]
        ids[hidden] = MASK
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True, kw_only=True)
class Seq2SeqTokens(Seeded):
    """Source ids with ragged padding, and target labels of ragged length."""

    vocab: int = 128
    length: int = 16
    target_length: int = 16

    def sample(self, draw: Generator) -> Sample:
        mask = _prefix_mask(self.length, _between(self.length // 2, self.length, draw))
        kept = _between(self.target_length // 2, self.target_length, draw)
        labels = _tokens(self.vocab, self.target_length, draw)
        labels[kept - 1] = EOS
        labels[kept:] = IGNORE
        return {
            "input_ids": _tokens(self.vocab, self.length, draw).masked_fill(mask == 0, PAD),
            "attention_mask": mask,
            "labels": labels,
        }


@dataclass(frozen=True, kw_only=True)
class TaggedTokens(Seeded):
    """Token ids and one tag per token, both padded to `length`."""

    vocab: int = 128
    tags: int = 16
    length: int = 16

    def sample(self, draw: Generator) -> Sample:
        mask = _prefix_mask(self.length, _between(self.length // 2, self.length, draw))
        tags = torch.randint(0, self.tags, (self.length,), generator=draw)
        return {
            "tokens": _tokens(self.vocab, self.length, draw).masked_fill(mask == 0, PAD),
            "tags": tags.masked_fill(mask == 0, IGNORE),
        }


@dataclass(frozen=True, kw_only=True)
class Images(Seeded):
    """An image and its class."""

    classes: int = 8
    size: int = 32
    channels: int = 3

    def sample(self, draw: Generator) -> Sample:
        return {
            "pixel_values": torch.randn(self.channels, self.size, self.size, generator=draw),
            "labels": torch.randint(0, self.classes, (), generator=draw),
        }


@dataclass(frozen=True, kw_only=True)
class SegmentedImages(Seeded):
    """An image and a class per pixel; a border of its own width per sample has no class."""

    classes: int = 4
    size: int = 32
    channels: int = 3

    def sample(self, draw: Generator) -> tuple[Tensor, Tensor]:
        image = torch.randn(self.channels, self.size, self.size, generator=draw)
        classes = torch.randint(0, self.classes, (self.size, self.size), generator=draw)
        classes[: _between(0, self.size // 4, draw)] = IGNORE
        return image, classes


@dataclass(frozen=True, kw_only=True)
class ImageTexts(Seeded):
    """An image and its caption, which ends in EOS and then padding."""

    vocab: int = 128
    length: int = 16
    size: int = 32
    channels: int = 3

    def sample(self, draw: Generator) -> Sample:
        kept = _between(self.length // 2, self.length, draw)
        mask = _prefix_mask(self.length, kept)
        ids = _tokens(self.vocab, self.length, draw).masked_fill(mask == 0, PAD)
        ids[kept - 1] = EOS
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": torch.randn(self.channels, self.size, self.size, generator=draw),
        }


@dataclass(frozen=True, kw_only=True)
class MelTexts(Seeded):
    """Mel features and the ids of their transcript, of ragged length."""

    vocab: int = 128
    mels: int = 16
    frames: int = 32
    length: int = 16

    def sample(self, draw: Generator) -> Sample:
        kept = _between(self.length // 2, self.length, draw)
        labels = _tokens(self.vocab, self.length, draw)
        labels[kept - 1] = EOS
        labels[kept:] = IGNORE
        return {"input_features": torch.randn(self.mels, self.frames, generator=draw), "labels": labels}


@dataclass(frozen=True, kw_only=True)
class Waveforms(Seeded):
    """A raw waveform and its class."""

    classes: int = 8
    length: int = 800

    def sample(self, draw: Generator) -> Sample:
        return {
            "input_values": torch.randn(self.length, generator=draw),
            "labels": torch.randint(0, self.classes, (), generator=draw),
        }


@dataclass(frozen=True, kw_only=True)
class Vectors(Seeded):
    """Features and a target: a vector of floats, or a class where `classes` is given."""

    features: int = 16
    targets: int = 8
    classes: int | None = None

    def sample(self, draw: Generator) -> tuple[Tensor, Tensor]:
        features = torch.randn(self.features, generator=draw)
        if self.classes is not None:
            return features, torch.randint(0, self.classes, (), generator=draw)
        return features, torch.randn(self.targets, generator=draw)


@dataclass(frozen=True, kw_only=True)
class BagsOfTokens(Seeded):
    """Token ids over a large vocabulary and the class of the bag."""

    vocab: int = 4096
    length: int = 16
    classes: int = 8

    def sample(self, draw: Generator) -> tuple[Tensor, Tensor]:
        return _tokens(self.vocab, self.length, draw), torch.randint(0, self.classes, (), generator=draw)
