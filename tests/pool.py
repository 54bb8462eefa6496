"""Live ranks that tests share."""

from __future__ import annotations

from shardwise.engine.launch import Ranks


class Pool:
    """Live ranks, the same ones for as long as they are usable."""

    def __init__(self) -> None:
        self._live: dict[int, Ranks] = {}

    def __call__(self, ranks: int) -> Ranks:
        if ranks not in self._live or not self._live[ranks].usable:
            self._live[ranks] = Ranks(ranks, threads=1)
        return self._live[ranks]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for live in self._live.values():
            live.close()
