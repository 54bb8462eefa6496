"""Blocks: what a graph has several times in a row is found once, whatever it is called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise.graph.blocks import Block, blocks, twins
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.search.dims import groups
from tests.zoo import graph_of


def job(*layers: nn.Module, width: int = 8) -> Job:
    data = TensorDataset(torch.randn(8, width), torch.randn(8, width))
    return Job(
        model=lambda: nn.Sequential(*layers),
        data=data,
        loss=lambda out, batch: nn.functional.mse_loss(out, batch[1]),
        optimizer=lambda params: torch.optim.SGD(params, 0.1),
        global_batch=4,
        name="layers",
    )


def repeated(graph: Graph) -> list[Block]:
    return [block for block in blocks(graph) if block.count > 1]


def home(graph: Graph, i: int) -> str:
    return graph.ops[i].module


@pytest.mark.parametrize("name", ["gpt2_dropout", "t5", "swin", "lstm_tagger", "skip_regressor", "mixtral"])
def test_blocks_hold_every_operator_once_and_in_order(name: str) -> None:
    graph = graph_of(name)
    held = [i for block in blocks(graph) for copy in block.copies() for i in copy]
    assert held == list(range(len(graph.ops)))


@pytest.mark.parametrize("name", ["gpt2_dropout", "t5", "swin", "mixtral", "convnext", "torch_transformer"])
def test_copies_of_a_block_are_wired_alike_inside(name: str) -> None:
    graph = graph_of(name)

    def wiring(copy: range) -> list[list[int | None]]:
        """For each operator where in its copy each input is computed; None for what comes from outside."""
        made = {v: i - copy[0] for i in copy for v in graph.ops[i].outputs}
        return [[made.get(v) for v in graph.ops[i].inputs] for i in copy]

    assert repeated(graph)
    for block in repeated(graph):
        first, *others = (wiring(copy) for copy in block.copies())
        assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("name", "layers", "counts"),
    [
        ("llama", "model.layers", [4]),
        ("gpt2_dropout", "transformer.h", [2]),
        ("bart", "model", [2, 2]),  # an encoder's layers, and a decoder's
        ("clip", "clip", [2, 2]),
        ("convnext", "convnext.encoder.stages", [2, 2]),
    ],
)
def test_layers_of_published_models_are_copies_of_one(name: str, layers: str, counts: list[int]) -> None:
    graph = graph_of(name)
    found = repeated(graph)
    assert [block.count for block in found] == counts
    for block in found:
        for k, copy in enumerate(block.copies()):
            inside = {home(graph, i) for i in copy if home(graph, i).startswith(layers)}
            assert len(inside) > 3, "a block is a layer, not one operator of it"
            numbers = {part for path in inside for part in path.split(".") if part.isdigit()}
            assert str(k) in numbers
    assert sum(block.length * (block.count - 1) for block in found) > 0.2 * len(graph.ops)


class Written(nn.Module):
    """Layers that are attributes with names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.middle, self.last):
            x = x + torch.tanh(layer(x))
        return x


def test_layers_that_are_not_in_a_list_are_found_and_their_dims_are_one_group() -> None:
    assert [block.count for block in repeated(Graph.of(job(Written())))] == [3]

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.b(torch.relu(self.a(x)))
            return x + self.d(torch.relu(self.c(x)))

    graph = Graph.of(job(Wide()))
    a, c = (graph.params[f"0.{n}.weight"].leaves()[0][0] for n in ("a", "c"))
    assert a is not c and twins(graph)[a] is twins(graph)[c]
    assert (a.name, c.name) in groups(graph, 2)


def test_what_differs_in_anything_is_no_copy() -> None:
    def count(*layers: nn.Module) -> list[int]:
        return [block.count for block in repeated(Graph.of(job(*layers)))]

    same = [nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU()]
    assert count(*same) == [3]
    assert count(*same[:3], nn.GELU("tanh"), *same[4:]) == []
    assert count(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8, bias=False), nn.GELU()) == []
    assert count(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.GELU()) == []
    assert count(nn.Dropout(0.1), nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 8)) == []
    assert count(nn.Dropout(0.1), nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 8)) == [2]


def test_copies_that_are_wired_differently_inside_are_no_copies() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.a(x))
            y = torch.sigmoid(y) + y
            z = self.b(y)
            z = torch.tanh(z)
            return torch.sigmoid(z) + y

    # The same operators in the same order, but the second sum takes the first one's result.
    assert repeated(Graph.of(job(Crossed()))) == []


def test_a_block_begins_where_least_is_carried() -> None:
    graph = graph_of("llama")
    (block,) = repeated(graph)
    for copy in block.copies()[1:]:
        made = {v for op in graph.ops[block.start : copy[0]] for v in op.outputs}
        carried = {v for i in copy for v in graph.ops[i].inputs if v in made}
        assert len(carried) == 1, "only the residual stream crosses from one layer to the next"
