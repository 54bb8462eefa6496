"""Writing: where the outputs of a run go, on the one process that gets them, and how many there are already, on all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardwise.engine.launch import Place, joined, launched
from shardwise.errors import FileError
from shardwise.files.formats import Format
from shardwise.files.outputs import Outputs


@dataclass(frozen=True)
class Writing:
    """A run's outputs on this process.

    Attributes:
        outputs: that it writes; None where it gets none, or no file is named.
        before: how many an earlier run had written.
        place: of this process in the launch that it is of; None where it starts ranks by itself.
    """

    outputs: Outputs | None
    before: int
    place: Place | None

    @property
    def gets(self) -> bool:
        """Whether this process gets the outputs: it starts the ranks, or is the first one of a launch."""
        return self.place is None or self.place.rank == 0


@contextmanager
def writing(path: Path | None, run: Mapping[str, Any], format: Format | None = None) -> Iterator[Writing]:
    """Where the outputs of a run go. In a launch its ranks are joined, and all have to call this.

    The arguments are those of `Outputs`.

    Raises:
        FileError: as `Outputs`, on every rank.
        LaunchError: as `joined`.
    """
    with ExitStack() as stack:
        place = stack.enter_context(joined()) if launched() or dist.is_initialized() else None
        outputs, wrong = None, None
        if path is not None and (place is None or place.rank == 0):
            try:
                outputs = stack.enter_context(Outputs(path, run, format))
            except FileError as error:
                wrong = error
        before = -1 if wrong is not None else outputs.done if outputs is not None else 0
        if place is not None:
            before = _of_rank_0(before, place)
        if wrong is not None:
            raise wrong
        if before < 0:
            raise FileError(f"rank 0 does not write {path}; its own message says why, and what to do")
        yield Writing(outputs, before, place)


def _of_rank_0(number: int, place: Place) -> int:
    found = torch.tensor([number], device=place.device)
    dist.broadcast(found, src=0)
    return int(found)
