"""Pipeline: the stages of one rank, run in the order of a schedule, with what crosses the cuts sent along.

Anything may cross a cut, skips over several stages included: a value that is used later travels through every stage
between. What depends on the batch alone is computed where it is needed and never sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardwise.parallel.channels import Channels
from shardwise.parallel.collectives import all_reduce_
from shardwise.parallel.defer import Recorder, Tape
from shardwise.parallel.mesh import Axis
from shardwise.parallel.schedule import Action

_AHEAD = 3
"""Receives are posted for this many actions, so that tensors arrive while others are computed with."""


@dataclass(eq=False)
class Crossing:
    """One tensor that crosses a cut: its name, its shape for a micro-batch, and whether gradients come back."""

    name: str
    shape: Callable[[int], tuple[int, ...]]
    dtype: torch.dtype
    grad: bool


@dataclass(eq=False)
class Stage:
    """One stage on this rank.

    Attributes:
        index: its place in the pipeline.
        run: `run(micro, received)` is the forward pass: tensors by name, those that go on and, at the end, the results.
        takes: what arrives from the stage before.
        gives: what goes to the stage after.
        tapes: where its backward comes in two halves, the tapes of the second; None where it does not.
        apart: of what it gives or results in, the names of what depends on its parameters alone.
    """

    index: int
    run: Callable[[int, dict[str, Tensor]], dict[str, Tensor]]
    takes: Sequence[Crossing]
    gives: Sequence[Crossing]
    tapes: Recorder | None = None
    apart: frozenset[str] = frozenset()


@dataclass(eq=False)
class _Pass:
    """A forward pass whose backward is to come.

    Attributes:
        inputs, outputs: tensors by name.
        tape: what operators left to the second half of backward.
        roots, grads: outputs that were left to the second half, and their gradients.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    tape: Tape
    roots: list[Tensor] = field(default_factory=list)
    grads: list[Tensor | None] = field(default_factory=list)


@dataclass(eq=False)
class Pipeline:
    """Runs this rank's stages.

    Args:
        stages: the stages of this rank.
        count: stages in all.
        order: this rank's actions.
        channels: to the ranks of the other stages.
        before_last: called before the last backward of each stage, so that gradient reduction can start.
        results: what `step` sums over micro-batches of what the last stage gives; the first is the loss.
    """

    stages: Sequence[Stage]
    count: int
    order: Sequence[Action]
    channels: Channels
    before_last: Callable[[int], None] = lambda stage: None
    results: Sequence[str] = ("loss",)
    _sent: dict[tuple[str, int, int], list[tuple[Any, Tensor]]] = field(default_factory=dict)
    _boxes: dict[tuple[str, int, int], list[tuple[Any, Tensor]]] = field(default_factory=dict)
    _local: dict[tuple[str, int, int], list[Tensor]] = field(default_factory=dict)

    def step(self, micro: int) -> Tensor:
        """All actions over all micro-batches.

        Returns:
            [results], float64: sums of what this rank computed of each; zero where the last stage is elsewhere.
        """
        total = torch.zeros(len(self.results), dtype=torch.float64, device=self.channels.device)

        def add(m: int, outputs: Mapping[str, Tensor]) -> None:
            total.add_(torch.stack([outputs[name].detach().to(total.dtype) for name in self.results]))

        self.play(micro, add)
        return total

    def play(self, micro: int, finished: Callable[[int, Mapping[str, Tensor]], None]) -> None:
        """All actions over all micro-batches; `finished` is called with what the last stage gives of each."""
        passes: dict[tuple[int, int], _Pass] = {}
        by_index = {stage.index: stage for stage in self.stages}
        left = dict.fromkeys(by_index, micro)
        training = torch.is_grad_enabled()
        for at, (index, kind, m) in enumerate(self.order):
            self._expect(self.order[at : at + _AHEAD], by_index)
            stage = by_index[index]
            if kind == "F":
                done = self._forward(stage, m)
                if index == self.count - 1:
                    finished(m, done.outputs)
                if training:
                    passes[index, m] = done
                continue
            if kind in "BW":
                left[index] -= 1
                if not left[index]:
                    self.before_last(index)
            if kind in "BI":
                self._backward(stage, m, passes[index, m], halved=kind == "I" or stage.tapes is not None)
            if kind in "BW":
                done = passes.pop((index, m))
                done.tape.play(done.roots, done.grads)
        for key in list(self._sent):
            self._arrived(key)

    # -- one action --------------------------------------------------------------------------------------------------

    def _forward(self, stage: Stage, m: int) -> _Pass:
        inputs: dict[str, Tensor] = {}
        got = self._receive("F", stage.index, m) if stage.index else []
        for crossing, tensor in zip(stage.takes, got, strict=True):
            inputs[crossing.name] = tensor.detach().requires_grad_(crossing.grad and torch.is_grad_enabled())
        tape = stage.tapes.start() if stage.tapes is not None else Tape()
        outputs = stage.run(m, inputs)
        if stage.index < self.count - 1:
            self._send("F", stage.index + 1, m, [outputs[c.name].detach() for c in stage.gives])
        return _Pass(inputs, outputs, tape)

    def _backward(self, stage: Stage, m: int, done: _Pass, *, halved: bool) -> None:
        """Gradients of what the stage received, and, if not `halved`, of its parameters."""
        if stage.index == self.count - 1:
            flowing: list[tuple[str, Tensor | None]] = [(self.results[0], None)]
        else:
            got = self._receive("B", stage.index, m)
            # What comes back answers what was sent, which need not be kept any longer.
            self._arrived(("F", stage.index + 1, m))
            flowing = list(zip([c.name for c in stage.gives if c.grad], got, strict=True))
        flowing = [(name, grad) for name, grad in flowing if done.outputs[name].requires_grad]
        # Without anything received that has a gradient, the whole backward is the second half.
        later = {name for name, _ in flowing if halved and (stage.tapes is None or name in stage.apart)}
        done.roots = [done.outputs[name] for name, _ in flowing if name in later]
        done.grads = [grad for name, grad in flowing if name in later]
        now = [(done.outputs[name], grad) for name, grad in flowing if name not in later]
        if now:
            torch.autograd.backward([root for root, _ in now], [grad for _, grad in now])
        if stage.index:
            back = [done.inputs[c.name] for c in stage.takes if c.grad]
            self._send("B", stage.index - 1, m, [x.grad if x.grad is not None else torch.zeros_like(x) for x in back])
        # Only the second half is still to be done, and it needs neither.
        done.inputs, done.outputs = {}, {}

    # -- sending -----------------------------------------------------------------------------------------------------

    def _send(self, kind: str, to: int, m: int, tensors: Sequence[Tensor]) -> None:
        if self.channels.here(to):
            self._local[kind, to, m] = list(tensors)
            return
        self._sent = {key: sent for key, sent in self._sent.items() if not all(w.is_completed() for w, _ in sent)}
        whole = [tensor.contiguous() for tensor in tensors]
        # Kept until they have been sent.
        self._sent[kind, to, m] = [(self.channels.send(kind, to, m, n, t), t) for n, t in enumerate(whole)]

    def _arrived(self, key: tuple[str, int, int]) -> None:
        for work, _ in self._sent.pop(key, ()):
            work.wait()

    def _expect(self, soon: Sequence[Action], stages: dict[int, Stage]) -> None:
        """Post the receives of this action and the next ones."""
        for action in soon:
            forward = action.kind == "F"
            if action.kind == "W" or action.stage == (0 if forward else self.count - 1):
                continue
            key = ("F" if forward else "B", action.stage, action.micro)
            if key in self._boxes or self.channels.here(action.stage - 1 if forward else action.stage + 1):
                continue
            stage = stages[action.stage]
            box = []
            for n, crossing in enumerate(stage.takes if forward else [c for c in stage.gives if c.grad]):
                shape = crossing.shape(action.micro)
                buffer = torch.empty(shape, dtype=crossing.dtype, device=self.channels.device)
                box.append((self.channels.receive(*key, n, buffer), buffer))
            self._boxes[key] = box

    def _receive(self, kind: str, stage: int, m: int) -> list[Tensor]:
        key = (kind, stage, m)
        if key in self._local:
            return self._local.pop(key)
        box = self._boxes.pop(key)
        for work, _ in box:
            work.wait()
        return [tensor for _, tensor in box]


def total_over_stages(results: Tensor, axis: Axis | None) -> Tensor:
    """What all stages together computed, on every rank."""
    return results if axis is None else all_reduce_(results, axis)
