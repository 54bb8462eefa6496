"""Pipeline: the stages of one rank, run in the order of a schedule, with what crosses the cuts sent along.

Anything may cross a cut, skips over several stages included: a value that is used later travels through every stage
between. What depends on the batch alone is computed where it is needed and never sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.parallel.mesh import Axis
from shardwise.parallel.schedule import Action, stage_rank

Shape = Callable[[int], tuple[int, ...]]


@dataclass(eq=False)
class Crossing:
    """One tensor that crosses a cut: its name, its shape for a micro-batch, and whether gradients come back."""

    name: str
    shape: Shape
    dtype: torch.dtype
    grad: bool


@dataclass(eq=False)
class Stage:
    """One stage on this rank.

    Attributes:
        index: its place in the pipeline.
        run: `run(micro, received)` is the forward pass: tensors by name, those that go on and, at the end, the loss.
        takes: what arrives from the stage before.
        gives: what goes to the stage after.
        params: its parameters, for schedules that take gradients of weights apart.
    """

    index: int
    run: Callable[[int, dict[str, Tensor]], dict[str, Tensor]]
    takes: Sequence[Crossing]
    gives: Sequence[Crossing]
    params: Sequence[nn.Parameter] = ()


@dataclass(eq=False)
class _Pending:
    """A forward pass that waits for its backward."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    later: Any = None


@dataclass(eq=False)
class Pipeline:
    """Runs this rank's stages.

    Args:
        stages: the stages of this rank.
        count: stages in all.
        order: this rank's actions.
        axis: the pipeline axis; None where there is one stage.
        device: where tensors arrive.
        before_last: called before the last backward of each stage, so that gradient reduction can start.
        results: what the last stage gives of each micro-batch, to be summed over them.
    """

    stages: Sequence[Stage]
    count: int
    order: Sequence[Action]
    axis: Axis | None
    device: torch.device
    before_last: Callable[[int], None] = lambda stage: None
    results: Sequence[str] = ("loss",)
    _sent: list[tuple[Any, Tensor]] = field(default_factory=list)
    _boxes: dict[tuple[str, int, int], list[tuple[Any, Tensor]]] = field(default_factory=dict)
    _local: dict[tuple[str, int, int], list[Tensor | None]] = field(default_factory=dict)

    def step(self, micro: int) -> Tensor:
        """All actions over all micro-batches.

        Returns:
            [results], float64: sums of what this rank computed of each; zero where the last stage is elsewhere.
        """
        waiting: dict[tuple[int, int], _Pending] = {}
        by_index = {stage.index: stage for stage in self.stages}
        backwards = dict.fromkeys(by_index, 0)
        total = torch.zeros(len(self.results), dtype=torch.float64, device=self.device)
        for at, action in enumerate(self.order):
            self._expect(self.order[at : at + 3], by_index, micro)
            stage = by_index[action.stage]
            key = (action.stage, action.micro)
            if action.kind == "F":
                waiting[key] = self._forward(stage, action.micro)
                if action.stage == self.count - 1:
                    outputs = waiting[key].outputs
                    total += torch.stack([outputs[name].detach().to(total.dtype) for name in self.results])
            elif action.kind in "BI":
                last_weight = action.kind == "B"
                backwards[action.stage] += last_weight
                if last_weight and backwards[action.stage] == micro:
                    self.before_last(action.stage)
                self._backward(stage, action.micro, waiting[key], weights=last_weight)
                if last_weight:
                    del waiting[key]
            else:
                backwards[action.stage] += 1
                if backwards[action.stage] == micro:
                    self.before_last(action.stage)
                _weights(stage, waiting.pop(key))
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()
        return total

    # -- one action --------------------------------------------------------------------------------------------------

    def _forward(self, stage: Stage, m: int) -> _Pending:
        inputs: dict[str, Tensor] = {}
        got = self._receive("F", stage.index, m) if stage.index else []
        for crossing, tensor in zip(stage.takes, got, strict=True):
            assert tensor is not None
            inputs[crossing.name] = tensor.detach().requires_grad_(crossing.grad)
        outputs = stage.run(m, inputs)
        if stage.index < self.count - 1:
            self._send("F", stage.index + 1, m, [outputs[c.name].detach() for c in stage.gives])
        return _Pending(inputs, outputs)

    def _backward(self, stage: Stage, m: int, pending: _Pending, *, weights: bool) -> None:
        if stage.index == self.count - 1:
            roots, grads = [pending.outputs["loss"]], [None]
        else:
            flowing = [c for c in stage.gives if c.grad]
            got = self._receive("B", stage.index, m)
            pairs = [(pending.outputs[c.name], g) for c, g in zip(flowing, got, strict=True)]
            roots = [r for r, _ in pairs if r.requires_grad]
            grads = [g for r, g in pairs if r.requires_grad]  # type: ignore[misc]
        if weights:
            torch.autograd.backward(roots, grads)
        else:
            _inputs_only(stage, pending, roots, grads)
        if stage.index:
            back = [pending.inputs[c.name] for c in stage.takes if c.grad]
            self._send("B", stage.index - 1, m, [x.grad if x.grad is not None else torch.zeros_like(x) for x in back])

    # -- sending -----------------------------------------------------------------------------------------------------

    def _rank(self, stage: int) -> int:
        assert self.axis is not None
        return self.axis.ranks[stage_rank(stage, self.axis.size)]

    def _mine(self, stage: int) -> bool:
        return self.axis is None or stage_rank(stage, self.axis.size) == self.axis.rank

    def _tag(self, kind: str, stage: int, m: int, n: int) -> int:
        return (((m * self.count + stage) * 2 + (kind == "B")) << 12) + n

    def _send(self, kind: str, to: int, m: int, tensors: Sequence[Tensor]) -> None:
        if self._mine(to):
            self._local[kind, to, m] = list(tensors)
            return
        assert self.axis is not None
        for n, tensor in enumerate(tensors):
            whole = tensor.contiguous()
            self.axis.record("send", whole.numel() * whole.element_size())
            work = dist.isend(whole, self._rank(to), group=self.axis.group, tag=self._tag(kind, to, m, n))
            self._sent.append((work, whole))

    def _expect(self, soon: Sequence[Action], stages: dict[int, Stage], micro: int) -> None:
        """Post the receives of this action and the next ones, so that they arrive during computation."""
        for action in soon:
            forward = action.kind == "F"
            if action.kind == "W" or action.stage == (0 if forward else self.count - 1):
                continue
            kind = "F" if forward else "B"
            key = (kind, action.stage, action.micro)
            source = action.stage - 1 if forward else action.stage + 1
            if key in self._boxes or self._mine(source):
                continue
            stage = stages[action.stage]
            wanted = stage.takes if forward else [c for c in stage.gives if c.grad]
            assert self.axis is not None
            box = []
            for n, crossing in enumerate(wanted):
                buffer = torch.empty(crossing.shape(action.micro), dtype=crossing.dtype, device=self.device)
                tag = self._tag(kind, action.stage, action.micro, n)
                box.append((dist.irecv(buffer, self._rank(source), group=self.axis.group, tag=tag), buffer))
            self._boxes[key] = box

    def _receive(self, kind: str, stage: int, m: int) -> Sequence[Tensor | None]:
        if (kind, stage, m) in self._local:
            return self._local.pop((kind, stage, m))
        box = self._boxes.pop((kind, stage, m))
        for work, _ in box:
            work.wait()
        return [tensor for _, tensor in box]


def total_over_stages(results: Tensor, axis: Axis | None) -> Tensor:
    """What all stages together computed, on every rank."""
    if axis is not None and axis.group is not None:
        axis.record("all_reduce", results.numel() * results.element_size())
        dist.all_reduce(results, group=axis.group)
    return results


def _inputs_only(stage: Stage, pending: _Pending, roots: list[Tensor], grads: Sequence[Any]) -> None:
    """Gradients of the inputs now, of the weights later (Qi et al. 2023), by torch's own split of backward."""
    from torch.distributed.pipelining._backward import stage_backward_input

    wanted = [x for x in pending.inputs.values() if x.requires_grad]
    if not wanted:
        pending.later = (roots, grads)
        return
    given = [g if g is not None else torch.ones_like(r) for r, g in zip(roots, grads, strict=True)]
    # torch detaches the roots in place, which views do not allow.
    roots = [r.clone() if r._is_view() else r for r in roots]
    found, groups = stage_backward_input(roots, given, wanted, iter(stage.params))
    for x, g in zip(wanted, found, strict=True):
        x.grad = g
    pending.later = groups


def _weights(stage: Stage, pending: _Pending) -> None:
    from torch.distributed.pipelining._backward import stage_backward_weight

    if isinstance(pending.later, tuple):
        roots, grads = pending.later
        torch.autograd.backward(roots, grads)
    elif pending.later:
        stage_backward_weight(iter(stage.params), pending.later)
