"""Models of plain torch, each with the loss and the optimizer of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.job import Job
from tests.zoo.data import (
    BOS,
    IGNORE,
    PAD,
    BagsOfTokens,
    CausalTokens,
    Images,
    SegmentedImages,
    Seq2SeqTokens,
    TaggedTokens,
    Vectors,
)

VOCAB = 128


def sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def adamw_cosine(params: Iterable[nn.Parameter]) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW whose learning rate falls along a cosine."""
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the positions that have a label."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE)


def next_token_loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of each position against the label after it."""
    return token_loss(logits[:, :-1], batch["labels"][:, 1:])


def tag_loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the tags."""
    return token_loss(logits, batch["tags"])


def class_loss(logits: Tensor, batch: Any) -> Tensor:
    """Mean cross-entropy of the second tensor of a tuple, or of the labels of a dict."""
    return F.cross_entropy(logits, batch["labels"] if isinstance(batch, dict) else batch[1])


class Tagger(nn.Module):
    """Embedding, a recurrent stack and a linear layer over its states."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], *, width: int = 32, tags: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width, padding_idx=PAD)
        self.recurrent = cell(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, tags)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrent(self.embed(tokens))
        return self.head(states)  # type: ignore[no-any-return]


def lstm_tagger() -> Job:
    """A tagger over a 2-layer LSTM."""
    return Job(
        model=lambda: Tagger(nn.LSTM), data=TaggedTokens(vocab=VOCAB), loss=tag_loss, global_batch=8, name="lstm_tagger"
    )


def gru_tagger() -> Job:
    """A tagger over a 2-layer GRU."""
    return Job(
        model=lambda: Tagger(nn.GRU), data=TaggedTokens(vocab=VOCAB), loss=tag_loss, global_batch=8, name="gru_tagger"
    )


class Translator(nn.Module):
    """nn.Transformer with learned positions and a head of its own."""

    def __init__(self, *, width: int = 32, length: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        self.body = nn.Transformer(
            width,
            nhead=4,
            num_encoder_layers=2,
            num_decoder_layers=2,
            dim_feedforward=64,
            dropout=0.0,
            batch_first=True,
        )
        self.head = nn.Linear(width, VOCAB)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        target = F.pad(labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE, PAD), (1, 0), value=BOS)
        padding = attention_mask == 0
        states = self.body(
            self.embed(input_ids) + self.position,
            self.embed(target) + self.position,
            tgt_mask=torch.ones(target.shape[1], target.shape[1], dtype=torch.bool, device=target.device).triu(1),
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return self.head(states)  # type: ignore[no-any-return]


def torch_transformer() -> Job:
    """An encoder-decoder nn.Transformer, its gradient clipped."""
    return Job(
        model=Translator,
        data=Seq2SeqTokens(vocab=VOCAB),
        loss=lambda logits, batch: token_loss(logits, batch["labels"]),
        global_batch=8,
        clip_norm=0.5,
        name="torch_transformer",
    )


def _convs(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
    )


class UNet(nn.Module):
    """Two levels down, two up, each way up joined to its level by a concatenation of channels."""

    def __init__(self, *, classes: int, width: int = 16) -> None:
        super().__init__()
        self.down1 = _convs(3, width)
        self.down2 = _convs(width, 2 * width)
        self.middle = _convs(2 * width, 4 * width)
        self.grow2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up2 = _convs(4 * width, 2 * width)
        self.grow1 = nn.Upsample(scale_factor=2, mode="nearest")
        self.up1 = _convs(3 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        first = self.down1(image)
        second = self.down2(F.max_pool2d(first, 2))
        deep = self.middle(F.avg_pool2d(second, 2))
        deep = self.up2(torch.cat([self.grow2(deep), second], dim=1))
        return self.head(self.up1(torch.cat([self.grow1(deep), first], dim=1)))  # type: ignore[no-any-return]


def unet() -> Job:
    """A U-Net that segments images, some pixels without a class."""
    return Job(
        model=lambda: UNet(classes=4),
        data=SegmentedImages(classes=4),
        loss=lambda logits, batch: F.cross_entropy(logits, batch[1], ignore_index=IGNORE),
        optimizer=sgd,
        global_batch=8,
        name="unet",
    )


class BagMLP(nn.Module):
    """The mean of the embeddings of a bag, then an MLP."""

    def __init__(self, *, vocab: int = 4096, width: int = 16, hidden: int = 64, classes: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp(self.table(tokens).mean(dim=1))  # type: ignore[no-any-return]


def big_embedding_mlp() -> Job:
    """An MLP next to an embedding table that holds nearly all of the weights."""
    return Job(model=BagMLP, data=BagsOfTokens(), loss=class_loss, global_batch=8, name="big_embedding_mlp")


def _norm_block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class ConvNet(nn.Module):
    """Convolutions with batch norm, a global average pool and a wide classifier."""

    def __init__(self, *, classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            _norm_block(3, 16, 1), _norm_block(16, 32, 2), _norm_block(32, 32, 1), _norm_block(32, 64, 2)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(64, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(pixel_values)).flatten(1))  # type: ignore[no-any-return]


def convnet_bn() -> Job:
    """A convolutional net whose batch norm couples all samples of a batch."""
    return Job(
        model=lambda: ConvNet(classes=512),
        data=Images(classes=512),
        loss=class_loss,
        optimizer=sgd,
        global_batch=8,
        name="convnet_bn",
    )


class CausalBlock(nn.Module):
    """Pre-norm attention with one fused weight for queries, keys and values, then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class CausalLM(nn.Module):
    """Token and position embeddings, causal blocks and a head, tied to the token embedding or not."""

    def __init__(
        self, *, width: int = 32, heads: int = 4, layers: int = 2, length: int = 16, tied: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(CausalBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.1)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.position(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def qkv_attention() -> Job:
    """A causal LM of fused qkv weights, its learning rate on a schedule."""
    return Job(
        model=lambda: CausalLM(width=64, heads=8),
        data=CausalTokens(vocab=VOCAB),
        loss=next_token_loss,
        optimizer=adamw_cosine,
        global_batch=8,
        name="qkv_attention",
    )


def tied_lm() -> Job:
    """A causal LM whose head is the weight of its embedding."""
    return Job(
        model=lambda: CausalLM(tied=True),
        data=CausalTokens(vocab=VOCAB),
        loss=next_token_loss,
        global_batch=8,
        name="tied_lm",
    )


class FrozenLM(CausalLM):
    """A causal LM with a frozen embedding, a frozen first block and a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed.requires_grad_(False)
        self.blocks[0].requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(8))


def frozen_lm() -> Job:
    """A causal LM where some parameters get no gradient."""
    return Job(model=FrozenLM, data=CausalTokens(vocab=VOCAB), loss=next_token_loss, global_batch=8, name="frozen_lm")


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, outputs)
    )


def summed_loss(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropies of the even classes, and how many there are."""
    kept = batch[1] % 2 == 0
    losses = F.cross_entropy(logits, batch[1], reduction="none")
    return (losses * kept).sum(), kept.sum()


def sum_count_mlp() -> Job:
    """An MLP whose loss is a sum and a count."""
    return Job(
        model=lambda: _mlp(16, 64, 8), data=Vectors(classes=8), loss=summed_loss, global_batch=8, name="sum_count_mlp"
    )


class Experts(nn.Module):
    """A residual mixture: a router takes two of the experts per sample, a dense combine weighs them."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) * hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = torch.topk(self.router(x), k=2, dim=-1)
        one_hot = F.one_hot(chosen, self.up.shape[0]).to(x.dtype)
        weights = (scores.softmax(dim=-1).unsqueeze(-1) * one_hot).sum(dim=1)
        hidden = F.gelu(torch.einsum("nw,ewh->enh", x, self.up))
        return x + torch.einsum("enh,ehw,ne->nw", hidden, self.down, weights)


def moe_mlp() -> Job:
    """An MLP with two mixtures of experts."""
    return Job(
        model=lambda: nn.Sequential(nn.Linear(16, 32), Experts(32, 64, 4), Experts(32, 64, 4), nn.Linear(32, 8)),
        data=Vectors(classes=8),
        loss=class_loss,
        global_batch=8,
        name="moe_mlp",
    )


class ResidualBlock(nn.Module):
    """x + MLP(LayerNorm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


def skip_regressor() -> Job:
    """Residual blocks under a mean squared error."""
    return Job(
        model=lambda: nn.Sequential(nn.Linear(16, 32), *(ResidualBlock(32) for _ in range(3)), nn.Linear(32, 8)),
        data=Vectors(targets=8),
        loss=lambda output, batch: F.mse_loss(output, batch[1]),
        optimizer=sgd,
        global_batch=8,
        name="skip_regressor",
    )


MODELS: tuple[Callable[[], Job], ...] = (
    lstm_tagger,
    gru_tagger,
    torch_transformer,
    unet,
    big_embedding_mlp,
    convnet_bn,
    qkv_attention,
    tied_lm,
    frozen_lm,
    sum_count_mlp,
    moe_mlp,
    skip_regressor,
)
