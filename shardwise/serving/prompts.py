"""Prompts: what clients send to have it gone on with, and the ranks of one replica that write the tokens behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwise.engine.launch import Place
from shardwise.errors import FieldError, JobError
from shardwise.graph import output
from shardwise.inference.completion import PIECE, TOKENS, Wanted, complete
from shardwise.inference.limits import Demand
from shardwise.inference.prediction import Replica
from shardwise.inference.prompts import checked
from shardwise.inference.sampling import Sampling
from shardwise.inference.steps import Steps, build_steps
from shardwise.parallel.mesh import Mesh
from shardwise.serving.intake import Given, read_object
from shardwise.serving.ranks import Model, Task
from shardwise.serving.request import Refused, Request

_DRAWS = ("temperature", "top_k", "top_p", "seed")
_LEAST = {"tokens": 1, "top_k": 1, "seed": 0}
"""Of what is a whole number; other numbers are above 0."""


@dataclass(frozen=True)
class Asked:
    """A prompt, tokens [length], and what is to follow it."""

    prompt: Tensor
    wanted: Wanted


class Prompts:
    """Reads the bodies of requests for the tokens that follow a prompt.

    Args:
        positions: of a prompt and its new tokens, of which the last needs none.
        seed: of draws, where a request has none.
    """

    path = "/generate"

    def __init__(self, positions: int, seed: int) -> None:
        self._positions, self._seed = positions, seed

    @property
    def takes(self) -> str:
        """What batches are of, in words."""
        return f"prompts of one length, each with its new tokens in up to {self._positions} positions"

    def batch(self, rows: list[Asked]) -> list[Asked]:
        """Prompts as the ranks are given them."""
        return rows

    def read(self, body: bytes) -> Given:
        """The prompt of a body: `{"inputs": [token, ...]}`, beside which it may say how to go on.

        Raises:
            Refused: 400, it is not JSON; 422, it is no prompt, is too long, or says something that cannot be.
        """
        given = read_object(body, "a list of tokens")
        try:
            prompt, sampling = self._prompt(given.pop("inputs")), self._sampling(given)
            wanted = Wanted(self._tokens(given, len(prompt)), sampling, _end(given))
        except FieldError as error:
            raise Refused.by(error) from error
        return Given(Request([Asked(prompt, wanted)], (str(len(prompt)),)), one=True)

    def _prompt(self, given: Any) -> Tensor:
        try:
            (prompt,) = checked([given], lambda _: "the prompt")
        except JobError as error:
            raise FieldError(str(error), field="inputs", expected="a list of tokens") from error
        if len(prompt) > self._positions:
            raise FieldError(
                f"the prompt has {len(prompt)} tokens, but there are {self._positions} positions",
                field="inputs",
                expected=f"at most {self._positions} tokens",
                given=len(prompt),
            )
        return prompt

    def _sampling(self, given: dict[str, Any]) -> Sampling:
        known = ("tokens", "end", *_DRAWS)
        for name, value in given.items():
            if name not in known:
                listed = ", ".join(map(repr, known))
                raise FieldError(
                    f'there is no {name!r}; beside "inputs" there are {listed}',
                    field=name,
                    expected=list(known),
                    given=value,
                )
            least = _LEAST.get(name)
            if name != "end" and value is not None and not (_above_0(value) if least is None else _whole(value, least)):
                expected = "a number above 0" if least is None else f"a whole number from {least} on"
                raise FieldError(f"{name!r} must be {expected}", field=name, expected=expected, given=value)
        draws = {name: given[name] for name in _DRAWS if given.get(name) is not None}
        try:
            return Sampling(**{"seed": self._seed, **draws})
        except JobError as error:
            raise FieldError(str(error), field=next(iter(draws)), given=draws) from error

    def _tokens(self, given: dict[str, Any], length: int) -> int:
        room = self._positions - length + 1
        asked: int | None = given.get("tokens")
        if asked is not None and asked > room:
            raise FieldError(
                f"{length} tokens and {asked} new ones have {length + asked - 1} positions, but there are "
                f"{self._positions}",
                field="tokens",
                expected=f"at most {room}",
                given=asked,
            )
        return min(TOKENS, room) if asked is None else asked


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 63


def _above_0(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _end(given: dict[str, Any]) -> tuple[int, ...]:
    """The tokens behind which nothing follows."""
    end = given.get("end")
    found = [] if end is None else end if isinstance(end, list) else [end]
    if not all(_whole(token, 0) for token in found):
        raise FieldError("'end' must be a token, or a list of them", field="end", expected="tokens", given=end)
    return tuple(found)


# --- on a rank --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generating(Task):
    """To write the tokens that follow prompts.

    Attributes:
        positions: of a prompt and its new tokens.
    """

    positions: int

    @property
    def together(self) -> int:
        return 1

    def on(self, place: Place) -> Model:
        demand = Demand(longest=self.positions, piece=min(PIECE, self.positions), largest=0)
        job = self.job.loaded()
        steps = build_steps(job, self.plan, Mesh.build(self.plan.axes), demand, place.device)
        writes = _Writes(steps, Replica.of(self.plan, place.rank).giver == place.rank, steps.vocabulary())
        length = min(demand.piece + 1, self.positions)  # of a prompt that goes through both programs
        writes.compute(0, [Asked(torch.zeros(length, dtype=torch.int64), Wanted(1, Sampling(), ()))])
        return writes


@dataclass(frozen=True, eq=False)
class _Writes:
    steps: Steps
    gives: bool
    vocabulary: int
    dims = (0,)

    def compute(self, number: int, batch: Sequence[Asked]) -> tuple[Any, list[list[list[int]]]]:
        for asked in batch:
            largest = int(asked.prompt.max())
            if largest >= self.vocabulary:
                raise FieldError(
                    f"token {largest} is in the prompt, but the model has a vocabulary of {self.vocabulary}",
                    field="inputs",
                    expected=f"tokens from 0 to {self.vocabulary - 1}",
                    given=largest,
                )
        # A prompt is number 0 of its request, whatever it is computed with: draws are those of its seed alone.
        found = complete(
            self.steps, [asked.prompt for asked in batch], [0] * len(batch), [asked.wanted for asked in batch]
        )
        return output.Place(0), [[tokens.tolist() for tokens in found]]
