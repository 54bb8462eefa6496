"""Request: samples on their way through the server, and what becomes of them."""

from __future__ import annotations

import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from shardwise.errors import FieldError


class Refused(Exception):
    """A request that gets no outputs.

    Attributes:
        status: of HTTP.
        message: for the client.
        told: more of it, by name.
    """

    def __init__(self, status: int, message: str, **told: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.told = status, message, told

    @classmethod
    def by(cls, error: FieldError) -> Refused:
        """422, because of a field."""
        return cls(422, str(error), field=error.field, expected=error.expected, given=error.given)


@dataclass(frozen=True, eq=False)
class Answer:
    """The outputs of a request.

    Attributes:
        form: the structure of the model's output; see `outputs.outline`.
        columns: of each tensor what it has for each sample of the whole batch, as JSON has it.
        start, stop: which samples of the batch these are.
    """

    form: Any
    columns: list[list[Any]]
    start: int
    stop: int


@dataclass(eq=False)
class Request:
    """Samples that wait for their outputs.

    Attributes:
        rows: the samples.
        kind: requests of one kind may be computed together.
        alone: whether it is computed by itself, since a batch with it failed.
        answer: gets an `Answer`, or raises `Refused`.
        since: when it came, by the monotonic clock.
    """

    rows: list[Any]
    kind: tuple[str, ...]
    alone: bool = False
    answer: Future[Answer] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    def give(self, answer: Answer) -> None:
        """Hand over the outputs, if somebody waits for them still."""
        with suppress(InvalidStateError):
            self.answer.set_result(answer)

    def refuse(self, refused: Refused) -> None:
        """Tell who waits that there will be no outputs."""
        with suppress(InvalidStateError):
            self.answer.set_exception(refused)
