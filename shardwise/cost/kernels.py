"""Seconds of one operator on one device: a roofline, with what keeps products of small matrices below it."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from shardwise.cost.traits import ATTENTION, NOTHING, PRODUCT
from shardwise.cost.work import Product, Task
from shardwise.graph.graph import Op
from shardwise.machine.device import Device

_TILES = ((256, 128, 1.0), (128, 128, 0.92), (128, 64, 0.75), (64, 64, 0.55))
"""Blocks of the result that one multiprocessor computes, and the share of its rate that it reaches with them."""
_FILL = 256.0  # products of a block's depth before its pipeline is full
_ALIGNED = 16  # bytes at whose multiples a row has to begin for matrix units (NVIDIA's guide to matrix products)
_MISALIGNED = 0.45  # share of fp32's rate that is left without them; fitted on runs with heads of 450 entries
_BACK_ATTENTION = 2.5  # fused attention computes the scores again: 5 products to 2 (Dao et al., 2022)


class Kernels:
    """Seconds of operators on one device.

    Args:
        device: the device.
        flash: whether attention is fused; else scores are written and read.
        passes: how many times as long as their bytes ask for operators bound by memory take.
        loss: the same of those behind the last product; 0 for as long.
        attention: rate of fused attention over that of the device's description.
        portable: whether attention does without the instructions that earlier devices lack.
        eight: operators whose products are computed in 8 bits.
    """

    def __init__(
        self,
        device: Device,
        *,
        flash: bool = True,
        passes: float = 1.0,
        loss: float = 0.0,
        attention: float = 1.0,
        portable: bool = True,
        eight: Collection[Op] = (),
    ) -> None:
        self.device, self.flash, self.eight = device, flash, eight
        self.passes, self.loss = passes, loss or passes
        self._fused = attention * ((portable and device.portable) or device.attention).value
        self._memory = device.bandwidth.value * device.reached.value
        # An accelerator runs ahead of its host, and a core is the host.
        self._start = device.call.value if device.kind == "cpu" else 0.0

    def forward(self, task: Task) -> float:
        """Seconds of an operator's forward."""
        if self.device.operators:
            return self._measured(task, backward=False)
        return self._forward(task) + self._start * task.calls

    def backward(self, task: Task) -> float:
        """Seconds of an operator's backward."""
        if self.device.operators:
            return self._measured(task, backward=True)
        return self._backward(task) + self._start * task.calls * min(task.gradients, 2) if task.gradients else 0.0

    def _forward(self, task: Task) -> float:
        if task.kind == PRODUCT and task.product is not None:
            return self._linear(task.product, task)
        if task.kind == ATTENTION:
            return self._attention(task, 1.0)
        return self._moved(task, task.moved)

    def _backward(self, task: Task) -> float:
        if task.kind == PRODUCT and task.product is not None:
            n, rows, columns, depth = task.product
            back = self._linear(Product(n, rows, depth, columns), task)
            if task.gradients > 1:
                back += self.product(Product(n, depth, columns, rows), self._dtype(task))
            return back
        if task.kind == ATTENTION:
            return self._attention(task, _BACK_ATTENTION if self.flash else 2.0)
        return self._moved(task, task.moved_back)

    def _measured(self, task: Task, *, backward: bool) -> float:
        """Seconds as this device was measured: of an operator that was, or of one that is bound alike."""
        if task.kind == NOTHING or not task.calls or (backward and not task.gradients):
            return 0.0
        curves, dense = self.device.curves, task.kind in (PRODUCT, ATTENTION)
        found = curves.get(task.op.name) or curves.get("aten.linear" if dense else "elementwise", ())
        if not found:
            return self._backward(task) if backward else self._forward(task)
        column = task.product is not None and task.product.columns == 1
        column = column and any(curve.by == "column bytes" for curve in found)
        found = tuple(curve for curve in found if curve.by != ("bytes" if column else "column bytes"))
        # In another precision products take longer or shorter as their rates differ.
        slower = self.device.peak("fp32") / self.device.peak(precision_of(task.dtype)) if dense else 1.0
        takes = {
            curve.by: curve.seconds(task.flops, backward=backward) * slower if curve.by == "operations"
            else curve.seconds(task.moved, backward=backward)
            for curve in found
        }  # fmt: skip
        besides = takes.pop("product bytes", None)
        if besides is not None and task.product is not None and min(task.product[1:]) > 1:
            seconds = max(takes["operations"] + besides, self._start)
        else:
            seconds = max(takes.values())
        # Backward is measured with a gradient for each operand.
        return seconds * (0.5 if backward and task.kind == PRODUCT and task.gradients == 1 else 1.0)

    def _dtype(self, task: Task) -> torch.dtype:
        return torch.float8_e4m3fn if task.op in self.eight else task.dtype

    def _linear(self, product: Product, task: Task) -> float:
        """Seconds of a layer's product; one in 8 bits has what comes in rounded first, and weights once a step."""
        seconds = self.product(product, self._dtype(task))
        if task.op in self.eight:
            # Read, and written as it is and transposed, for the other products.
            rounded = product.copies * product.rows * product.depth * (task.dtype.itemsize + 2)
            seconds += rounded * self.passes / self._memory
        return seconds

    def product(self, product: Product, dtype: torch.dtype) -> float:
        """Seconds of matrix products."""
        n, rows, columns, depth = product
        rate = self.device.peak(precision_of(dtype)) * self.device.matmul.value
        size = dtype.itemsize
        moved = n * (rows * depth + depth * columns + rows * columns) * size / self._memory
        units = self.device.units.value
        if self.device.kind == "cpu":
            return max(2 * n * rows * columns * depth / rate, moved)
        best = math.inf
        for high, wide, reached in _TILES:
            tiles = n * math.ceil(rows / high) * math.ceil(columns / wide)
            # Few blocks share their depth between multiprocessors.
            shared = max(1.0, min(units // tiles, depth // 1024)) if tiles < units else 1.0
            waves = math.ceil(tiles * shared / units)
            best = min(best, waves * 2 * high * wide * (depth / shared + _FILL) / (rate / units * reached))
        return max(best, moved)

    def _attention(self, task: Task, times: float) -> float:
        rate = self.device.peak(precision_of(task.dtype))
        if self.flash:
            return times * task.flops * (0.5 if task.causal else 1.0) / (rate * self._fused)
        depth = task.op.context.inputs[0].value.sizes[-1].coefficient
        scores = task.flops / (4 * depth)
        # Scale, mask, softmax and dropout each write the scores and read them again.
        moved = scores * task.dtype.itemsize * 6 * times
        rate *= self.device.matmul.value
        if depth * task.dtype.itemsize % _ALIGNED:
            rate = self.device.peak("fp32") * _MISALIGNED
        return times * task.flops / rate + moved * self.passes / self._memory

    def _moved(self, task: Task, moved: float) -> float:
        passes = self.loss if task.last else self.passes
        return 0.0 if task.kind == NOTHING else moved * passes / self._memory


def precision_of(dtype: torch.dtype) -> str:
    """What a dtype is called among a device's precisions."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8", torch.float64: "fp64"}.get(
        dtype, "fp32"
    )
