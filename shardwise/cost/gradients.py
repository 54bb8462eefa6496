"""When gradients of tensors are there, which ones are the same tensor, as autograd passes them on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from shardwise.graph.fold import Folded
from shardwise.graph.graph import Op
from shardwise.graph.rules import Value
from shardwise.graph.saved import Saved


def gradient_lives(folded: Folded, saved: Mapping[Op, Saved]) -> npt.NDArray[np.int_]:
    """Of gradients of tensors between operators three rows: what made the tensor, what reads it last, its number.

    A gradient is there from the backward of the last reader to that of the maker. A sum or a view passes on what comes
    back: such gradients are one, of the tensor that comes last.

    Args:
        folded: the graph.
        saved: for each operator of the short graph what its backward makes.
    """
    whole, numbers = folded.whole, folded.numbers
    readers: dict[Value, list[Op]] = {}
    for op in whole.ops:
        for value in dict.fromkeys(op.inputs):
            readers.setdefault(value, []).append(op)
    needed = {v for v in whole.producer if v in whole.needs_grad and v in readers}
    one_with: dict[Value, Value] = {}
    begins: dict[Value, int] = {}
    for op in reversed(whole.ops):
        for value in op.outputs:
            if value in needed:
                root = one_with.get(value, value)
                begins[root] = min(begins.get(root, op.index), op.index)
        fresh = saved[folded.graph.ops[folded.index[op.index]]].fresh
        back = next((one_with.get(v, v) for v in op.outputs if v in needed), None)
        for value in op.inputs:
            if back is not None and value in needed and folded.values[value] not in fresh and len(readers[value]) == 1:
                one_with[value] = back
    found = [(begin, readers[root][-1].index, numbers[root]) for root, begin in begins.items()]
    return np.array(found, dtype=int).reshape(-1, 3).T
