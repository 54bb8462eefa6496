"""The models that the proof is run on, by name; the SPEC of one is `tests.zoo.hf:llama`."""

from __future__ import annotations

from collections.abc import Callable

from shardwise.job import Job
from tests.zoo import hf, plain

ZOO: dict[str, Callable[[], Job]] = {function.__name__: function for function in (*hf.MODELS, *plain.MODELS)}
