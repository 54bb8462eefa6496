"""Machines: shipped files are complete, clusters load by name and by file, and collectives take what was published."""

from __future__ import annotations

import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardwise.machine.device as machine
from shardwise.errors import MachineError
from shardwise.machine.cluster import Cluster
from shardwise.machine.device import Device, device, known_devices, known_networks, network
from shardwise.machine.here import accelerator
from shardwise.machine.quantity import MEASURES, Quantity

HOME = Path(machine.__file__).parent
KINDS = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


# --- what is shipped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", known_devices())
def test_a_shipped_device_is_complete(name: str) -> None:
    found = device(name)
    assert found.name == name
    assert found.network in known_networks()
    assert 1e8 < found.bandwidth.value < 1e14
    assert 1e9 < found.memory.value < 1e13
    assert found.matmul.value <= 1 and found.attention.value <= 1 and found.reached.value <= 1
    assert found.peak("bf16") >= found.peak("fp32") > 0


@pytest.mark.parametrize("name", known_networks())
def test_a_shipped_network_is_complete(name: str) -> None:
    found = network(name)
    assert found.title
    assert found.bandwidth.source and found.hop.source


@pytest.mark.parametrize("path", sorted(HOME.glob("*/*.toml")), ids=lambda p: p.stem)
def test_every_number_says_where_it_came_from(path: Path) -> None:
    def numbers(table: dict[str, Any]) -> list[dict[str, Any]]:
        inner = [n for value in table.values() if isinstance(value, dict) for n in numbers(value)]
        return [table] if "value" in table else inner

    found = numbers(tomllib.loads(path.read_text()))
    assert len(found) >= 4
    assert all(len(entry["source"]) > 3 for entry in found)


def test_what_was_asked_for_is_shipped() -> None:
    wanted = {"v100-32gb", "a100-40gb", "a100-80gb", "h100-sxm", "h200", "b200", "gb200", "l4", "t4", "tpu-v5p", "p40",
              "cpu-core"}  # fmt: skip
    assert wanted <= set(known_devices())


def test_a_precision_that_a_device_lacks_runs_in_the_nearest() -> None:
    assert device("v100-32gb").peak("bf16") == device("v100-32gb").flops["fp16"].value
    assert device("a100-80gb").peak("fp8") == device("a100-80gb").flops["bf16"].value
    assert device("p40").peak("bf16") == device("p40").flops["fp32"].value


# --- clusters by name -------------------------------------------------------------------------------------------------


def test_names() -> None:
    two = Cluster.load("16x8xh100-sxm")
    assert (len(two.nodes), two.ranks) == (16, 128)
    assert two.device(127).name == "h100-sxm"
    assert Cluster.load("8xa100-80gb").ranks == 8
    assert Cluster.load("2x8xh100-sxm+aws-efa").nodes[0].network is network("aws-efa")
    mixed = Cluster.load("4x8xh100-sxm,2x4xa100-40gb")
    assert mixed.ranks == 40
    assert (mixed.device(31).name, mixed.device(32).name) == ("h100-sxm", "a100-40gb")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("h100-sxm", "NODESxDEVICESxNAME"),
        ("16x8xh100", "did you mean h100-sxm?"),
        ("0x8xh100-sxm", "0 nodes of 8"),
        ("2x8xh100-sxm+efa", "no network is called 'efa'; did you mean aws-efa?"),
        ("", "names no cluster"),
        ("nowhere.toml", "cannot be read"),
    ],
)
def test_a_name_that_names_nothing_is_one_clear_message(name: str, says: str) -> None:
    with pytest.raises(MachineError) as error:
        Cluster.load(name)
    assert says in str(error.value)
    assert error.value.exit_status == 2


# --- clusters by file -------------------------------------------------------------------------------------------------


FILE = """
name = "mine"

[[nodes]]
count = 2
devices = 4
device = "a100-80gb"

[[nodes]]
device = "own"
network = "slow"

[networks.slow]
title = "an old switch"
bandwidth = { value = 1, unit = "Gbit/s", source = "measured" }
launch = { value = 100, unit = "us", source = "measured" }
hop = { value = 50, unit = "us", source = "measured" }
reduce = { value = 2, source = "rings" }
"""


def own_device(tmp: Path, **changes: str) -> str:
    """A device's table for a cluster file: an L4's, with some lines changed."""
    lines = (HOME / "devices" / "l4.toml").read_text().splitlines()
    kept = []
    table = "[devices.own]"
    for line in lines:
        key = line.partition(" =")[0]
        if key == "name":
            continue
        if line.startswith("["):
            line = line.replace("[", "[devices.own.")
        kept.append(changes.get(key, line))
    return "\n".join([table, *kept])


def test_a_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(FILE + own_device(tmp_path))
    found = Cluster.load(path)
    assert found.name == "mine"
    assert [node.devices for node in found.nodes] == [4, 4, 8]
    assert found.device(8).title == "NVIDIA L4 24 GB"
    assert found.nodes[2].network.title == "an old switch"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"memory": ""}, "device own of"),
        ({"memory": 'memory = { value = -4, unit = "GiB", source = "x" }'}, "must be a number above zero, but is -4"),
        ({"memory": 'memory = { value = 4, unit = "GB/s", source = "x" }'}, "must be in bytes"),
        ({"memory": 'memory = { value = 4, unit = "GiB" }'}, "lacks source"),
        ({"memory": "memory = 4"}, "must be like"),
        ({"memory": 'memory = { value = true, unit = "GiB", source = "x" }'}, "must be a number above zero"),
        ({"kind": 'kind = "abacus"'}, "must be one of cpu, cuda, tpu"),
    ],
)
def test_a_device_with_a_missing_or_wrong_number_is_refused(tmp_path: Path, changes: dict[str, str], says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(FILE + own_device(tmp_path, **changes))
    with pytest.raises(MachineError) as error:
        Cluster.load(path)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no [[nodes]]"),
        ("nodes = 4", "has no [[nodes]]"),
        ("[[nodes]]\ncount = 2", "must have a device"),
        ('[[nodes]]\ndevice = "l4"\ncount = -1', "count of node 0"),
        ('[[nodes]]\ndevice = "l4"\ncolour = 1', "must have a device, and may have"),
        ('[[nodes]]\ndevice = "l5"', "no device is called 'l5'"),
        ('colour = 1\n[[nodes]]\ndevice = "l4"', "has 'colour'"),
        ("[[nodes", "is not TOML"),
    ],
)
def test_a_broken_cluster_file_is_one_clear_message(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(MachineError) as error:
        Cluster.load(path)
    assert says in str(error.value)


BASE = {
    "bytes": ("GiB", 2.0**30),
    "bytes a second": ("Gbit/s", 1e9 / 8),
    "operations a second": ("TFLOP/s", 1e12),
    "seconds": ("us", 1e-6),
    "a share": ("", 1.0),
    "a count": ("", 1.0),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_quantities_are_in_base_units(measure: str) -> None:
    unit, times = BASE[measure]
    entry: dict[str, Any] = {"value": 2.5, "source": "here"} | ({"unit": unit} if unit else {})
    found = Quantity.read(entry, measure, "x")
    assert found.value == pytest.approx(2.5 * times)
    assert found.source == "here"


# --- collectives ------------------------------------------------------------------------------------------------------


def test_published_collectives_between_nodes() -> None:
    """Bus bandwidth of 256 MiB on AWS EFA by nodes of 8 H100: all-gather, all-reduce (GB/s)."""
    published = {2: (184.6, 361.7), 4: (119.0, 160.1), 8: (69.0, 99.6), 16: (54.5, 84.7), 32: (28.0, 64.9),
                 64: (11.0, 32.9)}  # fmt: skip
    for nodes, (gather, reduce) in published.items():
        route = Cluster.load(f"{nodes}x8xh100-sxm+aws-efa").path(range(8 * nodes))
        size, part = 2**28, (8 * nodes - 1) / (8 * nodes)
        assert size * part / route.seconds("all_gather", size) / 1e9 == pytest.approx(gather, rel=0.2)
        assert 2 * size * part / route.seconds("all_reduce", size) / 1e9 == pytest.approx(reduce, rel=0.25)


def test_published_all_reduce_within_a_node() -> None:
    """Microseconds of an all-reduce on A100s by ranks and MiB."""
    published = {(2, 64): 405, (2, 1024): 5443, (4, 64): 544, (8, 1): 93, (8, 8): 134, (8, 64): 580, (8, 1024): 8193}
    for (ranks, size), micros in published.items():
        found = Cluster.load("8xa100-80gb").path(range(ranks)).seconds("all_reduce", size * 2**20)
        assert found * 1e6 == pytest.approx(micros, rel=0.25)


@given(
    st.sampled_from(KINDS), st.sampled_from(["a100-80gb", "h100-sxm+aws-efa", "l4"]), st.integers(1, 6),
    st.integers(0, 34), st.integers(0, 6),
)  # fmt: skip
def test_more_bytes_and_more_nodes_never_take_less(kind: str, name: str, nodes: int, size: int, more: int) -> None:
    few, many = (Cluster.load(f"{2**n}x8x{name}") for n in (nodes, nodes + 1))
    small, large = few.path(range(few.ranks)), many.path(range(many.ranks))
    assert small.seconds(kind, 2**size) <= small.seconds(kind, 2 ** (size + more))
    assert small.seconds(kind, 2**size) <= large.seconds(kind, 2**size) * (1 + 1e-9)


def test_one_rank_sends_nothing() -> None:
    route = Cluster.load("2x8xh100-sxm").path([3])
    assert all(route.seconds(kind, 1e9) == 0 for kind in KINDS)


def test_ranks_of_one_node_share_its_network() -> None:
    cluster = Cluster.load("4x8xa100-80gb")
    one, two = cluster.path([0, 8, 16, 24]), cluster.path([0, 1, 8, 9, 16, 17, 24, 25])
    assert two.bandwidth == pytest.approx(2 * one.bandwidth)
    assert one.nodes == two.nodes == 4


def test_the_slowest_link_counts_where_nodes_are_unequal() -> None:
    cluster = Cluster.load("2x8xh100-sxm,2x8xt4")
    fast, slow, both = cluster.path(range(8)), cluster.path(range(16, 24)), cluster.path(range(32))
    assert fast.bandwidth > slow.bandwidth >= both.bandwidth


def test_devices_of_a_cluster_differ() -> None:
    cluster = Cluster.load("1x2xh100-sxm,1x2xa100-80gb")
    kinds = [cluster.device(rank).name for rank in range(4)]
    assert kinds == ["h100-sxm", "h100-sxm", "a100-80gb", "a100-80gb"]
    assert isinstance(cluster.device(0), Device)


def test_what_scaling_says_is_checked(tmp_path: Path) -> None:
    given_ = '[networks.n]\ntitle = "n"\n' + "\n".join(
        f'{key} = {{ value = 1, unit = "{unit}", source = "x" }}'
        for key, unit in (("bandwidth", "GB/s"), ("launch", "us"), ("hop", "us"))
    )
    end = '\nreduce = { value = 2, source = "x" }\n[networks.n.scaling]\nsource = "x"\n'
    path = tmp_path / "c.toml"
    for scaling, says in [
        ("nodes = [2, 4]\ngather = [1, 0.5]\nall_reduce = [1]", "lists of one length"),
        ("nodes = [4, 2]\ngather = [1, 0.5]\nall_reduce = [1, 0.5]", "growing numbers"),
        ("nodes = [2]\ngather = [1.5]\nall_reduce = [1]", "shares above 0 and up to 1"),
    ]:
        path.write_text(f'[[nodes]]\ndevice = "l4"\nnetwork = "n"\n{given_}{end}{scaling}\n')
        with pytest.raises(MachineError, match=says):
            Cluster.load(path)


def test_beyond_what_is_known_scaling_goes_on_falling() -> None:
    efa = network("aws-efa")
    nodes = [2, 3, 4, 6, 8, 64, 128, 256]
    shares = [efa.left(n, "all_gather") for n in nodes]
    assert all(a > b for a, b in pairwise(shares))
    assert efa.left(128, "all_reduce") == pytest.approx(efa.left(64, "all_reduce") / 2)


def test_an_all_reduce_of_few_ranks_of_each_node_keeps_more() -> None:
    efa = network("aws-efa")
    assert efa.left(32, "all_reduce", 1 / 8) == pytest.approx(efa.left(4, "all_reduce"))
    assert efa.left(4, "all_reduce", 1 / 8) == efa.left(2, "all_reduce")
    assert efa.left(32, "all_reduce", 1 / 8) > efa.left(32, "all_reduce", 1 / 2) > efa.left(32, "all_reduce")
    assert efa.left(32, "all_gather", 1 / 8) == efa.left(32, "all_gather")
    one, all_ = (Cluster.load("32x8xh100-sxm+aws-efa").path(range(0, 256, step)) for step in (8, 1))
    assert 8 * one.reduce_bandwidth > all_.reduce_bandwidth and 8 * one.bandwidth == pytest.approx(all_.bandwidth)


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "unknown"),
    ],
)
def test_the_accelerator_at_hand_is_known_by_its_driver_s_name(title: str, name: str) -> None:
    assert accelerator(title).name == name
