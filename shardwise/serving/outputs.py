"""Outputs: what a model gives as JSON, in the model's own structure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.graph.output import Listed, Named, Place
from shardwise.serving.request import Answer


def outline(form: Any) -> Any:
    """The form of an output in dicts, lists, numbers and strings, with a `Place` for each tensor."""
    if isinstance(form, Named):
        return {str(key): outline(part) for key, part in form.parts}
    if isinstance(form, Listed):
        return [outline(part) for part in form.parts]
    if isinstance(form, complex):
        return [_number(form.real), _number(form.imag)]
    return _number(form) if isinstance(form, float) else form


def columns(tensors: Sequence[Tensor | list[Any]], dims: Sequence[int]) -> list[list[Any]]:
    """Of each tensor what it has for each sample, as JSON has it.

    Tensors are nested lists. Numbers that are not finite are the strings "NaN", "Infinity" and "-Infinity", as in the
    JSON of Protocol Buffers; complex ones are pairs.

    Args:
        tensors: a list has something for each sample already.
        dims: along which the samples lie.
    """
    return [_lists(t.movedim(dim, 0)) if isinstance(t, Tensor) else t for t, dim in zip(tensors, dims, strict=True)]


def by_sample(answer: Answer) -> list[Any]:
    """The output of each sample of a request, in the model's own structure."""
    return [_filled(answer.form, [c[i] for c in answer.columns]) for i in range(answer.start, answer.stop)]


def _filled(form: Any, values: list[Any]) -> Any:
    if isinstance(form, Place):
        return values[form.number]
    if isinstance(form, dict):
        return {key: _filled(part, values) for key, part in form.items()}
    if isinstance(form, list):
        return [_filled(part, values) for part in form]
    return form


def _lists(tensor: Tensor) -> list[Any]:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    lists: list[Any] = tensor.tolist()
    finite = not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
    return lists if finite else [_told(part) for part in lists]


def _told(value: Any) -> Any:
    return [_told(part) for part in value] if isinstance(value, list) else _number(value)


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
