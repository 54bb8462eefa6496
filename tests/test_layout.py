"""Layouts of small graphs: what an axis splits, how parameters are stored, and which collectives that takes."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.errors import PlanError
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.parallel import collectives
from shardwise.parallel.hybrid import Split
from shardwise.parallel.layout import VARIES, WHOLE, Cut
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.rank import RankModel
from shardwise.plan.plan import Plan, PlanAxis
from tests.conftest import data, pipeline, tensor
from tests.test_rules import CASES
from tests.test_rules import job as case
from tests.zoo.data import CausalTokens, Images, Vectors
from tests.zoo.plain import CausalLM, ConvNet, class_loss, next_token_loss


@cache
def language() -> tuple[Job, Graph]:
    job = Job(model=partial(CausalLM, layers=1), data=CausalTokens(vocab=128), loss=next_token_loss, global_batch=8)
    return job, Graph.of(job)


def split(graph: Graph, *axes: PlanAxis, rank: int = 0, **changes: Any) -> Split:
    plan = Plan(axes, **changes)
    return Split(graph, plan, Mesh.build(axes, rank=rank))


def sends(found: Split) -> tuple[Counter[str], Counter[str]]:
    """Collectives on activations in the program of one rank, forward and backward."""
    programs = RankModel(found, torch.device("cpu")).programs.values()
    nodes = [node for program in programs for node in program.module.graph.nodes]
    forward, backward = (
        Counter(kind for node in nodes for kind, *_ in node.meta.get(when, ())) for when in ("sends", "answers")
    )
    return forward, backward


def stored(found: Split, name: str) -> Any:
    (state,) = found.layout.states[found.graph.params[name]]
    return state


# --- the splits of the field, found -----------------------------------------------------------------------------------


def test_data_parallel_sends_gradients_and_nothing_in_between() -> None:
    _, graph = language()
    found = split(graph, data())
    assert all(stored(found, name) == WHOLE for name in graph.params)
    summed = {name for name, value in graph.params.items() if found.layout.grad_axes(value)}
    assert summed == set(graph.params), "that of positions too, which are the same for all samples"
    # The number of labels; the loss is summed after backward.
    assert sends(found) == ({"all_reduce": 1}, {})
    assert found.layout.share(next(op for op in graph.ops if op.name == "aten.linear")) == 0.5


def test_heads_and_width_take_two_sums_forward_and_two_backward_in_a_layer() -> None:
    """Shoeybi et al. 2019: one all-reduce after attention and one after the MLP, and their mirror images."""
    _, graph = language()
    found = split(graph, tensor("heads@blocks.0", "width@blocks.0.mlp"))
    assert sends(found) == ({"all_reduce": 2}, {"all_reduce": 2})
    cuts = {
        "blocks.0.qkv.weight": Cut(0, 1),  # three · heads · depth: the cut is strided
        "blocks.0.qkv.bias": Cut(0, 1),
        "blocks.0.out.weight": Cut(1, 0),
        "blocks.0.mlp.0.weight": Cut(0, 0),
        "blocks.0.mlp.0.bias": Cut(0, 0),
        "blocks.0.mlp.2.weight": Cut(1, 0),
        "blocks.0.out.bias": WHOLE,
        "blocks.0.mlp.2.bias": WHOLE,
        "blocks.0.norm1.weight": WHOLE,
        "embed.weight": WHOLE,
    }
    assert {name: stored(found, name) for name in cuts} == cuts
    assert not any(found.layout.grad_axes(value) for value in graph.params.values())


def test_a_strided_cut_takes_a_part_of_queries_keys_and_values_each() -> None:
    _, graph = language()
    value, rows = graph.params["blocks.0.qkv.bias"], torch.arange(96)
    parts = [split(graph, tensor("heads@blocks.0"), rank=rank).shard(value, rows) for rank in (0, 1)]
    assert parts[0].tolist() == [*range(16), *range(32, 48), *range(64, 80)]
    assert sorted([*parts[0].tolist(), *parts[1].tolist()]) == list(range(96))


def test_two_axes_cut_one_dim_one_inside_the_other() -> None:
    _, graph = language()
    axes = PlanAxis("outer", 2, ("heads@blocks.0",)), PlanAxis("inner", 2, ("heads@blocks.0",))
    value, rows = graph.params["blocks.0.qkv.bias"], torch.arange(96)
    parts = [split(graph, *axes, rank=rank).shard(value, rows).tolist() for rank in range(4)]
    assert [part[0] for part in parts] == [0, 8, 16, 24]
    assert sorted(row for part in parts for row in part) == list(range(96))
    assert split(graph, *axes).layout.states[value] == (Cut(0, 1), Cut(0, 1))


def test_between_the_regions_the_sequence_is_cut_in_place_of_all_reduces() -> None:
    """Korthikanti et al. 2022: a reduce-scatter and an all-gather where there was an all-reduce."""
    _, graph = language()
    found = split(graph, tensor("heads@blocks.0", "width@blocks.0.mlp", "sequence"))
    forward, backward = sends(found)
    assert forward == {"reduce_scatter": 2, "all_gather": 3}, "the logits are shifted, so they are gathered too"
    assert backward == {"all_gather": 2, "reduce_scatter": 2}
    summed = {name for name, value in graph.params.items() if found.layout.grad_axes(value)}
    assert {"blocks.0.norm1.weight", "blocks.0.norm2.weight", "blocks.0.out.bias", "norm.weight"} <= summed
    assert not {"blocks.0.qkv.weight", "blocks.0.mlp.0.weight"} & summed


def test_grouped_heads_are_cut_with_the_keys_that_they_share() -> None:
    graph = Graph.of(case(CASES["attention, grouped"]))
    (op,) = [op for op in graph.ops if op.name == "aten.scaled_dot_product_attention"]
    # Four query heads in two groups: the groups are a dim of queries, keys and values; the heads of a group are not.
    (shared,) = (letter for letter in op.letters if len(letter.places) == 4 and not letter.dim.size.power)
    found = split(graph, tensor(shared.dim.name))
    queries, keys = (graph.params[f"cases.0.weights.{n}"] for n in (0, 1))
    assert found.shard(queries, torch.arange(48).view(6, 8))[0].tolist() == [0, 1, 2, 3]
    assert found.shard(keys, torch.arange(24).view(6, 4))[0].tolist() == [0, 1]


def test_vocabulary_and_classes_are_cut_with_a_loss_that_is() -> None:
    _, graph = language()
    found = split(graph, tensor("vocabulary@embed", "classes@head"))
    assert stored(found, "embed.weight") == stored(found, "head.weight") == Cut(0, 0)
    (loss,) = [op for op in graph.ops if op.name == "aten.cross_entropy_loss"]
    (choice,) = found.layout.choices[loss]
    assert choice.letter is not None and choice.letter.special == "classes"
    # After the embedding; the largest logit, and two sums, in the loss. Then the hidden state's gradient.
    assert sends(found) == ({"all_reduce": 3}, {"all_reduce": 1})


def test_a_bias_is_added_after_the_sum() -> None:
    _, graph = language()
    found = split(graph, tensor("width@blocks.0.mlp"))
    (program,) = RankModel(found, torch.device("cpu")).programs.values()
    nodes = list(program.module.graph.nodes)
    (bias,) = [n for n in nodes if n.op == "get_attr" and n.target == "t_blocks__0__mlp__2__bias"]
    (add,) = bias.users
    assert [getattr(a.target, "__name__", "") for a in add.args if a is not bias] == ["reduce"]


def test_channels_of_convolutions_alternate() -> None:
    graph = Graph.of(Job(model=partial(ConvNet, classes=8), data=Images(classes=8), loss=class_loss, global_batch=8))
    first, second = (graph.params[f"blocks.{n}.0.weight"] for n in (0, 1))
    inner = first.dims[0].leaves()[0]
    assert inner is second.dims[1].leaves()[0]
    found = split(graph, tensor(inner.name))
    assert found.layout.states[first] == (Cut(0, 0),) and found.layout.states[second] == (Cut(1, 0),)
    forward, backward = sends(found)
    assert forward["all_reduce"] == 1, "the second convolution sums over channels"
    assert backward["all_reduce"] == 0, "the images have no gradient"


# --- choosing ---------------------------------------------------------------------------------------------------------


def weighted(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


def linear_graph() -> Graph:
    return Graph.of(case((weighted, (4, 6), ((8, 6),))))


@pytest.mark.parametrize(
    ("dims", "size"), [(("batch", "{8}"), (1, 1)), (("{8}", "batch"), (8, 0)), (("{4}", "{6}"), (4, 0))]
)
def test_of_several_dims_the_first_named_is_split(dims: tuple[str, ...], size: tuple[int, int]) -> None:
    graph = linear_graph()
    (op,) = [op for op in graph.ops if op.name == "aten.linear"]
    names = {f"{{{letter.dim.size.coefficient}}}": letter.dim.name for letter in op.letters}
    (choice,) = split(graph, tensor(*(names.get(dim, dim) for dim in dims))).layout.choices[op]
    assert choice.letter is not None
    assert choice.letter.dim.size[:2] == size


def test_a_pattern_skips_what_does_not_divide_and_a_name_is_refused() -> None:
    graph = linear_graph()
    (op,) = [op for op in graph.ops if op.name == "aten.linear"]
    (choice,) = split(graph, tensor("*", size=8)).layout.choices[op]
    assert choice.letter is not None and choice.letter.dim.size.power == 1, "samples need not divide"
    (name,) = {letter.dim.name for letter in op.letters if letter.dim.size.coefficient == 8}
    message = f"axis tensor of size 3 cannot split dim {name} of size 8: 3 does not divide 8; choose another dim"
    with pytest.raises(PlanError, match=re.escape(message)):
        split(graph, tensor(name, size=3))


def test_an_unknown_dim_is_refused_with_those_there_are() -> None:
    with pytest.raises(PlanError, match=r"axis tensor splits dim 'depth', but the model has no such dim; it has:"):
        split(linear_graph(), tensor("depth"))


def test_a_parameter_that_is_used_in_two_ways_is_stored_whole() -> None:
    def twice(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return (x @ w) * w.softmax(1).sum()

    graph = Graph.of(case((twice, (4, 6), ((6, 8),))))
    value = graph.params["cases.0.weights.0"]
    found = split(graph, tensor(value.dims[1].leaves()[0].name))
    assert found.layout.states[value] == (WHOLE,)
    assert {use[0] for use in found.layout.uses[value]} == {Cut(1, 0), VARIES}
    assert found.layout.grad_axes(value) == (0,)


def test_a_weight_of_every_head_gets_a_partial_gradient() -> None:
    """A scale per position within a head feeds all heads, of which each rank has some."""

    def scaled(x: Tensor, ids: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm((x @ w).unflatten(-1, (4, 2)), (2,), scale)

    graph = Graph.of(case((scaled, (4, 6), ((6, 8), (2,)))))
    (name,) = {leaf.name for leaf in graph.params["cases.0.weights.0"].dims[1].leaves()[:1]}
    found = split(graph, tensor(name))
    scale = graph.params["cases.0.weights.1"]
    assert found.layout.uses[scale] == [(VARIES,)]
    assert found.layout.grad_axes(scale) == (0,)


def test_what_is_made_of_parameters_alone_passes_its_gradient_on_to_them() -> None:
    """A bias that is reshaped for its channels is summed with the other parameters, and fused into its convolution."""

    def convolved(x: Tensor, ids: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return F.conv1d(x, w, bias)

    graph = Graph.of(case((convolved, (3, 9), ((8, 3, 3), (8,)))))
    found = split(graph, data())
    assert found.layout.grad_axes(graph.params["cases.0.weights.1"]) == (0,)
    assert sends(found)[1] == {}
    (program,) = RankModel(found, torch.device("cpu")).programs.values()
    assert [n.args[2].op for n in program.module.graph.nodes if "conv1d" in str(n.target)] == ["get_attr"]


@pytest.mark.parametrize("late", [True, False])
def test_gradients_of_a_tensor_made_of_parameters_are_summed_once_for_all_its_uses(late: bool) -> None:
    """One use is by all samples, one is the same on every rank: its part of the sum is counted once."""

    def used_twice(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        made = w.exp() if late else w
        return x + (x * made).sum(0, keepdim=True).exp() * made

    graph = Graph.of(case((used_twice, (4, 6), ((6,),))))
    found = split(graph, data())
    (program,) = RankModel(found, torch.device("cpu")).programs.values()
    (scaled,) = [n for n in program.module.graph.nodes if n.target is collectives.scale_grad]
    assert scaled.args[1] == 0.5
    assert sends(found)[1] == {"all_reduce": 1}, "that of what the samples share, which is no parameter's"


# --- micro-batches and stages -----------------------------------------------------------------------------------------


def coupled(x: Tensor, ids: Tensor) -> Tensor:
    return x / x.std(0, keepdim=True)


def test_samples_that_are_coupled_cannot_be_cut_in_time() -> None:
    graph = Graph.of(case((coupled, (4, 6), ())))
    with pytest.raises(PlanError, match=r"samples are coupled and micro-batches would change the result; use one"):
        split(graph, micro_batches=2)
    assert sends(split(graph, data()))[0]["all_gather"] > 0, "over ranks they can: the batch is gathered"


def test_batch_norm_cannot_be_cut_in_time_unless_that_is_chosen() -> None:
    graph = Graph.of(Job(model=partial(ConvNet, classes=8), data=Images(classes=8), loss=class_loss, global_batch=8))
    with pytest.raises(PlanError, match=r"statistics over the whole batch.*use one micro-batch, or batch-norm per-"):
        split(graph, micro_batches=2)
    early = split(graph, micro_batches=2, batch_norm="per-micro-batch").early
    assert not any("batch_norm" in graph.producer[e.value].name for e in early)


def test_counts_of_labels_are_made_before_the_first_micro_batch() -> None:
    _, graph = language()
    (early,) = split(graph, micro_batches=4).early
    assert early.joins is None and early.value not in graph.learned


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.head = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.first(x))
        b = torch.tanh(self.second(a))
        return self.head(torch.tanh(self.third(b)) + a)


def skips() -> Graph:
    return Graph.of(Job(model=Skips, data=Vectors(classes=8), loss=class_loss, global_batch=8))


def test_a_skip_travels_through_the_stages_that_it_skips() -> None:
    graph = skips()
    found = split(graph, pipeline(), cuts=("linear.1", "linear.2", "linear.3"))
    carried = [[op.id for op in map(graph.producer.__getitem__, found.crossings(n))] for n in range(3)]
    assert carried == [["tanh.0"], ["tanh.0", "tanh.1"], ["add.0"]]
    names = [found.stage_params(n) for n in range(4)]
    assert names == [["first.weight"], ["second.weight"], ["third.weight"], ["head.weight"]]


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (("linear.9",), "the plan cuts before 'linear.9', but the model has no such operator; the plan is for another"),
        (("linear.2", "linear.1", "linear.3"), "cuts must be in order of execution, but are at operators"),
        (("linear.1", "linear.1", "linear.3"), "cuts must be in order of execution, but are at operators"),
    ],
)
def test_cuts_that_are_not_there_or_out_of_order_are_refused(cuts: tuple[str, ...], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        split(skips(), pipeline(), cuts=cuts)
