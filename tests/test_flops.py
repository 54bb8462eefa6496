"""Work: the table's forward FLOPs are torch's where its counter knows the operator, and by hand where it says 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from shardwise.graph.capture import LossModule
from shardwise.graph.graph import Graph
from shardwise.job import Job, batch_tensors
from tests.test_rules import CASES, SAMPLES, Case, job
from tests.zoo import ZOO, graph_of

KNOWN = [
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv1d, grouped",
    "conv1d, depthwise", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
]  # fmt: skip


def counted(whole: Job, samples: int) -> int:
    """Forward FLOPs as torch's own counter sees them."""
    module, batch = whole.build(), whole.batch(range(samples))
    # Attention as two products: the counter knows no attention of a CPU.
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        LossModule(module, whole, batch).train()(*batch_tensors(batch))
    return counter.get_total_flops()


@pytest.mark.parametrize("name", KNOWN)
def test_work_is_what_torch_counts(name: str) -> None:
    whole = job(CASES[name])
    assert Graph.of(whole).work(SAMPLES) == counted(whole, SAMPLES) > 0


@pytest.mark.parametrize("name", ["qkv_attention", "unet", "convnet_bn", "big_embedding_mlp", "llama"])
def test_the_work_of_a_model_is_what_torch_counts(name: str) -> None:
    whole, graph = ZOO[name](), graph_of(name)
    assert graph.work(6) == counted(whole, 6) > 0
    assert graph.work(6) == 6 * graph.work(1)


@pytest.mark.prove
@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("lstm_tagger", "gru_tagger", "mixtral")])
def test_the_work_of_every_model_is_what_torch_counts(name: str) -> None:
    whole = ZOO[name]()
    assert Graph.of(whole).work(whole.global_batch) == counted(whole, whole.global_batch)


# --- where torch's counter says 0 -------------------------------------------------------------------------------------

WIDTH, HIDDEN, STEPS = 6, 8, 4


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **more: Any) -> None:
        super().__init__()
        self.cell = kind(WIDTH, HIDDEN, batch_first=True, **more)

    def forward(self, x0: Tensor) -> Tensor:
        out: Tensor = self.cell(x0)[0]
        return out.square().mean()


@pytest.mark.parametrize(
    ("kind", "gates", "more"),
    [
        (nn.LSTM, 4, {}),
        (nn.GRU, 3, {}),
        (nn.RNN, 1, {}),
        (nn.LSTM, 4, {"num_layers": 2}),
        (nn.LSTM, 4, {"bidirectional": True}),
    ],
)
def test_a_recurrent_layer_multiplies_every_weight_once_a_step(
    kind: type[nn.RNNBase], gates: int, more: dict[str, Any]
) -> None:
    case: Case = (lambda x, i: x, (STEPS, WIDTH), ())
    whole = job(case).with_(model=lambda: Recurrent(kind, **more))
    first = gates * HIDDEN * (WIDTH + HIDDEN)
    ways = 2 if more.get("bidirectional") else 1
    later = gates * HIDDEN * (HIDDEN + HIDDEN) * (more.get("num_layers", 1) - 1)
    assert Graph.of(whole).work(SAMPLES) == 2 * SAMPLES * STEPS * (ways * first + later)


@pytest.mark.parametrize("name", ["attention", "attention, causal"])
def test_attention_is_two_products_over_queries_and_keys(name: str) -> None:
    graph = Graph.of(job(CASES[name]))
    (op,) = [op for op in graph.ops if op.name == "aten.scaled_dot_product_attention"]
    heads, length, depth = 4, 4, 2
    assert op.context.work.at(SAMPLES) == 2 * SAMPLES * heads * length * length * (depth + depth)


def test_grouped_attention_works_for_every_query_head() -> None:
    graph = Graph.of(job(CASES["attention, grouped"]))
    (op,) = [op for op in graph.ops if op.name == "aten.scaled_dot_product_attention"]
    assert op.context.work.at(SAMPLES) == 2 * SAMPLES * 4 * 4 * 4 * (2 + 2)


def test_a_matrix_times_a_vector() -> None:
    assert Graph.of(job(CASES["matmul, vector"])).work(SAMPLES) == 2 * SAMPLES * 4 * 6


def test_a_bag_of_embeddings_adds_a_row_for_each_index() -> None:
    case: Case = (lambda x, i, w: F.embedding_bag(i, w, mode="sum"), (STEPS, WIDTH), ((STEPS, HIDDEN),))
    assert Graph.of(job(case)).work(SAMPLES) == SAMPLES * STEPS * HIDDEN
