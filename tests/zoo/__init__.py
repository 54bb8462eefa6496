"""The models that the proof is run on, by name; the SPEC of one is `tests.zoo.hf:llama`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from shardwise.graph.graph import Graph
from shardwise.job import Job
from tests.zoo import hf, plain

ZOO: dict[str, Callable[[], Job]] = {function.__name__: function for function in (*hf.MODELS, *plain.MODELS)}


@cache
def graph_of(name: str) -> Graph:
    """The graph of a model of the zoo, captured once by each process; nobody changes it."""
    return Graph.of(ZOO[name]())
