"""Precision: how a model's weights are held while it predicts, which is another thing than how it was trained.

- "fp32": in fp32.
- "bf16": in bf16, and computed with in bf16. What the model itself computes in fp32, such as the variance in a norm or
  the angles of positions, stays in fp32.
- "int8": those of matrix products in int8 with a scale for each output channel; the rest, and what is computed, stay in
  the model's own dtype.

None leaves the weights as the model has them; a job or a plan whose training precision is bf16 then runs as it trains,
by autocast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from shardwise.errors import CaptureError, JobError
from shardwise.graph.eager import Lifted, OneDtype
from shardwise.graph.graph import Graph
from shardwise.graph.products import factors
from shardwise.job import Batch, Job, lift, lifts
from shardwise.plan.plan import Plan
from shardwise.weights.bare import kept_buffers
from shardwise.weights.fill import Weights
from shardwise.weights.int8 import quantize

Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS = ("fp32", "bf16", "int8")
_HELD = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Arithmetic:
    """In which numbers a model is held and computed.

    Attributes:
        lifted: everything is in this dtype, as in a proof.
        held: weights and samples are in this dtype.
        int8: weights of products are held in int8.
        autocast: as in training in bf16.
    """

    lifted: torch.dtype | None = None
    held: torch.dtype | None = None
    int8: bool = False
    autocast: bool = False

    @classmethod
    def of(cls, plan: Plan, precision: str | None, dtype: torch.dtype | None) -> Arithmetic:
        """What `predict` was asked for.

        Raises:
            JobError: there is no such precision, or it is not the dtype that everything is to run in.
        """
        if precision is not None:
            check_precision(precision)
        if dtype is not None and precision in _HELD:
            raise JobError(
                f"weights cannot be held in {precision} where everything runs in {str(dtype).removeprefix('torch.')}; "
                "give precision or dtype"
            )
        autocast = precision is None and dtype is None and plan.precision == "bf16"
        return cls(dtype, _HELD.get(precision or ""), precision == "int8", autocast)

    def take(self, batch: Batch) -> Batch:
        """Samples as the model gets them."""
        return lift(batch, self.samples) if self.samples is not None else batch

    @property
    def samples(self) -> torch.dtype | None:
        """The dtype of floating-point samples; None leaves them as they are."""
        return self.lifted or self.held

    @property
    def dtypes(self) -> dict[torch.dtype, torch.dtype]:
        """For each dtype of the captured graph the one in its place."""
        return lifts(self.lifted) if self.lifted is not None else {}

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module with its weights in their dtype, on `meta` or not; those for int8 come later."""
        if self.lifted is not None:
            return lift(module, self.lifted)
        if self.held is not None:
            for tensor in [*module.parameters(), *kept_buffers(module).values()]:
                if tensor.dtype.is_floating_point:
                    tensor.data = tensor.data.to(self.held)
        return module

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """While a module is looked at."""
        with ExitStack() as stack:
            if self.held is not None:
                stack.enter_context(OneDtype(self.held))
            yield

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """While a module runs as it is."""
        with self.capturing(), ExitStack() as stack:
            if self.autocast:
                stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if self.lifted is not None:
                stack.enter_context(Lifted(self.lifted))
            yield

    def factors(self, graph: Graph, title: str) -> Mapping[str, tuple[int, ...]]:
        """The parameters to be held in int8, each with the dims that have scales.

        Raises:
            JobError: there is none.
        """
        return _some(factors(graph), title) if self.int8 else {}


def check_precision(precision: str) -> None:
    """Check that weights can be held so.

    Raises:
        JobError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise JobError(f"precision must be one of {', '.join(PRECISIONS)} to predict, but is {precision!r}")


def fill(
    arithmetic: Arithmetic, job: Job, module: nn.Module, weights: Weights | None, example: Batch, device: torch.device
) -> nn.Module:
    """A module that runs as it is, with all of its weights on `device` as they are held.

    Args:
        module: prepared; with its parameters on `meta` where there are weights.
        weights: reads them; those for int8 one at a time.
        example: a few samples.
    """
    if not arithmetic.int8:
        if weights is not None:
            weights.fill(module, dict(module.named_parameters()), device)
        return module.to(device)
    chosen = _factors_of(arithmetic, job, module, example)
    named = dict(module.named_parameters(remove_duplicate=False))
    ids = {id(named[name]) for name in chosen}
    if weights is not None:
        weights.fill(module, [name for name, param in named.items() if id(param) not in ids], device)
    for name, channels in chosen.items():
        param = named[name]
        values = weights.read(name) if weights is not None else param.detach()
        found = quantize(values.to(device, param.dtype), channels)
        _replace(module, param, nn.Parameter(found, requires_grad=False))
    return module.to(device)


def _factors_of(arithmetic: Arithmetic, job: Job, module: nn.Module, example: Batch) -> Mapping[str, tuple[int, ...]]:
    """The parameters to be held in int8 of a module: those of its graph, or of its linear layers without one."""
    try:
        return arithmetic.factors(Graph.of(job, module, example, purpose="predict"), job.title())
    except CaptureError:
        layers = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
        return _some({f"{name}.weight".removeprefix("."): (0,) for name, _ in layers}, job.title())


def _some(found: Mapping[str, tuple[int, ...]], title: str) -> Mapping[str, tuple[int, ...]]:
    if not found:
        raise JobError(
            f"int8 holds the weights of matrix products, but {title} has none that could be found; "
            "predict in bf16 or fp32"
        )
    return found


def _replace(module: nn.Module, old: Tensor, new: nn.Parameter) -> None:
    for part in module.modules():
        for name in [n for n, param in part._parameters.items() if param is old]:
            part._parameters[name] = new
