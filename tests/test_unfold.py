"""A deep model captured by a few of its layers: the same graph as of the whole, and the whole where layers differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from shardwise.graph import capture, unfold
from shardwise.graph.captured import Captured
from shardwise.job import Job
from tests.zoo.data import CausalTokens, Images, Vectors
from tests.zoo.plain import class_loss, sgd

DEPTH = 8


def form(found: Captured) -> list[tuple[Any, ...]]:
    """A captured graph, node by node, without the names that its nodes happen to have."""
    weights = {**found.params, **found.buffers}
    names: dict[fx.Node, str] = {}
    lines: list[tuple[Any, ...]] = []
    for node in found.graph.nodes:
        if node.op == "placeholder" and not node.users and node.name not in weights:
            continue  # a constant that nobody reads, such as an empty cache
        names[node] = weights.get(node.name, node.name) if node.op == "placeholder" else str(len(lines))
        what = names[node] if node.op == "placeholder" else str(node.target)
        reads = repr(fx.node.map_arg((node.args, node.kwargs), lambda n: names[n]))
        modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        shape = str(getattr(node.meta.get("val"), "shape", ""))
        lines.append((what, reads, shape, modules, len(node.users)))
    return lines


def transformer(name: str, data: Any, **sizes: Any) -> Job:
    """A model of transformers by its configuration class, with its own loss."""
    import transformers

    model = getattr(transformers, name)
    config = model.config_class(**sizes)
    return Job(model=lambda: model(config), data=data, optimizer=sgd, global_batch=4)


SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": DEPTH, "intermediate_size": 32}
TEXT = {**SMALL, "vocab_size": 32, "max_position_embeddings": 16}


class Stacked(nn.Module):
    """Layers in a list, and a way to call them."""

    def __init__(self, layer: Callable[[], nn.Module], call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(DEPTH))
        self.others = nn.ModuleList(nn.LayerNorm(8) for _ in range(DEPTH))
        self.head, self.call = nn.Linear(8, 3), call

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.call(x, self.layers, self.others))
        return found


def stacked(call: Callable[..., Tensor], layer: Callable[[], nn.Module] = lambda: nn.Linear(8, 8)) -> Job:
    data = Vectors(features=8, classes=3)
    return Job(model=lambda: Stacked(layer, call), data=data, loss=class_loss, optimizer=sgd, global_batch=4)


def in_turn(x: Tensor, layers: Any, others: Any) -> Tensor:
    for layer in layers:
        x = F.dropout(layer(x).relu(), 0.1)
    return x


def one_other(x: Tensor, layers: Any, others: Any) -> Tensor:
    for i, layer in enumerate(layers):
        x = layer(x).tanh() if i == DEPTH - 4 else layer(x).relu()
    return x


def less_and_less(x: Tensor, layers: Any, others: Any) -> Tensor:
    for i, layer in enumerate(layers):
        x = x + layer(x) * (1 - i / len(layers))
    return x


def all_together(x: Tensor, layers: Any, others: Any) -> Tensor:
    found = []
    for layer in layers:
        x = layer(x).relu()
        found.append(x)
    return torch.stack(found).sum(0)


def in_pairs(x: Tensor, layers: Any, others: Any) -> Tensor:
    for layer, other in zip(layers, others, strict=True):
        x = other(layer(x))
    return x


def backwards(x: Tensor, layers: Any, others: Any) -> Tensor:
    for layer in reversed(layers):
        x = layer(x).relu()
    return x


def taken_by_number(x: Tensor, layers: Any, others: Any) -> Tensor:
    for i in range(DEPTH):
        x = layers[i](x)
    return x


def shared(x: Tensor, layers: Any, others: Any) -> Tensor:
    for layer in layers:
        x = layers[0](layer(x).relu())
    return x


def norm() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))


TOKENS = CausalTokens(vocab=32, length=8)
KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
LOCAL = {
    **TEXT, "num_hidden_layers": 15, "layer_types": 5 * KINDS, "num_key_value_heads": 2, "head_dim": 8,
    "sliding_window": 4,
}  # fmt: skip
GPT2 = {"n_embd": 16, "n_layer": DEPTH, "n_head": 2, "n_positions": 16, "vocab_size": 32}
UNFOLDED: dict[str, Callable[[], Job]] = {
    "llama": lambda: transformer("LlamaForCausalLM", TOKENS, **TEXT, num_key_value_heads=1),
    "gemma3": lambda: transformer("Gemma3ForCausalLM", TOKENS, **LOCAL),
    "gpt2": lambda: transformer("GPT2LMHeadModel", TOKENS, **GPT2),
    "vit": lambda: transformer(
        "ViTForImageClassification", Images(size=8, classes=2), **SMALL, image_size=8, patch_size=4
    ),
    "in turn": lambda: stacked(in_turn),
    "shared": lambda: stacked(shared),
    "statistics": lambda: stacked(in_turn, norm),
}  # fmt: skip
WHOLE: dict[str, Callable[[], Job]] = {
    "one other": lambda: stacked(one_other),
    "less and less": lambda: stacked(less_and_less),
    "all together": lambda: stacked(all_together),
    "in pairs": lambda: stacked(in_pairs),
    "backwards": lambda: stacked(backwards),
    "by number": lambda: stacked(taken_by_number),
}


LONG = ("llama", "gemma3", "vit", "gpt2")
NAMES = [pytest.param(n, marks=pytest.mark.prove) if n in LONG else n for n in (*UNFOLDED, *WHOLE)]


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_of_a_few_layers_is_that_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {**UNFOLDED, **WHOLE}[name]()
    written: list[Captured | None] = []
    true = unfold.unfold
    monkeypatch.setattr(capture, "unfold", lambda *args: written.append(true(*args)) or written[-1])
    few = capture.capture(job)
    assert len([w for w in written if w is not None]) == (name in UNFOLDED)
    monkeypatch.setattr(capture, "deepest", lambda model: None)
    whole = capture.capture(job)
    assert form(few) == form(whole)
    assert sorted(few.updates) == sorted(whole.updates)
    assert (few.tied, list(few.params.values())) == (whole.tied, list(whole.params.values()))


def test_the_model_keeps_its_layers() -> None:
    job = stacked(in_turn)
    module = job.build()
    capture.capture(job, module)
    assert len(module.layers) == DEPTH  # type: ignore[arg-type]
    assert len(list(module.parameters())) == 2 * DEPTH + 2 * DEPTH + 2
