"""Cluster: nodes of devices and what joins them; and what a collective of some of their ranks takes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from shardwise.errors import MachineError
from shardwise.machine.curve import parts_of
from shardwise.machine.device import Device, Link, device, known_devices, network, read_toml
from shardwise.machine.quantity import Quantity

_PART = re.compile(r"(?:(?P<nodes>\d+)x)?(?P<devices>\d+)x(?P<device>[a-z][\w.-]*)")


@dataclass(frozen=True)
class Node:
    """A machine: so many devices of a kind, and the network that joins it to others."""

    devices: int
    device: Device
    network: Link


@dataclass(frozen=True)
class Route:
    """What a group of ranks sends over: how many ranks on how many nodes, and the slowest links between them.

    Attributes:
        bandwidth: bytes a second that a rank sends in a ring.
        reduce: how many times as long as an all-gather an all-reduce takes.
        reduce_bandwidth: as `bandwidth`, in an all-reduce.
        measured: for kinds that were measured, seconds of an empty one and of each byte.
    """

    ranks: int
    nodes: int
    launch: float
    hop: float
    bandwidth: float
    reduce: float
    reduce_bandwidth: float
    measured: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def seconds(self, kind: str, size: float) -> float:
        """Seconds of a collective.

        Args:
            kind: "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast" or "send".
            size: bytes of the whole tensor; of what one rank sends for "send" and "all_to_all".
        """
        fixed, each = self.parts(kind)
        return fixed + each * size

    def parts(self, kind: str) -> tuple[float, float]:
        """Seconds of an empty collective, and of each byte, by α-β over a ring (Thakur et al., 2005)."""
        n = self.ranks
        if n < 2:
            return 0.0, 0.0
        if kind in self.measured:
            return self.measured[kind]
        if kind == "send":
            return self.launch + self.hop, 1 / self.bandwidth
        if kind == "all_reduce":
            # Between nodes it runs over trees (Sanders et al., 2009, as NCCL does), whose depth grows as a logarithm.
            steps = 2 * (math.log2(self.nodes) if self.nodes > 1 else n - 1)
            return self.launch + steps * self.hop, self.reduce * (n - 1) / n / self.reduce_bandwidth
        return self.launch + (n - 1) * self.hop, (n - 1) / n / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """The machines that a job may run on.

    Attributes:
        name: what it was loaded as.
        nodes: in the order of ranks; consecutive ranks share a node.
    """

    name: str
    nodes: tuple[Node, ...]

    @classmethod
    def load(cls, what: str | Path) -> Cluster:
        """A cluster by its name or from a file.

        Args:
            what: `16x8xh100-sxm`: 16 nodes of 8 such devices; `8xa100-80gb`: one node; `2x8xh100-sxm+aws-efa`: with
                another network; `4x8xh100-sxm,4x8xa100-80gb`: unequal nodes; or the path of a TOML file.

        Raises:
            MachineError: the name is not of this form, a device is unknown, or the file lacks a number.
        """
        text = str(what)
        if text.endswith(".toml") or "/" in text:
            return cls._from_file(Path(text))
        nodes: list[Node] = []
        for part in text.split(","):
            body, plus, net = part.strip().partition("+")
            found = _PART.fullmatch(body)
            if found is None:
                raise MachineError(
                    f"{text!r} names no cluster; write NODESxDEVICESxNAME, such as 16x8xh100-sxm, or the path of a "
                    f".toml file; devices are {', '.join(known_devices())}"
                )
            count, each = int(found["nodes"] or 1), int(found["devices"])
            if count < 1 or each < 1:
                raise MachineError(f"{text!r} has no devices: {count} nodes of {each}; both must be at least 1")
            kind = device(found["device"])
            nodes += [Node(each, kind, network(net if plus else kind.network))] * count
        return cls(text, tuple(nodes))

    @classmethod
    def _from_file(cls, path: Path) -> Cluster:
        table = read_toml(path)
        strange = sorted(set(table) - {"name", "devices", "networks", "nodes"})
        if strange or not isinstance(table.get("nodes"), list) or not table["nodes"]:
            fact = f"has {strange[0]!r}" if strange else "has no [[nodes]]"
            raise MachineError(
                f"the cluster file {path} {fact}; it has name, [[nodes]], [devices.NAME], [networks.NAME]"
            )
        own = {n: Device.read({"name": n, **t}, f"device {n} of {path}") for n, t in table.get("devices", {}).items()}
        nets = {n: Link.read(t, f"network {n} of {path}") for n, t in table.get("networks", {}).items()}
        nodes: list[Node] = []
        for i, entry in enumerate(table["nodes"]):
            where = f"node {i} of {path}"
            keys = {"count", "devices", "device", "network"}
            if not isinstance(entry, dict) or set(entry) - keys or "device" not in entry:
                raise MachineError(
                    f"{where} must have a device, and may have {', '.join(sorted(keys))}, but is {entry!r}"
                )
            kind = own.get(str(entry["device"])) or device(str(entry["device"]))
            count, each = entry.get("count", 1), entry.get("devices", int(kind.node.value))
            for key, number in (("count", count), ("devices", each)):
                if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                    raise MachineError(f"{key} of {where} must be a whole number of at least 1, but is {number!r}")
            name = str(entry.get("network", kind.network))
            nodes += [Node(each, kind, nets.get(name) or network(name))] * count
        return cls(str(table.get("name", path.stem)), tuple(nodes))

    def with_links(self, times: float, *, inside: bool = True, between: bool = True, instant: bool = False) -> Cluster:
        """The same machines with links so many times as fast: those inside of nodes, between nodes, or both.

        Args:
            instant: whether a collective also starts at once.
        """

        def faster(link: Link) -> Link:
            found = replace(link, bandwidth=Quantity(link.bandwidth.value * times, link.bandwidth.source))
            none = Quantity(0.0, "none")
            found = replace(found, collectives=tuple(
                replace(row, bandwidth=Quantity(row.bandwidth.value * times, row.bandwidth.source),
                        latency=none if instant else row.latency)
                for row in link.collectives
            ))  # fmt: skip
            return replace(found, launch=none, hop=none) if instant else found

        changed: dict[int, Node] = {}
        for node in self.nodes:
            if id(node) not in changed:
                kind = replace(node.device, link=faster(node.device.link)) if inside else node.device
                changed[id(node)] = Node(node.devices, kind, faster(node.network) if between else node.network)
        return Cluster(self.name, tuple(changed[id(node)] for node in self.nodes))

    def with_memory(self, times: float) -> Cluster:
        """The same machines with so many times the memory."""

        def larger(node: Node) -> Node:
            memory = Quantity(node.device.memory.value * times, node.device.memory.source)
            return replace(node, device=replace(node.device, memory=memory))

        changed = {id(node): larger(node) for node in {id(node): node for node in self.nodes}.values()}
        return Cluster(self.name, tuple(changed[id(node)] for node in self.nodes))

    def times(self, count: int) -> Cluster:
        """So many times these machines."""
        return Cluster(f"{count} times {self.name}", self.nodes * count)

    def first(self, ranks: int) -> Cluster:
        """The first so many devices."""
        nodes, left = [], ranks
        for node in self.nodes:
            if left:
                nodes.append(node if node.devices <= left else replace(node, devices=left))
                left -= nodes[-1].devices
        return Cluster(f"{ranks} of {self.name}", tuple(nodes))

    # -- reading -----------------------------------------------------------------------------------------------------

    @cached_property
    def ranks(self) -> int:
        """How many devices there are."""
        return sum(node.devices for node in self.nodes)

    @cached_property
    def _starts(self) -> list[int]:
        starts, total = [], 0
        for node in self.nodes:
            starts.append(total)
            total += node.devices
        return starts

    @cached_property
    def _node_of(self) -> list[int]:
        return [i for i, node in enumerate(self.nodes) for _ in range(node.devices)]

    def device(self, rank: int) -> Device:
        """What a rank computes with."""
        return self.nodes[self._node_of[rank]].device

    def path(self, ranks: Sequence[int]) -> Route:
        """What these ranks send over, where all groups alike send at once."""
        counts: dict[int, int] = {}
        for rank in ranks:
            counts[self._node_of[rank]] = counts.get(self._node_of[rank], 0) + 1
        inside = [self.nodes[i].device.link for i in counts]
        bandwidth = min(link.bandwidth.value for link in inside)
        launch, hop = max(link.launch.value for link in inside), max(link.hop.value for link in inside)
        if len(counts) == 1:
            reduce = max(link.reduce.value for link in inside)
            measured = parts_of(inside[0].collectives, len(ranks))
            return Route(len(ranks), 1, launch, hop, bandwidth, reduce, bandwidth, measured)
        between = [(self.nodes[i].network, n, n / self.nodes[i].devices) for i, n in counts.items()]
        # A ring enters and leaves each node once, over the network cards of all its ranks there.
        n = len(counts)
        gather, reducing = (
            min(bandwidth, *(net.bandwidth.value * net.left(n, kind, part) * here for net, here, part in between))
            for kind in ("all_gather", "all_reduce")
        )
        launch = max(launch, *(net.launch.value for net, *_ in between))
        hop = max(hop, *(net.hop.value for net, *_ in between))
        reduce = max(net.reduce.value for net, *_ in between)
        # Measured numbers hold for the group that was measured: alike networks, one rank a node.
        alone = len(ranks) == n and all(net == between[0][0] for net, *_ in between)
        measured = parts_of(between[0][0].collectives, n) if alone else {}
        return Route(len(ranks), n, launch, hop, gather, reduce, reducing, measured)
