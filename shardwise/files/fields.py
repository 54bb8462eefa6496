"""Fields: how a job's own samples look, and values from elsewhere made such samples, or refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from shardwise.errors import FieldError
from shardwise.job import Job
from shardwise.seeding import seeded

ONE = "input"
"""What the tensor is called of a sample that is one tensor."""


@dataclass(frozen=True)
class Field:
    """A tensor of the job's samples; None where any will do."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    needed: bool


@dataclass(frozen=True)
class Fields:
    """How a job's own samples look.

    Attributes:
        kind: "one" tensor, a "tuple" whose first element the model is given, or a "dict".
        fields: of a sample; those of a tuple are called by their place.
        others: names that the model takes as well.
    """

    kind: str
    fields: dict[str, Field]
    others: frozenset[str]

    @classmethod
    def of(cls, job: Job) -> Fields:
        sample, collated = own_sample(job), job.collate is not None
        if isinstance(sample, (tuple, list)):
            named = {str(i): value for i, value in enumerate(sample)}
            return cls("tuple", {k: _field(v, k == "0", collated) for k, v in named.items()}, frozenset())
        if not isinstance(sample, Mapping):
            return cls("one", {ONE: _field(sample, True, collated)}, frozenset())
        taken = inspect.signature(job.build("meta").forward).parameters
        needed = {name for name, p in taken.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
        takes_all = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        fields = {k: _field(v, k in needed, collated) for k, v in sample.items() if takes_all or k in taken or collated}
        return cls("dict", fields, frozenset(taken))

    @property
    def nameless(self) -> str:
        """The field that an array without a name is: of a dict the one that is needed, where it is one."""
        needed = [name for name, field in self.fields.items() if field.needed] or list(self.fields)
        return needed[0] if self.kind == "dict" and len(needed) == 1 else ONE

    def only(self, names: Sequence[str]) -> Fields:
        """Some of the fields, and none beside them."""
        return replace(self, fields={name: self.fields[name] for name in names}, others=frozenset())

    def check_names(self, names: Sequence[str], *, where: str) -> None:
        """Check that a sample with fields of these names has those that a model needs.

        Args:
            where: opens the message: what has them.

        Raises:
            FieldError: it lacks some.
        """
        if self.kind != "dict":
            return
        absent = [name for name in self.fields if name not in names]
        strange = [name for name in names if name not in self.fields and name not in self.others]
        lacking = [name for name in absent if self.fields[name].needed]
        if lacking or len(absent) == len(self.fields) or (absent and strange):
            raise FieldError(
                f"{where}lacks {_listed(lacking or absent)}, which the job's samples have; it has {_listed(names)}; "
                f"the job's samples have {_listed(list(self.fields))}",
                field=(lacking or absent)[0],
                expected=list(self.fields),
                given=list(names),
            )

    def sample(self, named: Mapping[str, Any], *, where: str) -> Any:
        """A sample in the structure, the dtypes and the shapes of the job's own.

        Args:
            named: numbers and lists, or tensors, by the names of their fields; of one tensor, or of a tuple, by any
                names in the order of the elements.
            where: opens the message: which sample it is.

        Raises:
            FieldError: a field does not fit.
        """
        if self.kind == "dict":
            return {k: _fit(k, named[k], f, where) for k, f in self.fields.items() if k in named}
        pairs = zip(self.fields.items(), named.items(), strict=False)
        values = [_fit(name, value, field, where) for (_, field), (name, value) in pairs]
        return values[0] if self.kind == "one" else tuple(values)


def own_sample(job: Job) -> Any:
    """The first of the job's own samples; None where there is none."""
    with seeded(job.seed, 0, 0):
        found = next(iter(job.data), None) if isinstance(job.data, IterableDataset) else None
        if not isinstance(job.data, IterableDataset):
            found = job.data[0] if job.samples() else None
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def _field(value: Any, needed: bool, collated: bool) -> Field:
    if not isinstance(value, (Tensor, np.ndarray, np.generic, int, float, complex)):
        return Field(None, None, needed)
    tensor = torch.as_tensor(value)
    return Field(None if collated else tuple(tensor.shape), tensor.dtype, needed)


def _fit(name: str, value: Any, field: Field, where: str) -> Any:
    told = f"{where}field {name!r}"
    if not isinstance(value, Tensor):
        if field.dtype is None and field.shape is None:
            return value
        value = _numbers(name, value, field, told)
    if field.shape is not None and tuple(value.shape) != field.shape:
        raise FieldError(
            f"{told} has the shape {tuple(value.shape)}, but the job's own samples have {field.shape}; give "
            "samples of that shape" + _ragged(tuple(value.shape), field.shape),
            field=name,
            expected=list(field.shape),
            given=list(value.shape),
        )
    if field.dtype is None or value.dtype == field.dtype:
        return value
    if not torch.can_cast(value.dtype, field.dtype):
        raise _of_dtype(name, field, f"{told} holds {value.dtype}", _called(value.dtype), "convert it")
    if _exceeds(value, field.dtype):
        given = f"{value.numpy().min()} to {value.numpy().max()}"  # torch has neither of some dtypes
        raise _of_dtype(name, field, f"{told} holds {given}", given, "give numbers in its range")
    if value.dtype == torch.float64 and field.dtype == torch.float32:
        # As `to` does, but in a thread beside busy ones many times faster: NumPy keeps the interpreter for so little.
        with np.errstate(over="ignore"):
            return torch.from_numpy(value.numpy().astype(np.float32))
    return value.to(field.dtype)


def _ragged(given: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    return ", or a job whose collate pads them" if len(given) == len(wanted) else ""


def _of_dtype(name: str, field: Field, fact: str, given: str, remedy: str) -> FieldError:
    assert field.dtype is not None
    told = f"{fact}, but the job's own samples hold {field.dtype}; {remedy}"
    return FieldError(told, field=name, expected=_called(field.dtype), given=given)


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_WHOLE = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64)


def _exceeds(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether whole numbers are beyond those of another dtype, where they would become others without a word."""
    if dtype not in _WHOLE or value.dtype not in _WHOLE or not value.numel():
        return False
    has, takes = torch.iinfo(value.dtype), torch.iinfo(dtype)
    if takes.min <= has.min and has.max <= takes.max:
        return False
    array = value.numpy()
    return bool(array.min() < takes.min or array.max() > takes.max)


def _numbers(name: str, value: Any, field: Field, told: str) -> Tensor:
    """Numbers and lists of them as a tensor."""
    expected = list(field.shape) if field.shape is not None else "numbers"
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise FieldError(
            f"{told} has lists of unlike lengths; pad them to one length",
            field=name,
            expected=expected,
            given="lists of unlike lengths",
        ) from error
    if array.dtype.kind not in "biuf":
        kind = "texts" if array.dtype.kind == "U" else "values that are not numbers"
        raise FieldError(
            f"{told} has {kind}; numbers are needed, or a job whose collate turns samples into them",
            field=name,
            expected=expected,
            given=kind,
        )
    return as_tensor(array.astype("L") if array.dtype.kind == "u" else array)  # torch knows no other name of it


def as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """A tensor with the numbers of an array, in this machine's order of bytes."""
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
