"""Outputs: a model as it predicts, a batch's tensors in and the tensors of its own output out, and how they belong."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from shardwise.errors import JobError
from shardwise.job import Batch, map_batch

_PLAIN = (bool, int, float, complex, str, type(None))


@dataclass(frozen=True)
class Place:
    """Where tensor number `number` of an output belongs."""

    number: int


@dataclass(frozen=True)
class Named:
    """A mapping, or a dataclass such as a model's own kind of output: its class, and what it holds by name."""

    kind: type[Any]
    parts: tuple[tuple[Any, Any], ...]


@dataclass(frozen=True)
class Listed:
    """A tuple, named or not, or a list: its class, and what it holds in order."""

    kind: type[Any]
    parts: tuple[Any, ...]


def taken_apart(output: Any) -> tuple[Any, list[Tensor]]:
    """The form of an output, and its tensors.

    Numbers, strings and None are part of the form. What is anything else, such as a cache of keys and values, is no
    output: the form has None in its place.
    """
    tensors: list[Tensor] = []

    def form(x: Any) -> Any:
        if isinstance(x, Tensor):
            tensors.append(x)
            return Place(len(tensors) - 1)
        if isinstance(x, Mapping):
            return Named(type(x), tuple((key, form(value)) for key, value in x.items()))
        if isinstance(x, (tuple, list)):
            return Listed(type(x), tuple(map(form, x)))
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return Named(type(x), tuple((f.name, form(getattr(x, f.name))) for f in dataclasses.fields(x) if f.init))
        # Not a subclass: a size that depends on the batch is none of these.
        return x if type(x) in _PLAIN else None

    return form(output), tensors


def checked(output: Any) -> tuple[Any, list[Tensor]]:
    """As `taken_apart`.

    Raises:
        JobError: there is no tensor.
    """
    form, tensors = taken_apart(output)
    if not tensors:
        raise JobError(
            f"the model's output, {type(output).__name__}, has no tensor in it, so that there is nothing to predict; "
            "return a tensor, or a tuple, a dict or a dataclass of tensors"
        )
    return form, tensors


def put_together(form: Any, tensors: Sequence[Tensor]) -> Any:
    """The output of this form with these tensors."""
    if isinstance(form, Place):
        return tensors[form.number]
    if isinstance(form, Listed):
        parts = [put_together(part, tensors) for part in form.parts]
        return form.kind(*parts) if hasattr(form.kind, "_fields") else form.kind(parts)
    if isinstance(form, Named):
        named = {key: put_together(part, tensors) for key, part in form.parts}
        if dataclasses.is_dataclass(form.kind):
            return form.kind(**named)
        return form.kind(named) if form.kind in (dict, OrderedDict) else named
    return form


class _Seen:
    """Keeps a form, for a module that is exported may not change its own attributes."""

    form: Any = None


class OutputModule(nn.Module):
    """A model as one module: the tensors of a batch in, the tensors of the model's own output out.

    Args:
        caller: how a module is called on a batch.
        example: a batch, for its structure.

    Attributes:
        form: of the last output; see `taken_apart`.
    """

    def __init__(
        self, module: nn.Module, caller: Callable[[nn.Module], Callable[[Batch], Any]], example: Batch
    ) -> None:
        super().__init__()
        self.module = module
        self._caller = caller
        self._example = map_batch(example, lambda t: t.new_empty(0))
        self._seen = _Seen()

    @property
    def form(self) -> Any:
        return self._seen.form

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        stream: Iterator[Tensor] = iter(tensors)
        output = self._caller(self.module)(map_batch(self._example, lambda _: next(stream)))
        form, found = checked(output)
        self._seen.form = form
        return tuple(found)
