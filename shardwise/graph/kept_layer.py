"""A layer of transformers' interface of caches that writes where it is told to. To be imported where it is used."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import StaticLayer


class KeptLayer(StaticLayer):  # type: ignore[misc]
    """Keys and values of all positions of a layer, [samples, heads, positions, depth].

    What a mask leaves out, such as all but a window, is there and not looked at. No count of positions is kept beside.

    Args:
        longest: positions that there are.
        positions: those of a step, [length].
    """

    def __init__(self, longest: int, positions: Tensor) -> None:
        super().__init__(max_cache_len=longest)
        self.positions = positions

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Take keys and values of earlier steps."""
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write a step's keys and values, and give those of all positions."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.index_copy_(2, self.positions, key_states)
        self.values.index_copy_(2, self.positions, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """Positions before this step's."""
        return self.positions[0]
