"""Plans to predict: the pick is the best of everything, and what a forward pass takes is what was foretold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shardwise as sw
from shardwise.cli import main
from shardwise.cost.pricer import Pricer
from shardwise.engine.launch import joined
from shardwise.errors import PlanError
from shardwise.graph.graph import Graph
from shardwise.inference.precision import Arithmetic
from shardwise.inference.prediction import GraphPrediction, ModulePrediction
from shardwise.machine.cluster import Cluster, Node
from shardwise.machine.device import device, network
from shardwise.machine.quantity import Quantity
from shardwise.parallel.layout import SplitAxis
from shardwise.parallel.mesh import Mesh
from shardwise.plan.plan import Plan
from shardwise.report.planned import why
from shardwise.search.space import Options
from tests.conftest import cuts, data, pipeline
from tests.test_estimate import allocated
from tests.test_planner import CLUSTERS, SPLITS, WIDTHS, Widths, check_pick, perceptron, planner
from tests.zoo import ZOO

OBJECTIVES = ("throughput", "latency", "memory")
WANTED = st.tuples(st.sampled_from(OBJECTIVES), st.sampled_from([None, 0.9, 0.6]), SPLITS)


@settings(max_examples=4)
@given(WIDTHS, st.sampled_from([6, 8]), CLUSTERS, WANTED)
def test_the_pick_is_the_best_of_everything(
    widths: Widths, batch: int, name: str, wanted: tuple[str, float | None, dict[str, int]]
) -> None:
    check_pick(widths, batch, name, wanted, "predict")


@pytest.mark.prove
@pytest.mark.timeout(3600)
@settings(max_examples=300)
@given(WIDTHS, st.sampled_from([6, 8, 64]), CLUSTERS, WANTED)
def test_many_picks_are_the_best_of_everything(
    widths: Widths, batch: int, name: str, wanted: tuple[str, float | None, dict[str, int]]
) -> None:
    check_pick(widths, batch, name, wanted, "predict")


def test_each_objective_has_the_plan_that_it_is_known_for() -> None:
    """Wide layers on fast links: copies for many chunks, cut products for one, and parts of both for memory."""
    widths, cluster = (4096,) * 7, Cluster.load("2xh100-sxm")
    found = {
        objective: planner(widths, 512, cluster, Options(objective, purpose="predict")).search().best
        for objective in OBJECTIVES
    }
    names = {objective: [axis.name for axis in p.plan.axes] for objective, p in found.items() if p is not None}
    assert names["throughput"] == ["data"] and names["latency"] == ["tensor"] and names["memory"] != ["data"]


def test_replicas_take_whole_chunks_whatever_their_size() -> None:
    graph = Graph.of(perceptron((64, 256, 64), 7), purpose="predict")
    pricer, cluster = Pricer(graph), Cluster.load("4xh100-sxm")
    one, two = (pricer.price(plan, cluster, 7) for plan in (Plan(), Plan((data(),))))
    assert one.seconds == two.seconds and one.memory == two.memory
    assert one.memory["gradients"] == one.memory["optimizer"] == 0
    assert one.step == one.pace


def test_a_pipeline_that_is_full_gives_a_chunk_for_its_slowest_stage() -> None:
    job = ZOO["tied_lm"]()
    graph = Graph.of(job, purpose="predict")
    plan = Plan((pipeline(),), cuts(job, 2))
    price = Pricer(graph).price(plan, Cluster.load("2xh100-sxm"), 8)
    assert price.step / 2 < price.pace < price.step
    assert price.seconds["bubble"] == pytest.approx(price.step - price.seconds["compute"])


def test_outputs_are_joined_for_a_price() -> None:
    """The logits of an axis that cuts the vocabulary come to one rank; a training step never joins them."""
    job = ZOO["tied_lm"]()
    graph = Graph.of(job, purpose="predict")
    (logits,) = graph.results.values()
    tasks = Pricer(graph).work([SplitAxis("tensor", 2, ("vocab*",))]).tasks(8)
    joined = [m for task in tasks if logits in task.op.outputs for m in task.forward]
    assert [(m.axis, m.kind, m.size) for m in joined] == [("tensor", "all_gather", logits.bytes().at(8))]


@pytest.mark.parametrize("name", ["gpt2", "resnet", "tied_lm"])
@pytest.mark.parametrize("micros", [1, 2])
def test_activations_are_what_is_there_at_the_fullest_moment(name: str, micros: int) -> None:
    job = ZOO[name]()
    graph, batch, device = Graph.of(job, purpose="predict"), job.batch(range(job.global_batch)), torch.device("cpu")
    plan = Plan(micro_batches=micros)
    work = Pricer(graph).case(plan, Cluster.load("1xh100-sxm"), job.global_batch)
    with joined():
        split = GraphPrediction(job, plan, Mesh.build([], rank=0), batch, device, Arithmetic())
        most = allocated(lambda: split.outputs(0, batch))
    foretold = float(work.tables[0].whole_held.largest)
    assert foretold == pytest.approx(most, rel=0.12)
    if micros == 1:
        whole = ModulePrediction(job, batch, device, Arithmetic())
        most = allocated(lambda: whole.outputs(0, batch))
        assert 0.95 * most < work.estimate([]).memory["activations"] < 1.8 * most


def test_a_model_too_large_for_one_device_is_split() -> None:
    job = perceptron((2048,) * 5, 8)
    small = replace(device("h100-sxm"), memory=Quantity(0.7 * 4 * 2048**2 * 4, "a test"))
    plan, explanation = why(
        job, Cluster("two", (Node(2, small, network("ib-ndr")),)), Options("throughput", purpose="predict")
    )
    assert [axis.name for axis in plan.axes] != ["data"] and explanation is not None
    told = plan.explain()
    assert "8 samples a chunk" in told and "samples/s" in told
    assert any("replicas (data parallel)" in line and "does not fit, by" in line for line in told.splitlines())


def test_an_objective_of_the_other_purpose_is_one_message() -> None:
    with pytest.raises(PlanError, match="throughput, latency, memory for a plan to predict, but is 'time'"):
        Options("time", purpose="predict")
    with pytest.raises(PlanError, match="time, cost, memory for a plan to train, but is 'latency'"):
        sw.plan(perceptron((8, 8), 8), 2, objective="latency")


SPEC = "tests.zoo.plain:qkv_attention"


def test_the_command_plans_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, written = tmp_path / "why.html", tmp_path / "plan.txt"
    words = ["plan", SPEC, "--for", "predict", "--objective", "latency", "--ranks", "2", "--fix", "data=1"]
    assert main([*words, "--json", "--html", str(page), "--out", str(written)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["explanation"]["purpose"], told["explanation"]["objective"]) == ("predict", "latency")
    assert told["explanation"]["best"]["pace"] > 0
    assert "a chunk, predicted" in page.read_text()
    assert Plan.parse(written.read_text()).ranks == 2


@pytest.mark.slow
def test_predict_has_a_plan_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.npy"
    assert main(["predict", SPEC, "--output", str(output), "--ranks", "2", "--objective", "memory"]) == 0
    assert "samples a chunk" in capsys.readouterr().out and output.exists()
    assert main(["predict", SPEC, "--output", str(output), "--objective", "memory", "--plan", "x"]) == 2
