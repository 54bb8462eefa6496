"""What capture gives: a graph of operators, and which of its placeholders stand for what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx


@dataclass(frozen=True, eq=False)
class Captured:
    """The captured graph: an fx graph whose placeholders are parameters, buffers, constants and batch tensors.

    Attributes:
        graph: nodes in execution order; the output is the results, then the new values of changed buffers.
        params: placeholder name to the parameter's name in the user's module (tied names resolved to one).
        buffers: placeholder name to buffer name.
        constants: placeholder name to tensor.
        inputs: placeholder names of the batch tensors, in the order of `batch_tensors`.
        updates: names of the buffers that the graph's last outputs replace.
        tied: parameter name to the name of the parameter that it is the same tensor as.
        results: what the graph is run for, in the order of its output: `loss`, then `count` where the number of items
            is given that it is a mean over; or the tensors of the model's own output.
        batch_symbols: names of the symbols that stand for the number of samples; empty where the model fixes it.
        form: of the model's own output, where the graph is for prediction; see `output.taken_apart`.
        state: names of the buffers that a step of generation reads and renews; see `graph.step`.
    """

    graph: fx.Graph
    params: dict[str, str]
    buffers: dict[str, str]
    constants: dict[str, Tensor]
    inputs: list[str]
    updates: list[str]
    tied: dict[str, str]
    results: tuple[str, ...]
    batch_symbols: frozenset[str]
    fixed_batch: int | None
    form: Any = None
    state: tuple[str, ...] = ()
