"""Small models that keep a cache of keys and values."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.job import Job

VOCAB, LONGEST = 128, 64
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.3,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 8,
    "n_positions": LONGEST,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _job(name: str, architecture: str, config: dict[str, Any]) -> Job:
    def model() -> nn.Module:
        import transformers

        built = getattr(transformers, architecture)
        return built(built.config_class(**config))  # type: ignore[no-any-return]

    return Job(model=model, data=[], global_batch=4, name=name)  # type: ignore[arg-type]


def llama(**changes: Any) -> Job:
    return _job("llama", "LlamaForCausalLM", {**LLAMA, **changes})


def gpt2(**changes: Any) -> Job:
    return _job("gpt2", "GPT2LMHeadModel", {**GPT2, **changes})


def window(**changes: Any) -> Job:
    """Each position sees the last six alone."""
    return _job("window", "MistralForCausalLM", {**LLAMA, "sliding_window": 6, **changes})


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, samples: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(samples, heads, LONGEST, width // heads), persistent=False)
        self.keys: Tensor
        self.values: Tensor

    def forward(self, x: Tensor, positions: Tensor, *, cached: bool) -> Tensor:
        n, length, width = x.shape
        q, k, v = (t.view(n, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(width, dim=-1))
        seen = torch.arange(LONGEST if cached else length, device=x.device)
        if cached:
            self.keys[:, :, positions] = k
            self.values[:, :, positions] = v
            k, v = self.keys, self.values
        mask = seen <= positions.unsqueeze(1)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)).masked_fill(~mask, -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width))  # type: ignore[no-any-return]


class Buffered(nn.Module):
    """A transformer in plain torch that writes its cache to buffers, at the positions that it is told."""

    def __init__(self, layers: int = 2, width: int = 32, heads: int = 4, samples: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, width), nn.Embedding(LONGEST, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.attentions = nn.ModuleList(_Attention(width, heads, samples) for _ in range(layers))
        self.ups = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.downs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))
        self.head = nn.Linear(width, VOCAB)

    def forward(self, tokens: Tensor, positions: Tensor, cached: bool = True) -> Tensor:
        x = self.tokens(tokens) * 3 + self.places(positions)
        for norm, attention, up, down in zip(self.norms, self.attentions, self.ups, self.downs, strict=True):
            x = x + attention(norm(x), positions, cached=cached)
            x = x + down(F.gelu(up(x)))
        return self.head(x)  # type: ignore[no-any-return]


def buffered(**changes: Any) -> Job:
    return Job(model=lambda: Buffered(**changes), data=[], global_batch=4, name="buffered")  # type: ignore[arg-type]


MODELS = (llama, gpt2, window, buffered)


def logits_without_cache(module: nn.Module, tokens: Tensor) -> Tensor:
    """Those behind the last token of whole sequences, [samples, vocabulary]; nothing is kept of earlier ones."""
    if isinstance(module, Buffered):
        found: Tensor = module(tokens, torch.arange(tokens.shape[1]), cached=False)[:, -1]
        return found
    output: Any = module(input_ids=tokens, use_cache=False)
    last: Tensor = output.logits[:, -1]
    return last
