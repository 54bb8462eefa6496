"""Backward that a model writes itself, which a captured graph would lose without a word.

Capture records operators, and what is differentiated later is what it recorded: the operators of a
`torch.autograd.Function`'s forward with the gradients that torch knows, which for a rounding are zero.

Most such functions scale the gradient of each entry by a factor: straight-through estimators (Bengio et al., 2013),
reversed gradients (Ganin & Lempitsky, 2015), activations that keep less. These are written with operators:
y = f(x) + factor · (x − x), where gradients pass through the first x alone; x and the factor have to be finite. That
backward does no more is read from what it does to a gradient without data, operator by operator. Others are refused,
and hooks on gradients are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from shardwise.errors import CaptureError


def check_hooks(module: nn.Module) -> None:
    """See that nothing hooks into a module's gradients.

    Raises:
        CaptureError: a hook does.
    """
    model = type(module).__name__
    for name, part in module.named_modules():
        if part._backward_hooks or part._backward_pre_hooks:
            raise _loses(model, f"a hook on the backward of {name or type(part).__name__}")
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise _loses(model, f"a hook on the gradient of {name}")


def _loses(model: str, what: str) -> CaptureError:
    return CaptureError(
        f"{model} does not capture, for its graph would lose {what}; write it as a custom operator with "
        "register_autograd, or split by data (data, sharded), where it runs as it is"
    )


@contextmanager
def written_out(model: str) -> Iterator[None]:
    """While a model is captured: functions with a backward of their own are written with operators, or refused.

    Those of torch's own compute the gradient of their forward (checkpoints), and stay as they are.

    Raises:
        CaptureError: a function's backward does more than scale entries, or a tensor gets a hook.
    """
    apply, register = Function.__dict__["apply"], Tensor.register_hook

    def scaled(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs or not torch.is_grad_enabled() or cls.__module__.startswith("torch."):
            return apply.__func__(cls, *args, **kwargs)
        wrong = _check(cls, args)
        if wrong:
            raise _loses(model, f"the backward of {cls.__name__}, a torch.autograd.Function: {wrong}")
        return _scaled(cls, args)

    def refused(tensor: Tensor, hook: Any) -> Any:
        raise _loses(model, "a hook on the gradient of a tensor")

    Function.apply = classmethod(scaled)  # type: ignore[assignment,method-assign]
    Tensor.register_hook = refused  # type: ignore[method-assign]
    try:
        yield
    finally:
        Function.apply = apply  # type: ignore[method-assign]
        Tensor.register_hook = register  # type: ignore[method-assign]


def _scaled(cls: Any, args: tuple[Any, ...]) -> Tensor:
    """What a function gives, by operators whose gradients are those of its backward."""
    context, made = _forward(cls, [a.detach() if isinstance(a, Tensor) else a for a in args])
    result: Tensor = made.detach()
    for given, factor in zip(args, _grads(cls, context, torch.ones_like(made)), strict=False):
        if factor is not None:
            result = result + factor.detach() * (given - given.detach())
    return result


def _check(cls: Any, args: tuple[Any, ...]) -> str:
    """What a function's backward does, on tensors without data, besides scaling each entry of the gradient, if any."""
    try:
        with _disable_current_modes():
            given = [_bare(a) if isinstance(a, Tensor) else a for a in args]
            context, made = _forward(cls, given)
            grad = torch.empty_like(made)
            with _Scales(grad) as scales:
                grads = _grads(cls, context, grad)
    except Exception as error:
        return str(error).partition("\n")[0][:200] or type(error).__name__
    for each, tensor in zip(grads, given, strict=False):
        if each is not None and (id(each) not in scales.scaled or each.shape != tensor.shape):
            return "it gives something else than the gradient scaled entry by entry"
    return ""


def _bare(tensor: Tensor) -> Tensor:
    """A tensor of the same shape without data; sizes that are open are as large as in the example."""
    sizes: tuple[Any, ...] = tensor.shape
    shape = [s.node.hint if isinstance(s, torch.SymInt) else s for s in sizes]
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


class _Context:
    """What a function's forward hands to its backward."""

    def __init__(self, args: list[Any]) -> None:
        self.needs_input_grad = tuple(isinstance(a, Tensor) and a.is_floating_point() for a in args)
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """There is one output, whose gradient is there."""


def _forward(cls: Any, args: list[Any]) -> tuple[_Context, Tensor]:
    context = _Context(args)
    if cls.setup_context is Function.setup_context:
        made = cls.forward(context, *args)
    else:
        made = cls.forward(*args)
        cls.setup_context(context, tuple(args), made)
    if not isinstance(made, Tensor):
        raise TypeError("it gives several tensors")
    return context, made


def _grads(cls: Any, context: _Context, grad: Tensor) -> list[Tensor | None]:
    found = cls.backward(context, grad)
    found = found if isinstance(found, tuple) else (found,)
    return [g if needed else None for g, needed in zip(found, context.needs_input_grad, strict=False)]


_COPIES = ("clone", "detach", "alias", "_to_copy", "view")


class _Scales(TorchDispatchMode):
    """Follows a gradient through operators that scale each entry; raises TypeError where another one takes it."""

    def __init__(self, grad: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scaled, self.zeros = {id(grad): grad}, dict[int, Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        takes = any(id(t) in self.scaled for t in tree_leaves((args, kwargs)))
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if func._schema.is_mutable:
            self.zeros.pop(id(args[0]), None)
        made = name in ("zeros", "zeros_like", "new_zeros") or (name == "scalar_tensor" and not args[0])
        if made or (name in _COPIES and id(args[0]) in self.zeros):
            self.zeros[id(out)] = out
        elif takes:
            plain = self._scales(name, args) and not kwargs.get("rounding_mode")
            if not plain or not out.is_floating_point() or out.shape != next(iter(self.scaled.values())).shape:
                raise TypeError(f"{func} takes the gradient")
            self.scaled[id(out)] = out
        return out

    def _scales(self, name: str, args: Any) -> bool:
        given = [id(a) in self.scaled for a in args]
        if name in ("add", "sub"):
            return all(given[:2])
        if name == "mul":
            return given[:2] in ([True, False], [False, True])
        if name == "where":
            return not given[0] and all(g or id(a) in self.zeros for g, a in zip(given[1:], args[1:], strict=True))
        if name in ("masked_fill", "index_put"):
            masks, value = args[1:3]
            mask = masks[0] if isinstance(masks, (list, tuple)) and len(masks) == 1 else masks
            whole = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == args[0].shape
            return whole and (id(value) in self.zeros if isinstance(value, Tensor) else not value)
        if name == "view" and isinstance(args[1], torch.dtype):
            return False
        return name in (*_COPIES, "div", "neg") and given[0] and not any(given[1:])
