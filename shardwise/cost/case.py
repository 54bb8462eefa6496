"""Case: a plan on a cluster but for where its stages begin: what any stretch of operators would take as a stage.

Everything works on single stages and on all stretches between bounds at once, so that a plan's price and the search for
its cuts are one reckoning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from shardwise.cost.estimate import Estimate, Spent
from shardwise.cost.flight import Flight
from shardwise.cost.pairs import NEIGHBOURS, Array
from shardwise.cost.place import COPIES, DATA, SHARDS, Place
from shardwise.cost.profile import NOTHING, Besides, Profile
from shardwise.cost.stages import Group, Times, by_axis, by_rank
from shardwise.cost.stretches import Held, Stretches, Taken
from shardwise.cost.table import Table
from shardwise.cost.timeline import ahead_seconds, bubble_lost, pipeline_seconds
from shardwise.parallel.schedule import stage_rank
from shardwise.plan.plan import PIPELINE, Plan

_LEAST = 1e-12
"""Seconds below which nothing takes a time."""
_BACK = 0.4
"""Share of what an allocator keeps besides that it can give back; fitted on which plans of ultrascale ran."""


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
        self.flight = Flight(plan.schedule, plan.pipeline, plan.micro_batches, besides.ahead, profile.stepwise)
        self.spread, self.zero = besides.spread, plan.zero or besides.zero
        crowds = {place.device.crowd.value if place.device.crowd else 1.0 for place in places}
        self.lost = bubble_lost(plan.pipeline, plan.micro_batches, crowds.pop() if len(crowds) == 1 else 1.0)

    @cached_property
    def alike(self) -> Sequence[Sequence[int]]:
        """The pipeline ranks, those together that have the same tables and the same place."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank, parts in enumerate(zip(self.tables, self.held, self.places, strict=True)):
            found.setdefault(tuple(map(id, parts)), []).append(rank)
        return list(found.values())

    def sharing(self, plan: Plan) -> int:
        """How many ranks have the same weights and other samples."""
        return math.prod(axis.size for axis in plan.axes if axis.dims == ("batch",))

    # -- time --------------------------------------------------------------------------------------------------------

    def times(self, rank: int, s: Taken) -> Times:
        """Seconds of stretches as stages of a pipeline rank."""
        p, place = self.profile, self.places[rank]
        behind = p.overlap_gather * self._apart(rank)
        rate = place.device.bandwidth.value * place.device.reached.value
        shown = 1.0 - p.overlap_tensor
        # In all micro-batches but the first a gradient is added to one that is there.
        added = s.weights * p.accumulate * (1 - 1 / self.plan.micro_batches) / rate
        forward, backward = s.forward, s.backward + s.again + added
        halved = place.device.halved
        if halved is not None and self.plan.schedule == "zero-bubble":
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

    def reduction(self, rank: int, s: Stretches, backward: Array) -> tuple[Array, Array, dict[str, Array]]:
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

    def update(self, rank: int, s: Stretches) -> Array:
        """Seconds of the optimizer."""
        p, device = self.profile, self.places[rank].device
        moved = s.weights / self._shards(1) * (2 * p.state + p.gradient + 4)
        return moved / (device.bandwidth.value * device.reached.value)

    # -- memory ------------------------------------------------------------------------------------------------------

    def memory(self, s: Held, flight: float | Array, half: float | Array = 0.0) -> dict[str, Array]:
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
        if p.stepwise and np.any(half):
            # Or it is fullest when the first half of all is through and the second half of the first begins.
            more = np.where(np.greater(half, 0), np.maximum(more, s.halved - s.kept + s.late), more)
        beside = 1.0 * (self.data > 1) + np.greater(flight, 1)
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

    def waiting(self, s: Taken, lead: Array, flight: Array) -> Array:
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
            micros = np.maximum(flight - 2, 0.0) + np.minimum(1.0, micros) * (np.minimum(flight, 2.0) + (flight > 1))
        return sum(sizes[1:], sizes[0]) * np.minimum(micros, p.queue / np.maximum(s.calls, 1.0))

    @cached_property
    def reserve(self) -> float:
        """Share by which the allocator keeps more than is in use; a CPU's is the system's, and keeps nothing apart."""
        return self.profile.reserve * self._apart(0)

    def _shards(self, from_stage: int) -> int:
        return self.shards * self.spread if self.zero >= from_stage else 1

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
        bounds = [0, *cuts, self._end]
        groups = self._groups(bounds)
        needs = [self._needs(group, bounds) for group in groups]
        items = {item: by_rank(groups, (need[item] for need in needs)).tolist() for item in needs[0]}
        ranks = tuple({item: sizes[rank] for item, sizes in items.items()} for rank in range(self.plan.pipeline))
        limits = tuple(place.memory for place in self.places)
        return Estimate(**vars(self._spent(cuts, groups)), ranks=ranks, limits=limits)

    def spent(self, cuts: Sequence[int]) -> Spent:
        """Of the price with these cuts what it takes of time."""
        return self._spent(cuts, self._groups([0, *cuts, self._end]))

    def _spent(self, cuts: Sequence[int], groups: Sequence[Group]) -> Spent:
        ranks, micros = self.plan.pipeline, self.plan.micro_batches

        def of_stages(key: str) -> list[float]:
            found: list[float] = by_rank(groups, (getattr(g.times, key) for g in groups)).tolist()
            return found

        times = {key: of_stages(key) for key in ("forward", "backward", "turn", "later")}
        carried = [self.tables[0].live[cut] for cut in cuts]
        sends = [float(self.sends(stage_rank(stage, ranks), size)) for stage, size in enumerate(carried)]
        total = self._through(times, sends)
        compute, waits = (sum(of_stages(key)) * micros / ranks for key in ("compute", "waits"))
        sent, hidden = (by_axis([getattr(g.times, key) for g in groups], micros / ranks) for key in ("sent", "hidden"))
        # Who shares a processor needs it to send and to receive.
        carrying = self.ways * micros * sum(sends) / ranks * (self.lost < 1)
        bubble = max(total - compute - waits - sum(sent.values()) - carrying, 0.0) * self.lost if cuts else 0.0
        merged = [g.own.together() for g in groups]
        ends = [
            self.reduction(int(g.ranks[0]), s, g.times.backward.sum(axis=0))
            for g, s in zip(groups, merged, strict=True)
        ]
        shown, behind = by_rank(groups, (end[0] for end in ends)), by_rank(groups, (end[1] for end in ends))
        others = {axis: by_rank(groups, (end[2][axis] for end in ends)) for axis in ends[0][2]}
        slowest = int(np.argmax(sum(others.values(), shown)))
        sent[DATA] = sent.get(DATA, 0.0) + float(shown[slowest])
        hidden[DATA] = hidden.get(DATA, 0.0) + float(behind[slowest])
        for axis, more in others.items():
            sent[axis] = sent.get(axis, 0.0) + float(more[slowest])
        if cuts:
            sent[PIPELINE] = self._tied(sum(float(s.weights.sum()) for s in merged)) + carrying
        update = max(float(self.update(int(g.ranks[0]), s).max()) for g, s in zip(groups, merged, strict=True))
        seconds = {"compute": compute, "overhead": waits + self._step()}
        seconds |= {f"communication {axis}": s for axis, s in sent.items() if s}
        seconds |= {"bubble": bubble, "update": update}
        return Spent(seconds, {k: v for k, v in hidden.items() if v}, self.pace(times, sends))

    def _groups(self, bounds: Sequence[int]) -> list[Group]:
        """The pipeline ranks, alike ones together, with their stages between these bounds."""
        stages = np.arange(len(bounds) - 1).reshape(-1, self.plan.pipeline)  # which go round the ranks
        found = []
        for ranks in self.alike:
            own = self.tables[ranks[0]].taken(bounds, NEIGHBOURS).pick(stages[:, ranks])
            found.append(Group(np.array(ranks), stages[:, ranks], own, self.times(ranks[0], own)))
        return found

    def _needs(self, group: Group, bounds: Sequence[int]) -> dict[str, Array]:
        """Bytes of every rank of a group, by item."""
        held = self.held[group.ranks[0]].held(bounds, NEIGHBOURS).pick(group.stages)
        kept, each = held.kept, len(group.stages)
        flight = np.array([self.flight.kept(r, sizes) for r, sizes in zip(group.ranks, kept.T.tolist(), strict=True)])
        half = np.array([self.flight.half_done(rank) / each for rank in group.ranks])
        items = self.memory(held.together(), flight, half)
        loose = self.waiting(group.own, group.times.lead, flight).sum(axis=0)
        loose = loose + self.profile.fragments * kept.sum(axis=0) * (flight > 1)
        # Where there is no room for it, the allocator waits for the device, and has a part back.
        room = np.maximum(self.places[group.ranks[0]].memory - sum(items.values()), 0.0) / (1 + self.reserve)
        loose = np.maximum(np.minimum(loose, room), loose * (1 - _BACK))
        items["buffers"] = items["buffers"] + loose
        items["reserve"] = items["reserve"] + loose * self.reserve
        if self.profile.whole and not self._apart(group.ranks[0]):
            shards = items["parameters"] if self.plan.zero == 3 else 0.0  # made while the whole is there
            items["whole model"] = np.maximum(self._built + shards - sum(items.values()), 0.0)
        return items

    def _tied(self, weights: float) -> float:
        """Seconds to sum gradients of parameters that two pipeline ranks use, where all have so many entries."""
        again = weights - float(self.tables[0].whole.weights)
        if again < 1 or self.ways == 1:
            return 0.0
        fixed, each = self.places[0].routes[PIPELINE].parts("all_reduce")
        ring = 2 * (self.plan.pipeline - 1) / self.plan.pipeline  # of two ranks it is 1
        return fixed + each / ring * again * self.profile.send_gradient

    def pace(self, stages: Mapping[str, Sequence[float]], sends: Sequence[float]) -> float:
        """Seconds from one batch to the next; 0 where the next waits for all that a step takes."""
        return 0.0

    def _through(self, stages: Mapping[str, Sequence[float]], sends: Sequence[float]) -> float:
        """Seconds of all micro-batches through all stages."""
        micros, ranks = self.plan.micro_batches, self.plan.pipeline
        forward, backward, turns, later = (stages[key] for key in ("forward", "backward", "turn", "later"))
        if self.ahead > 1:
            return ahead_seconds(self.ahead * ranks, micros, forward, backward, sends, later)
        return pipeline_seconds(self.plan.schedule, ranks, micros, forward, backward, sends, turns, later)
