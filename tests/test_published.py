"""Rows of tables of published runs: they become the plans they describe, and their prices move the right way."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks.published import rows
from benchmarks.published.__main__ import main, predictions
from benchmarks.published.page import Part, plot, text
from benchmarks.published.score import held_out, planned, score
from shardwise.cost.work import Work
from shardwise.graph.saved import saved
from shardwise.parallel.layout import SplitAxis
from shardwise.plan.plan import Plan

ROW = {
    "table": "vtrain", "cell": "vtrain/GPT/A100/16", "config_id": "one", "model": "GPT 0.1B", "params_B": "0.1",
    "layers": "4", "hidden": "512", "heads": "8", "kv_heads": "8", "ffn": "2048", "vocab": "1024", "seq_len": "256",
    "accelerator": "A100-80GB", "n_gpus": "16", "gpus_per_node": "8", "tp": "2", "pp": "2", "vpp": "1", "dp": "4",
    "zero_fsdp": "ZeRO-1", "micro_batch": "2", "global_batch": "64", "recompute": "full", "sequence_parallel": "no",
    "precision": "bf16", "step_time_s": "0.5", "interconnect": "NVLink", "notes": "",
}  # fmt: skip


def plan(**changes: str) -> Plan:
    row = {**ROW, **changes}
    shape = rows.shape_of(row)
    return rows.plan_of(row, shape, rows.graph_of(shape))


def step(**changes: str) -> float:
    return rows.price({**ROW, **changes}).step


def test_a_row_is_its_plan() -> None:
    found = plan()
    assert [(a.name, a.size) for a in found.axes] == [("pipeline", 2), ("data", 4), ("tensor", 2)]
    assert (found.micro_batches, found.zero, found.schedule, len(found.cuts)) == (8, 1, "1f1b", 1)
    assert found.recompute and "sequence" not in found.axes[2].dims
    assert "sequence" in plan(sequence_parallel="yes").axes[2].dims
    assert plan(vpp="2").schedule == "interleaved" and len(plan(vpp="2").cuts) == 3
    assert plan(zero_fsdp="FSDP FULL_SHARD").zero == 3 and plan(zero_fsdp="FSDP SHARD_GRAD_OP").zero == 2


def test_stages_by_cost_put_the_layer_that_exceeds_a_share_before_the_cut() -> None:
    graph = rows.graph_of(rows.shape_of(ROW))
    assert rows.costed_cuts(graph, 1) == ()
    (cut,) = rows.costed_cuts(graph, 2)
    (even,) = rows.cuts(graph, 2)
    index = {op.id: op.index for op in graph.ops}
    assert index[cut] > index[even]


def test_clusters_are_found_by_device_and_network() -> None:
    assert rows.cluster_of(ROW) == "2x8xa100-80gb"
    other = {**ROW, "accelerator": "H100-80GB", "interconnect": "NVLink; AWS EFA"}
    assert rows.cluster_of(other) == "2x8xh100-sxm+aws-efa"


@pytest.mark.parametrize(
    ("accelerator", "device"),
    [
        ("A100-80GB SXM4", "a100-80gb"), ("A100-40GB", "a100-40gb"), ('A100 ("Ampere")', "a100-80gb"),
        ("A800-80GB", "a100-80gb"), ("H100", "h100-sxm"), ("H100-80GB 700W", "h100-sxm"), ("V100", "v100-32gb"),
        ("H100-96GB (HBM2e, 500W)", "h100-sxm-hbm2e"), ("GB300", "gb300"), ("TPU v5p", "tpu-v5p"),
    ],
)  # fmt: skip
def test_devices_are_known_by_the_names_that_tables_have(accelerator: str, device: str) -> None:
    assert rows.device_of(accelerator).name == device


def test_a_device_that_is_not_known_is_not_taken_for_another() -> None:
    with pytest.raises(ValueError, match="accelerator MI300X"):
        rows.device_of("MI300X")


def test_what_takes_longer_costs_more() -> None:
    assert step() < step(global_batch="128")
    assert step() > step(recompute="none")
    assert step() > step(accelerator="H100-80GB")
    assert step() < step(interconnect="4x Omni-Path 100Gb/s")


def test_queries_that_are_balanced_leave_causal_attention_half() -> None:
    graph = rows.graph_of(rows.shape_of(ROW))
    axes, kept = (SplitAxis("context", 2, ("sequence",)),), saved(graph)
    for balanced in (False, True):
        tasks = Work(graph, axes, kept, balanced=balanced).tasks(4)
        assert {t.causal for t in tasks if t.kind == "attention"} == {balanced}


def test_what_a_source_says_of_its_runs_is_what_is_priced() -> None:
    assert rows.shards_of({**ROW, "zero_fsdp": "ZeRO-1 group=4"}) == 4
    assert rows.shards_of({**ROW, "zero_fsdp": "HSDP"}) == 8 and not rows.shards_of(ROW)
    assert plan(notes="schedule ZB-1p; fast", recompute="none").schedule == "zero-bubble"
    assert step(precision="fp8", accelerator="H100-80GB") != step(accelerator="H100-80GB")
    assert rows.profile_of({**ROW, "table": "fms", "compile": "yes"}).fused == "all"
    graph = rows.graph_of(rows.shape_of(ROW))
    row = {**ROW, "table": "torchtitan", "recompute": "selective op"}
    assert rows.recompute_of(row, rows.shape_of(ROW), graph)[1] == "products"


def test_rows_that_cannot_be_priced_are_told_with_a_reason() -> None:
    odd = [
        {**ROW, "precision": "NVFP4"}, {**ROW, "ep": "8"}, {**ROW, "hidden": ""}, {**ROW, "pp": "16"},
        {**ROW, "heads": "7"}, {**ROW, "n_gpus": "4"},
    ]  # fmt: skip
    found, refused = predictions(odd)
    assert not found and sum(len(ids) for ids in refused.values()) == len(odd)


def test_a_plan_that_its_framework_refuses_does_not_fit() -> None:
    few = {**ROW, "pp": "4", "dp": "2", "tp": "2", "grad_accum": "2", "global_batch": "4", "micro_batch": "1"}
    found, _ = predictions([{**few, "table": table} for table in ("ultrascale", "sc21")])
    assert [line["fits"] for line in found] == [0, 1]


def test_scores_are_those_of_the_definition() -> None:
    names = [("a", 1.0, "ok"), ("b", 2.0, "ok"), ("c", 4.0, "ok"), ("d", math.nan, "OOM/crash")]
    table = [
        {**ROW, "config_id": n, "micro_batch": str(i), "step_time_s": "" if s != s else str(s), "status": status,
         "peak_mem_GB": "10" if status == "ok" else ""}
        for i, (n, s, status) in enumerate(names)
    ]  # fmt: skip
    prices = {"a": (1.2, 11, 1), "b": (1.0, 9, 1), "c": (4.0, 10, 1), "d": (0.5, 99, 0)}
    keys = ("step_time_s", "peak_mem_GiB", "fits")
    lines = [{"config_id": n} | dict(zip(keys, map(str, p), strict=True)) for n, p in prices.items()]
    plans = planned(table, lines)
    found = score(plans)
    assert found.time == pytest.approx((0.2, 0.44)) and found.memory == pytest.approx(0.1)
    assert found.fit == 1.0 and list(found.regret.values()) == [0.5]
    part = Part("vtrain", False, plans, found)
    assert "| vtrain | others | 3 of 3 | 20.0 (5) | 44.0 (12) | 10.0 |" in text([part], {}, "")
    assert plot([part]).count("<circle") == 4
    large = replace(plans[0], devices=512)
    shown = text([Part("ultrascale", False, [*plans, large], score([*plans, large]))], {}, "")
    assert "| ultrascale | others | 3 of 3 |" in shown and "| ultrascale, 512 devices | others | 1 of 1 |" in shown


def test_plans_of_one_name_are_scored_by_their_own_prices() -> None:
    table = [{**ROW, "micro_batch": str(n), "step_time_s": str(n)} for n in (1, 2, 4)]
    lines = [{"config_id": "one", "step_time_s": str(n), "peak_mem_GiB": "1", "fits": "1"} for n in (1, 2, 4)]
    assert score(planned(table, lines)).time == (0.0, 0.0)
    # Where one was refused, nobody knows which.
    assert score(planned(table, lines[1:])).priced == 0


def test_a_third_of_the_cells_is_held_out_whatever_their_order() -> None:
    cells = [f"cell {i}" for i in range(9)]
    assert len(held_out(cells)) == 3 and held_out(cells) == held_out(reversed(cells))


def test_the_command_prices_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, out = tmp_path / "table.csv", tmp_path / "out.csv"
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, list(ROW))
        writer.writeheader()
        writer.writerows([ROW, {**ROW, "config_id": "two", "hidden": "", "step_time_s": ""}])
    monkeypatch.setattr("sys.argv", ["published", str(table), "--out", str(out)])
    assert main() == 0
    with open(out, newline="") as file:
        assert [line["config_id"] for line in csv.DictReader(file)] == ["one"]
    monkeypatch.setattr("sys.argv", ["published", str(tmp_path / "nowhere")])
    assert main() == 2
