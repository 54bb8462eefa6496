"""The machine at hand, measured: short runs on real ranks, the file they write, and what prices make of it."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import netns
from shardwise.cli import main
from shardwise.errors import MachineError
from shardwise.machine.backend import Backend, cores
from shardwise.machine.cluster import Cluster
from shardwise.machine.curve import COLLECTIVES, Curve
from shardwise.machine.device import Device
from shardwise.machine.here import here, machine_file, measured, measured_file
from shardwise.measure.machine import collectives, discover
from shardwise.measure.probes import PROBES, curves, sizes
from tests.pool import Pool


@pytest.fixture(scope="module")
def found() -> Cluster:
    """This machine, measured in a hurry."""
    return discover(seconds=0.2)


@pytest.mark.prove
def test_a_measured_machine_has_what_prices_ask_for(found: Cluster) -> None:
    most = cores()
    assert [node.devices for node in found.nodes] == sorted({1, 2, 4, most})
    for node in found.nodes:
        device = node.device
        assert 1e8 < device.bandwidth.value < 1e13 and 1e8 < device.flops["fp32"].value < 1e15
        assert {curve.op for curve in device.operators} == {probe.op for probe in PROBES}
        kinds = {(row.kind, row.ranks) for row in device.link.collectives}
        groups = [n for n in (2, 4, node.devices) if node.devices > 1 and node.devices % n == 0]
        assert kinds == {(kind, n) for kind in COLLECTIVES for n in groups}
        for curve in device.operators:
            assert list(curve.forward) == sorted(curve.forward) and list(curve.backward) == sorted(curve.backward)


@pytest.mark.prove
def test_the_file_reads_back(found: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    path.write_text(machine_file(found))
    loaded = Cluster.load(path)
    assert loaded.ranks == cores()
    for node in found.nodes:
        read = measured(path)[node.devices]
        for name in ("bandwidth", "memory", "call"):
            assert getattr(read, name).value == pytest.approx(getattr(node.device, name).value, rel=1e-3)
            assert "measured here" in getattr(read, name).source or name == "memory"
        for mine, its in zip(node.device.operators, read.operators, strict=True):
            assert its.seconds(3 * mine.at[-1]) == pytest.approx(mine.seconds(3 * mine.at[-1]), rel=1e-3)
        for row, its_row in zip(node.device.link.collectives, read.link.collectives, strict=True):
            assert (row.kind, row.ranks) == (its_row.kind, its_row.ranks)
            assert its_row.bandwidth.value == pytest.approx(row.bandwidth.value, rel=1e-3)


@pytest.mark.prove
def test_plans_are_priced_on_what_was_measured(found: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert here(2).name == "this machine"
    measured_file().parent.mkdir(parents=True)
    measured_file().write_text(machine_file(found))
    assert here(2).name == "this machine, as measured"
    assert here(2).nodes[0].device.name == "ranks-2"
    route = here(4).path([0, 1])
    rows = {row.kind: row for row in found.nodes[-1].device.link.collectives if row.ranks == 2}
    if found.nodes[-1].devices == 4:
        assert route.seconds("all_gather", 0) == pytest.approx(rows["all_gather"].latency.value, rel=1e-3)
    # More ranks than were measured share the same cores.
    assert here(8).nodes[0].device.flops["fp32"].value < here(4).nodes[0].device.flops["fp32"].value
    measured_file().write_text("[devices.ranks-2]\nkind = 3")
    with pytest.raises(MachineError, match="`shardwise machine` measures anew"):
        here(2)


@pytest.mark.slow
def test_collectives_over_groups(pool: Pool) -> None:
    told = pool(2).run(collectives, 2, Backend.cpu(), 4)
    assert told[0] == told[1]
    assert set(told[0]) == set(COLLECTIVES)
    assert all(0 < fixed < 1 and 0 < each < 1e-6 for fixed, each in told[0].values())


@pytest.mark.prove
def test_the_command(
    found: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(import_module("shardwise.report.machine"), "discover", lambda tell: found)
    out = tmp_path / "here.toml"
    assert main(["machine", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [entry["ranks"] for entry in told] == sorted({1, 2, 4, cores()})
    assert Cluster.load(out).ranks == cores()
    assert measured_file().read_text() == out.read_text()


def test_a_file_that_cannot_be_written_is_told_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(import_module("shardwise.report.machine"), "discover", lambda **_: pytest.fail("measured"))
    (tmp_path / "file").touch()
    assert main(["machine", "--out", str(tmp_path / "file" / "here.toml")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_without_gloo_there_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    with pytest.raises(MachineError, match="this torch has no gloo"):
        discover()


def test_probes_are_found_in_the_graph_and_grow() -> None:
    for probe, row in zip(PROBES, sizes(), strict=True):
        assert len(row) == len(probe.batches)
        assert all(size[probe.by != "operations"] > 0 for size in row) and row == sorted(row)


def test_a_product_on_a_core_takes_its_operations_and_besides_its_bytes() -> None:
    """Times that are such sums, but for noise, come back; what is left of noise is not below zero."""
    made = {"operations": 2e-11, "product bytes": 9e-11}

    def times(each: dict[str, float], noise: float) -> list[list[tuple[float, float]]]:
        sums = [
            [max(sum(n * s for n, s in zip(size, each.values(), strict=True)), 1e-9) for size in row] for row in sizes()
        ]
        return [[(t * (1 + noise * (-1) ** k), 2 * t) for k, t in enumerate(row)] for row in sums]

    for noise in (0.0, 0.05):
        found = {curve.by: curve for curve in curves(times(made, noise), "x", adds=True) if curve.op == "aten.linear"}
        for by, each in made.items():
            assert found[by].seconds(3e6) == pytest.approx(3e6 * each, rel=3 * noise + 1e-9)
            assert found[by].seconds(3e9, backward=True) == pytest.approx(6e9 * each)
    computing = curves(times({**made, "product bytes": -1e-13}, 0.0), "x", adds=True)
    (free,) = (curve for curve in computing if curve.by == "product bytes")
    assert 0 < free.seconds(1e9) < 1e-6
    assert all(curve.by != "product bytes" for curve in curves(times(made, 0.0), "x", adds=False))


CURVE: dict[str, Any] = {
    "op": "aten.gelu", "by": "bytes", "at": [10, 1000], "forward": [1, 100], "backward": [2, 200], "unit": "us",
    "source": "measured",
}  # fmt: skip


def test_a_curve_is_read_between_and_beyond_its_sizes() -> None:
    curve = Curve.read(CURVE, "x")
    assert curve.seconds(1) == curve.seconds(10) == pytest.approx(1e-6)
    assert curve.seconds(100) == pytest.approx(10e-6)
    assert curve.seconds(100, backward=True) == pytest.approx(20e-6)
    assert curve.seconds(5000) == pytest.approx(500e-6)
    assert curve.times(3).seconds(100) == pytest.approx(30e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"by": "metres"}, "must be one of operations, bytes"),
        ({"at": [10]}, "lists of one length"),
        ({"at": [1000, 10]}, "must grow"),
        ({"forward": [1, -1]}, "must be a number above zero, but is -1"),
        ({"unit": "GB"}, "must be in seconds"),
        ({"source": ""}, "must name its source"),
        ({"colour": 1}, "must have"),
    ],
)
def test_a_broken_curve_is_one_clear_message(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(MachineError, match=says):
        Curve.read({**CURVE, **changes}, "x")


def test_collectives_of_a_file_are_checked() -> None:
    from shardwise.machine.device import device

    link: dict[str, Any] = {
        key: {"value": 1, "unit": unit, "source": "x"}
        for key, unit in (("bandwidth", "GB/s"), ("launch", "us"), ("hop", "us"))
    }
    link |= {"title": "t", "reduce": {"value": 1, "source": "x"}}
    row = {"kind": "all_reduce", "ranks": 2, "latency": link["hop"], "bandwidth": link["bandwidth"]}
    good = type(device("l4").link).read({**link, "collectives": [row]}, "x")
    assert good.collectives[0].latency.value == pytest.approx(1e-6)
    for change in ({"kind": "shout"}, {"ranks": 1}, {"latency": 3}):
        with pytest.raises(MachineError):
            type(good).read({**link, "collectives": [{**row, **change}]}, "x")
    assert isinstance(device("l4"), Device)


def test_slow_links_say_why_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(netns.NoLink, match=r"need root|cannot be found"), netns.link("1gbit"):
        pass


def test_a_slow_link_is_gone_afterwards() -> None:
    try:
        netns.check()
    except netns.NoLink as reason:
        pytest.skip(str(reason))
    made: list[Path] = []

    def interrupted() -> None:
        with netns.link("1gbit") as names:
            made.extend(Path("/run/netns", name) for name in names)
            assert all(path.exists() for path in made)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert made and not any(path.exists() for path in made)
