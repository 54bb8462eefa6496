"""Bare: a module built without memory for its parameters, but with the values of everything else it has."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from shardwise.seeding import seed_torch


def build_bare(make: Callable[[], Any], seed: int, device: torch.device | str = "cpu") -> tuple[nn.Module | None, str]:
    """A module with its parameters on `meta`, and on `device` the buffers and other tensors of a whole one.

    Args:
        make: makes the module.
        seed: of the random numbers that it draws.

    Returns:
        The module and an empty string, or None and why it cannot be built so.
    """
    try:
        with _parameters_on_meta():
            with drawing(seed, device) as draws:
                module = make()
            if not isinstance(module, nn.Module):
                return None, f"it is a {type(module).__name__}"
            made = dict(_others(module))
            other = made
            if draws and made:
                with drawing(seed + 1, device):
                    other = dict(_others(make()))
    except Exception as error:
        return None, f"it needs the values of its parameters while it is built ({type(error).__name__}: {error})"
    real = next((name for name, param in module.named_parameters() if not param.is_meta), None)
    if real is not None:
        return None, f"its parameter {real} is not made as parameters usually are"
    unknown = next((name for name, tensor in made.items() if tensor.is_meta), None)
    if unknown is not None:
        return None, f"{unknown}, which no file has, is computed from its parameters"
    drawn = next((name for name, tensor in made.items() if not _equal(tensor, other.get(name))), None)
    if drawn is not None:
        return None, f"{drawn}, which no file has, is drawn at random"
    return module, ""


@contextmanager
def drawing(seed: int, device: torch.device | str) -> Iterator[list[str]]:
    """Random numbers come from `seed` and tensors are made on `device`; gives a list, not empty if any were drawn."""
    draws: list[str] = []
    with torch.random.fork_rng(devices=[]), torch.device(device):
        seed_torch(seed)
        before = torch.get_rng_state()
        yield draws
        if not torch.equal(before, torch.get_rng_state()):
            draws.append("cpu")


def kept_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a module saves, by name; tied ones under each of their names."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, part in module.named_modules(remove_duplicate=False)
        for name, buffer in part._buffers.items()
        if buffer is not None and name not in part._non_persistent_buffers_set
    }


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Whatever becomes a module's parameter in this thread is put on `meta`; the same parameter once."""
    made = WeakIdKeyDictionary()
    thread = threading.get_ident()

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> nn.Parameter | None:
        if param is None or param.is_meta or type(param) is not nn.Parameter or threading.get_ident() != thread:
            return None
        if param not in made:
            made[param] = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        found: nn.Parameter = made[param]
        return found

    handle = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _others(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module that it does not save: other buffers, and plain attributes."""
    for prefix, part in module.named_modules():
        others = {n: b for n, b in part._buffers.items() if n in part._non_persistent_buffers_set}
        for name, tensor in (*others.items(), *vars(part).items()):
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                yield f"{prefix}.{name}" if prefix else name, tensor


def _equal(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
