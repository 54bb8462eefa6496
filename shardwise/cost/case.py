"""Case: a plan on a cluster but for where its stages begin: what any stretch of operators would take as a stage.

Everything works on single stages and on all stretches between bounds at once, so that a plan's price and the search for
its cuts are one reckoning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from shardwise.cost.estimate import Estimate
from shardwise.cost.place import COPIES, DATA, SHARDS, Place
from shardwise.cost.profile import NOTHING, Besides, Profile
from shardwise.cost.table import PLAIN, Held, Stretches, Table
from shardwise.cost.timeline import ahead_seconds, bubble_lost, most_held, pipeline_seconds
from shardwise.cost.weights import Array
from shardwise.parallel.schedule import stage_rank
from shardwise.plan.plan import PIPELINE, Plan

_LEAST = 1e-12
"""Seconds below which nothing takes a time."""
_BACK = 0.4
"""Share of what an allocator keeps besides that it can give back; fitted on which plans of ultrascale ran."""


@dataclass(frozen=True)
class Times:
    """Seconds of a stage for one micro-batch.

    Attributes:
        forward, backward: in all.
        later: of backward in two halves the second.
        compute: of the device, both ways.
        waits: for the host, both ways.
        turn: for the host besides, where forward and backward of micro-batches alternate; part of neither.
        lead: share of a micro-batch by which the host is through before the device.
        sent, hidden: of each axis's collectives, both ways: what nothing hides, and what computing hides.
    """

    forward: Array
    backward: Array
    later: Array
    compute: Array
    waits: Array
    turn: Array
    lead: Array
    sent: Mapping[str, Array]
    hidden: Mapping[str, Array]


class Case:
    """A plan on a cluster but for where its stages begin.

    Args:
        plan: how the model is split; its cuts are not looked at.
        profile: the framework that runs it.
        tables: of each pipeline rank, of those of its ranks that take longest.
        held: the same of those that have least room, where ranks have unequal shares of the batch.
        places: of each pipeline rank.
        copies: how many alike layers the model has.
        besides: what the framework does that the plan does not say.

    Attributes:
        ways: how often what crosses a cut is carried: there and back.
        lost: share of a bubble in which processors wait too; less than 1 where ranks share them.
    """

    ways = 2

    def __init__(
        self,
        plan: Plan,
        profile: Profile,
        tables: Sequence[Table],
        held: Sequence[Table],
        places: Sequence[Place],
        copies: int,
        besides: Besides = NOTHING,
    ) -> None:
        self.plan, self.profile, self.tables, self.held, self.places = plan, profile, tables, held, places
        if profile.outside:
            self.places = [replace(place, memory=place.memory - profile.outside) for place in places]
        self._copies = copies
        self.data = self.sharing(plan)
        self.shards, self.ahead = min(besides.shards or self.data, self.data), besides.ahead
        self.spread, self.zero = besides.spread, plan.zero or besides.zero
        crowds = {place.device.crowd.value if place.device.crowd else 1.0 for place in places}
        self.lost = bubble_lost(plan.pipeline, plan.micro_batches, crowds.pop() if len(crowds) == 1 else 1.0)

    def sharing(self, plan: Plan) -> int:
        """How many ranks have the same weights and other samples."""
        return math.prod(axis.size for axis in plan.axes if axis.dims == ("batch",))

    # -- time --------------------------------------------------------------------------------------------------------

    def times(self, rank: int, s: Stretches) -> Times:
        """Seconds of stretches as stages of a pipeline rank."""
        p, place = self.profile, self.places[rank]
        behind = p.overlap_gather * self._apart(rank)
        rate = place.device.bandwidth.value * place.device.reached.value
        shown = 1.0 - p.overlap_tensor
        # In all micro-batches but the first a gradient is added to one that is there.
        added = s.weights * p.accumulate * (1 - 1 / self.plan.micro_batches) / rate
        forward, backward = s.forward, s.backward + s.again + added
        halved = place.device.halved
        if halved is not None and rank and self.plan.schedule == "zero-bubble":  # the first stage receives nothing
            backward = backward + s.meets * halved.value
        all_sent: dict[str, Array] = {}
        ways, staged = [], []
        for messages in (s.sent, s.sent_back):
            total, host = np.zeros_like(s.forward), np.zeros_like(s.forward)
            for (axis, kind), (calls, size) in messages.items():
                route = place.routes[axis]
                fixed, each = route.parts(kind)
                fixed += p.step * (route.ranks - 1) * (route.nodes > 1)
                host = host + p.step_staged * (route.ranks - 1) * calls
                seconds = calls * fixed + size * each
                total = total + seconds
                all_sent[axis] = all_sent.get(axis, 0.0) + seconds
            ways.append(total * shown)
            staged.append(host + p.tick)
        hosts = [p.call * calls for calls in (s.calls, s.calls_back)]
        busy = [forward + ways[0], backward + ways[1]]
        waits = [np.maximum(0.0, host - device) for host, device in zip(hosts, busy, strict=True)]
        turn = np.zeros_like(s.forward)
        if PIPELINE in place.routes and place.routes[PIPELINE].nodes > 1:
            hosts = [host + more for host, more in zip(hosts, staged, strict=True)]
            turn = np.maximum(0.0, hosts[0] + hosts[1] - busy[0] - busy[1] - waits[0] - waits[1])
        lead = np.maximum(0.0, 1 - p.late * (hosts[0] + hosts[1]) / np.maximum(busy[0] + busy[1], _LEAST))
        gather, scatter = self._gather(rank, s)
        once_more = gather + scatter
        # What runs behind computing slows it: the rest of its time is hidden.
        away = 1 - p.contention
        hid = away * np.minimum(gather, behind * forward), away * np.minimum(once_more, behind * backward)
        gathers = gather - hid[0], once_more - hid[1]
        sent = {axis: seconds * shown for axis, seconds in all_sent.items()}
        hidden = {axis: seconds * p.overlap_tensor for axis, seconds in all_sent.items()}
        if self.plan.zero == 3:
            sent[DATA] = sent.get(DATA, 0.0) + gathers[0] + gathers[1]
            hidden[DATA] = hidden.get(DATA, 0.0) + hid[0] + hid[1]
        return Times(
            forward + ways[0] + waits[0] + gathers[0],
            backward + ways[1] + waits[1] + gathers[1],
            s.later + added,
            forward + backward,
            waits[0] + waits[1],
            turn,
            lead,
            sent,
            hidden,
        )

    def _step(self) -> float:
        """Seconds that a step takes besides its operators and gradients, where that was measured."""
        step = self.places[0].device.step
        if step is None:
            return 0.0
        # The loss and its count are summed over the ranks that have parts of them.
        routes = self.places[0].routes
        sums = [routes[axis].parts("all_reduce")[0] for axis in (DATA, PIPELINE) if axis in routes]
        return step.value + 2 * sum(sums)

    def _apart(self, rank: int) -> float:
        """Whether sending leaves computing alone: cores copy what they send."""
        return float(self.places[rank].device.kind != "cpu")

    def _gather(self, rank: int, s: Stretches) -> tuple[Array, Array]:
        """Seconds to gather sharded weights once, layer by layer, and to sum and scatter their gradients."""
        if self.plan.zero < 3 or self.data == 1:
            return np.zeros_like(s.weights), np.zeros_like(s.weights)
        p, route = self.profile, self.places[rank].routes[SHARDS]
        layers = s.weights / max(float(self.tables[rank].whole.weights), 1.0) * self._copies
        calls = np.maximum(1.0, layers * p.pieces)
        weights = s.weights * p.send_weight if p.send_weight else s.weight_bytes
        (start, each), (start_sum, each_sum) = route.parts("all_gather"), self._scattered(rank)
        sums = each_sum * s.weights * p.send_gradient
        return start * calls + each * weights * p.fetch, start_sum * calls + sums * p.fetch

    def _scattered(self, rank: int) -> tuple[float, float]:
        """Seconds to sum and scatter nothing, and of each byte: among the shards, then of each among its copies."""
        routes = self.places[rank].routes
        parts = routes[SHARDS].parts("reduce_scatter"), routes[COPIES].parts("all_reduce")
        return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1] / self.shards

    def sends(self, rank: int, carried: Array) -> Array:
        """Seconds to carry so many bytes from a stage of this pipeline rank to the next."""
        if PIPELINE not in self.places[rank].routes:
            return np.zeros_like(carried)
        fixed, each = self.places[rank].routes[PIPELINE].parts("send")
        return fixed + each * carried

    def reduction(self, rank: int, s: Held, backward: Array) -> tuple[Array, Array, dict[str, Array]]:
        """Seconds of summing a pipeline rank's gradients.

        Returns:
            over the axes that split the batch what nothing hides, and what backward hides; and over other axes.
        """
        p, routes = self.profile, self.places[rank].routes
        others = {}
        for axis, entries in s.summed.items():
            fixed, each = routes[axis].parts("all_reduce")
            others[axis] = np.where(entries > 0, fixed + each * entries * p.send_gradient, 0.0)
        if self.data == 1 or self.plan.zero == 3:  # which sums them in each micro-batch, with the gathers
            return np.zeros_like(s.weights), np.zeros_like(s.weights), others
        grads = s.weights * p.send_gradient
        device = self.places[rank].device
        # Buckets are filled: gradients are read and written once more.
        copied = 2 * grads / (device.bandwidth.value * device.reached.value) * (1 - self._apart(rank))
        fixed, each = routes[DATA].parts("all_reduce") if self.plan.zero == 0 else self._scattered(rank)
        buckets = np.maximum(1.0, s.weights / p.bucket) if self.plan.zero == 0 and p.bucket else 1.0
        time = fixed * buckets + each * grads + copied
        share = p.overlap_scatter if self.plan.zero else p.overlap_data
        behind = np.minimum(time, share * self._apart(rank) * backward) * (1 - p.contention)
        if self.plan.zero in (1, 2):
            # Updated weights are gathered after the update; some frameworks do so behind the next step's forward.
            fixed, each = routes[SHARDS].parts("all_gather")
            # Some send each rank's share by a broadcast of its own; of some the host cuts and joins each weight.
            gather = fixed * (self.shards if p.broadcasts else 1) + each * s.weight_bytes
            time = time + gather + p.shard * s.tensors * self.shards
            hid = np.minimum(gather, p.overlap_gather * self._apart(rank) * backward / 2)
            behind = behind + hid * (1 - p.contention)
        return time - behind, behind, others

    def update(self, rank: int, s: Held) -> Array:
        """Seconds of the optimizer."""
        p, device = self.profile, self.places[rank].device
        moved = s.weights / self._shards(1) * (2 * p.state + p.gradient + 4)
        return moved / (device.bandwidth.value * device.reached.value)

    # -- memory ------------------------------------------------------------------------------------------------------

    def memory(self, s: Held, flight: float, half: float = 0.0) -> dict[str, Array]:
        """Bytes of stretches as a rank's stages, by item.

        Args:
            s: the stretches.
            flight: micro-batches in flight.
            half: of these those that are half through backward.
        """
        p, plan = self.profile, self.plan
        several = plan.micro_batches > 1
        # Gradients of parameters that backward makes one after the other, where none are accumulated or sent.
        more = s.growing if p.stepwise and not several and self.data == 1 else s.largest
        if p.stepwise and half:
            # Or it is fullest when the first half of all is through and the second half of the first begins.
            more = np.maximum(more, s.halved - s.kept + s.late)
        beside = (self.data > 1) + (flight > 1)
        gathered = 2 * s.weights * 4 / self._copies if plan.zero == 3 and self.data > 1 else 0.0 * s.weights
        found = {
            "parameters": s.weight_bytes / self._shards(3),
            # Over several micro-batches whole gradients are accumulated, but for ZeRO-3.
            "gradients": s.weights * (p.gradient / self._shards(3 if several else 2) + p.beside * beside),
            "optimizer": s.weights * p.state / self._shards(1),
            # While a block is computed again, what it keeps is there; gathered weights are those of two blocks.
            "activations": s.kept * (flight - half) + s.halved * half + s.inside + more,
            "buffers": p.fixed + gathered + self.rooms(s),
        }
        return {**found, "reserve": self.reserve * sum(found.values())}  # type: ignore[dict-item]

    def rooms(self, s: Held) -> Array:
        """Bytes of stretches that wait to be sent, or are there to receive; of other frameworks none."""
        # What comes next is there, and what was sent last; and a bucket's gradients are whole until they are summed.
        whole = self.plan.zero == 2 and self.plan.micro_batches == 1
        bucket = whole * np.minimum(self.plan.bucket_bytes, 4 * s.weights) * (1 - 1 / self._shards(2))
        return (s.passed * min(self.plan.micro_batches, 3) + bucket) * self.profile.stepwise

    def waiting(self, s: Stretches, lead: Array, flight: float) -> Array:
        """Bytes gathered along tensor axes whose memory waits for the device, where only own parts are kept.

        The host goes on without them, but what a collective writes is given back when the device is through with it.
        The host is ahead where its work is the shorter, more with each micro-batch; and, whatever its work, while it
        fills a pipeline, in whose steady state it has begun one micro-batch more; but by no more operators than the
        device has room for in its queue.
        """
        p = self.profile
        sizes = [size for (axis, kind), (_, size) in s.sent.items() if kind == "all_gather" and axis != DATA]
        if not p.regather or not sizes:
            return np.zeros_like(s.forward)
        micros = lead * self.plan.micro_batches
        if self.plan.pipeline > 1:
            micros = max(flight - 2, 0.0) + np.minimum(1.0, micros) * (min(flight, 2.0) + (flight > 1))
        return sum(sizes[1:], sizes[0]) * np.minimum(micros, p.queue / np.maximum(s.calls, 1.0))

    @cached_property
    def reserve(self) -> float:
        """Share by which the allocator keeps more than is in use; a CPU's is the system's, and keeps nothing apart."""
        return self.profile.reserve * self._apart(0)

    def _shards(self, from_stage: int) -> int:
        return self.shards * self.spread if self.zero >= from_stage else 1

    def in_flight(self, rank: int, stages: int) -> float:
        """Micro-batches whose activations a pipeline rank holds at most, over all its stages."""
        plan, ranks = self.plan, self.plan.pipeline
        each = stages // ranks
        if plan.schedule == "gpipe":
            return plan.micro_batches * each
        if plan.schedule == "zero-bubble":
            # The second half of a backward comes as late as the first rank's, and keeps what it needs.
            return min(plan.micro_batches, ranks * self.ahead) * each
        if each == 1:
            return min(plan.micro_batches, ranks - rank)
        ahead = (each - 1) * ranks + 2 * (ranks - rank - 1) + 1
        return min(plan.micro_batches * each, ahead)

    def kept_flight(self, rank: int, kept: Sequence[float]) -> float:
        """Micro-batches in flight in the mean over a rank's stages, of which each keeps so many bytes for one."""
        if not sum(kept):
            return 0.0
        ways = self._ways(rank, len(kept))
        return max(sum(n * size for n, size in zip(way, kept, strict=True)) for way in ways) / sum(kept)

    def least_flight(self, rank: int, each: int) -> float:
        """Micro-batches in flight in the mean over so many stages of a rank, whatever each of them keeps."""
        return max(min(way) for way in self._ways(rank, each))

    def _ways(self, rank: int, each: int) -> Sequence[Sequence[float]]:
        """How many micro-batches a rank's stages hold when they hold the most; some hold them in turns."""
        stages = self.plan.pipeline * each
        if self.plan.schedule == "interleaved":
            return most_held(self.plan.pipeline, each, self.plan.micro_batches, rank)
        return [[self.in_flight(rank, stages) / each] * each]

    def half_done(self, rank: int) -> int:
        """Of the micro-batches in flight on a pipeline rank those that are half through backward.

        That is when the rank begins the first half of another, which is there with all that it keeps; of other
        frameworks, whose memory is not followed through backward, when it is through with that.
        """
        another = self.profile.stepwise
        return min(self.plan.micro_batches - another, rank + 1 - another) if self.plan.schedule == "zero-bubble" else 0

    # -- all of it ---------------------------------------------------------------------------------------------------

    @cached_property
    def _built(self) -> float:
        """Bytes of the model's parameters."""
        return float(sum(v.bytes().at(1) for v in set(self.tables[0].graph.params.values())))

    @cached_property
    def _end(self) -> int:
        return len(self.tables[0].graph.ops)

    def estimate(self, cuts: Sequence[int]) -> Estimate:
        """The price with stages that begin at these operators, the first at none."""
        bounds, ranks, micros = [0, *cuts, self._end], self.plan.pipeline, self.plan.micro_batches
        owners = [stage_rank(i, ranks) for i in range(len(bounds) - 1)]
        own, full = (_stages(tables, bounds, owners) for tables in (self.tables, self.held))
        times = [self.times(r, s) for r, s in zip(owners, own, strict=True)]
        forward, backward = [float(t.forward) for t in times], [float(t.backward) for t in times]
        carried = [self.tables[0].live[cut] for cut in cuts]
        sends = [float(self.sends(r, size)) for r, size in zip(owners, carried, strict=False)]
        total = self._through(times, sends)
        compute, waits = (sum(float(getattr(t, key)) for t in times) * micros / ranks for key in ("compute", "waits"))
        sent, hidden = (_by_axis([getattr(t, key) for t in times], micros / ranks) for key in ("sent", "hidden"))
        # Who shares a processor needs it to send and to receive.
        carrying = self.ways * micros * sum(sends) / ranks * (self.lost < 1)
        bubble = max(total - compute - waits - sum(sent.values()) - carrying, 0.0) * self.lost if cuts else 0.0
        merged, most = (
            [_sum([s for s, r in zip(those, owners, strict=True) if r == rank]) for rank in range(ranks)]
            for those in (own, full)
        )
        last = [sum(b for b, r in zip(backward, owners, strict=True) if r == rank) for rank in range(ranks)]
        reductions = [self.reduction(r, s, np.array(last[r])) for r, s in enumerate(merged)]
        slowest = max(reductions, key=lambda r: float(r[0]) + sum(float(x) for x in r[2].values()))
        sent[DATA] = sent.get(DATA, 0.0) + float(slowest[0])
        hidden[DATA] = hidden.get(DATA, 0.0) + float(slowest[1])
        for axis, more in slowest[2].items():
            sent[axis] = sent.get(axis, 0.0) + float(more)
        if cuts:
            sent[PIPELINE] = self._tied(merged) + carrying
        seconds = {"compute": compute, "overhead": waits + self._step()}
        seconds |= {f"communication {axis}": s for axis, s in sent.items() if s}
        seconds |= {"bubble": bubble, "update": max(float(self.update(r, s)) for r, s in enumerate(merged))}
        memory = []
        for rank, s in enumerate(most):
            kept = [float(part.kept) for part, r in zip(full, owners, strict=True) if r == rank]
            flight = self.kept_flight(rank, kept)
            found = self.memory(s, flight, self.half_done(rank) / len(kept))
            items = {item: float(size) for item, size in found.items()}
            mine = [(o, t) for o, t, r in zip(own, times, owners, strict=True) if r == rank]
            loose = sum(float(self.waiting(o, t.lead, flight)) for o, t in mine)
            loose += self.profile.fragments * sum(kept) * (flight > 1)
            # Where there is no room for it, the allocator waits for the device and has a part back.
            room = max(self.places[rank].memory - sum(items.values()), 0.0) / (1 + self.reserve)
            loose = max(min(loose, room), loose * (1 - _BACK))
            items["buffers"] += loose
            items["reserve"] += loose * self.reserve
            if self.profile.whole and not self._apart(rank):
                shards = items["parameters"] if self.plan.zero == 3 else 0.0  # made while the whole is there
                items["whole model"] = max(self._built + shards - sum(items.values()), 0.0)
            memory.append(items)
        limits = tuple(place.memory for place in self.places)
        pace = self.pace(forward, sends)
        return Estimate(seconds, {k: v for k, v in hidden.items() if v}, tuple(memory), limits, pace)

    def _tied(self, ranks: Sequence[Stretches]) -> float:
        """Seconds to sum the gradients of parameters that two pipeline ranks use, such as an embedding's."""
        again = sum(float(s.weights) for s in ranks) - float(self.tables[0].whole.weights)
        if again < 1 or self.ways == 1:
            return 0.0
        fixed, each = self.places[0].routes[PIPELINE].parts("all_reduce")
        ring = 2 * (self.plan.pipeline - 1) / self.plan.pipeline  # of two ranks it is 1
        return fixed + each / ring * again * self.profile.send_gradient

    def pace(self, forward: Sequence[float], sends: Sequence[float]) -> float:
        """Seconds from one batch to the next; 0 where the next waits for all that a step takes."""
        return 0.0

    def _through(self, stages: Sequence[Times], sends: Sequence[float]) -> float:
        """Seconds of all micro-batches through all stages."""
        micros, ranks = self.plan.micro_batches, self.plan.pipeline
        forward, backward, turns, later = (
            [float(getattr(t, key)) for t in stages] for key in ("forward", "backward", "turn", "later")
        )
        if self.ahead > 1:
            return ahead_seconds(self.ahead * ranks, micros, forward, backward, sends, later)
        return pipeline_seconds(self.plan.schedule, ranks, micros, forward, backward, sends, turns, later)


def _stages(tables: Sequence[Table], bounds: Sequence[int], owners: Sequence[int]) -> list[Stretches]:
    """What each stage needs, by the table of the rank that has it."""
    each = {id(table): table.between(bounds) for table in {id(t): t for t in tables}.values()}
    return [each[id(tables[rank])].pick(i, i + 1) for i, rank in enumerate(owners)]


def _by_axis(stages: Sequence[Mapping[str, Array]], times: float) -> dict[str, float]:
    """What stages take by axis, summed."""
    found: dict[str, float] = {}
    for stage in stages:
        for axis, seconds in stage.items():
            found[axis] = found.get(axis, 0.0) + float(seconds) * times
    return found


def _sum(parts: Sequence[Stretches]) -> Stretches:
    """What the stages of one rank need together; messages are not added."""
    if len(parts) == 1:
        return parts[0]
    plain = {}
    for name in PLAIN:
        values = [getattr(s, name) for s in parts]
        plain[name] = max(values) if name in ("inside", "largest", "growing", "late") else sum(values)
    summed = {axis: sum(s.summed[axis] for s in parts) for axis in parts[0].summed}
    return Stretches(**plain, summed=summed, sent={}, sent_back={})  # type: ignore[arg-type]
