"""Intake: what clients send, turned into samples like the job's own, or refused with the field and the reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from shardwise.errors import FieldError, JobError
from shardwise.files.fields import ONE, Fields, own_sample
from shardwise.job import Batch, Job, batch_size, batch_tensors
from shardwise.serving.request import Refused, Request


@dataclass(frozen=True)
class Given:
    """What a client sent.

    Attributes:
        request: its samples.
        one: whether it gave one sample, not a list of them.
    """

    request: Request
    one: bool


class Intake:
    """Reads the bodies of requests for outputs.

    Args:
        job: whose samples they are to be like.
        names: fields that a sample of a request has; None means those that the model needs, or of a job whose model
            needs none by itself all that it takes.
        whole: whether every sample has to have all of them, since the model was captured with them.
        most: samples of a request.

    Raises:
        JobError: the job has no sample to know fields from, has no such fields, or its collate does not take samples of
            these fields alone.
    """

    path = "/predict"

    def __init__(self, job: Job, names: Sequence[str] | None, *, whole: bool, most: int) -> None:
        self._collate, self._collates, self._most = job.collate or default_collate, job.collate is not None, most
        own = own_sample(job)
        if own is None:
            raise JobError("the job's data is empty, so that nobody knows what a sample looks like; give it one sample")
        fields = Fields.of(job)
        chosen = tuple(names) if names is not None else _served(fields)
        strange = [name for name in chosen if name not in fields.fields]
        if strange:
            raise JobError(
                f"the job's samples have no field {strange[0]!r} that the model takes; they have "
                f"{', '.join(map(repr, fields.fields))}"
            )
        self._fields = fields.only(chosen)
        values = own if fields.kind == "dict" else dict(zip(fields.fields, own, strict=True))
        if fields.kind == "one":
            values = {ONE: own}
        self._row = self._fields.sample({name: values[name] for name in chosen}, where="the job's first sample: ")
        self.names = (ONE,) if fields.kind == "tuple" and len(chosen) == 1 else chosen
        """Of the fields, as requests have them."""
        self._needed = [
            name
            for name, field in zip(self.names, self._fields.fields.values(), strict=True)
            if whole or field.needed or len(chosen) == 1
        ]
        self._shapes: list[tuple[int, ...]] | None = None
        example = self.example(1)
        if whole and self._collates:
            self._shapes = [tuple(t.shape[1:]) for t in batch_tensors(example)]

    @property
    def takes(self) -> str:
        """What batches are of, in words."""
        return f"samples with {', '.join(self.names)}"

    def example(self, samples: int) -> Batch:
        """A batch of the job's first sample, so many times over.

        Raises:
            JobError: collate does not take samples with the fields that requests have.
        """
        try:
            batch = self.batch([self._row] * samples)
            batch_size(batch)
        except JobError:
            raise
        except Exception as error:
            raise JobError(
                f"the job's collate does not take samples with {', '.join(map(repr, self.names))} alone "
                f"({type(error).__name__}: {error}); name what requests have with --fields"
            ) from error
        return batch

    def batch(self, rows: list[Any]) -> Batch:
        """Samples as the batch that the model is given."""
        return self._collate(rows)

    def read(self, body: bytes) -> Given:
        """The samples of a body: `{"inputs": {field: numbers}}`, or a list of such in place of one.

        Raises:
            Refused: 400, it is not JSON; 422, it does not fit the job's samples.
        """
        inputs = read_object(body, "a sample, or a list of samples")["inputs"]
        one = not isinstance(inputs, list)
        samples = [inputs] if one else inputs
        if not 1 <= len(samples) <= self._most:
            many = f"at most {self._most} at a time" if samples else "at least 1"
            raise Refused(422, f'"inputs" has {len(samples)} samples; give {many}', expected=many, given=len(samples))
        try:
            rows, kinds = zip(
                *(self._sample(sample, "" if one else f"sample {i}: ") for i, sample in enumerate(samples)), strict=True
            )
        except FieldError as error:
            raise Refused.by(error) from error
        if len(set(kinds)) > 1:
            raise Refused(422, "the samples of a request must have the same fields; send those of each kind by itself")
        if self._collates:
            self._try(list(rows))
        return Given(Request(list(rows), kinds[0]), one)

    def _sample(self, given: Any, where: str) -> tuple[Any, tuple[str, ...]]:
        """A sample, and which fields it has."""
        named = given
        if not isinstance(given, dict):
            if len(self.names) > 1:
                raise FieldError(
                    f"{where}a sample must be an object with {self._listed()}, but is {_kind(given)}",
                    expected=list(self.names),
                    given=_kind(given),
                )
            named = {self.names[0]: given}
        lacking = [name for name in self._needed if name not in named] or ([] if named else list(self.names))
        strange = [name for name in named if name not in self.names]
        if lacking or strange:
            what = f"lacks field {lacking[0]!r}" if lacking else f"has an unknown field {strange[0]!r}"
            raise FieldError(
                f"{where or 'the sample '}{what}; a sample has {self._listed()}, and this one has "
                f"{', '.join(map(repr, named)) or 'nothing'}",
                field=(lacking or strange)[0],
                expected=list(self.names),
                given=list(named),
            )
        kind = tuple(name for name in self.names if name in named)
        row = self._fields.sample({name: named[name] for name in kind}, where=where)
        for name, tensor in zip(kind, batch_tensors(row), strict=False):
            if tensor.is_floating_point() and not _finite(tensor):
                raise FieldError(
                    f"{where}field {name!r} has a number that is too large for {tensor.dtype}",
                    field=name,
                    expected=str(tensor.dtype).removeprefix("torch."),
                    given="a larger number",
                )
        return row, kind

    def _listed(self) -> str:
        return ", ".join(repr(name) if name in self._needed else f"{name!r} (may be left out)" for name in self.names)

    def _try(self, rows: list[Any]) -> None:
        """Lets the job's own collate see a request by itself, so that it fails nobody else's batch."""
        try:
            batch = self.batch(rows)
            count = batch_size(batch)
        except Exception as error:
            raise Refused(422, f"the job's collate does not take it: {type(error).__name__}: {error}") from error
        if count != len(rows):
            raise Refused(422, f"the job's collate makes {count} samples of {len(rows)}")
        shapes = [tuple(t.shape[1:]) for t in batch_tensors(batch)]
        if self._shapes is not None and shapes != self._shapes:
            raise Refused(
                422,
                f"the job's collate makes samples of shape {shapes} of it, but the model was captured with "
                f"{self._shapes}; give samples of the length of the job's own",
                expected=[list(shape) for shape in self._shapes],
                given=[list(shape) for shape in shapes],
            )


def _finite(tensor: Tensor) -> bool:
    # Of a few numbers NumPy says it without handing the interpreter to another thread meanwhile.
    wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return bool(np.isfinite(wide.numpy()).all())


def _served(fields: Fields) -> tuple[str, ...]:
    """The fields that requests have unless told otherwise."""
    if fields.kind == "tuple":
        return tuple(fields.fields)[:1]
    return tuple(name for name, field in fields.fields.items() if field.needed) or tuple(fields.fields)


def read_object(body: bytes, inputs: str) -> dict[str, Any]:
    """The object of a body, which has "inputs": it is what `inputs` says.

    Raises:
        Refused: 400, it is not JSON; 422, it has none.
    """
    try:
        found = json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise Refused(400, "the body is not JSON that can be read: its lists are nested too deep") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(found, dict) or "inputs" not in found:
        given = ", ".join(map(repr, found)) or "nothing" if isinstance(found, dict) else _kind(found)
        raise Refused(
            422,
            f'the body must be an object with "inputs": {inputs}; it '
            + (f"has {given}" if isinstance(found, dict) else f"is {given}"),
            field="inputs",
            expected=["inputs"],
            given=given,
        )
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
