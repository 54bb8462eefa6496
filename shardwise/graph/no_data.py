"""Modules without data: tensors that have a shape, a dtype and a device and no entries."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode

M = TypeVar("M", bound=nn.Module)


def on_cpu(module: M, mode: FakeTensorMode) -> M:
    """A copy of a module on `meta` whose tensors say that they are on the CPU.

    What operators are captured depends on the device (attention's strides do), and a plan that was made without weights
    has to fit the model that runs.
    """
    fakes: dict[int, Any] = {}
    for part in module.modules():
        for tensor in [*part._parameters.values(), *part._buffers.values(), *vars(part).values()]:
            if not isinstance(tensor, Tensor) or id(tensor) in fakes:
                continue
            learned = isinstance(tensor, nn.Parameter)
            if tensor.is_meta or learned:
                fake = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
                fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if learned else fake
    return copy.deepcopy(module, fakes)


def without_data(module: M) -> tuple[M, FakeTensorMode]:
    """A copy of a module without data, in evaluation, and the mode that it runs in."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return on_cpu(module, mode).eval(), mode
