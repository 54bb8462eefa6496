"""Flight: how many micro-batches the ranks of a pipeline hold activations of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Flight:
    """The micro-batches in flight under a schedule.

    Attributes:
        schedule: as in a plan.
        ranks: along the pipeline.
        micros: micro-batches.
        ahead: how many times as many micro-batches as there are ranks a zero-bubble schedule has in flight.
        stepwise: whether memory is followed through backward.
    """

    schedule: str
    ranks: int
    micros: int
    ahead: int = 1
    stepwise: bool = True

    def most(self, rank: int, stages: int) -> float:
        """Micro-batches whose activations a pipeline rank holds at most, over all its stages."""
        each = stages // self.ranks
        if self.schedule == "gpipe":
            return self.micros * each
        if self.schedule == "zero-bubble":
            # The second half of a backward comes as late as the first rank's, and keeps what it needs.
            return min(self.micros, self.ranks * self.ahead) * each
        if each == 1:
            return min(self.micros, self.ranks - rank)
        ahead = (each - 1) * self.ranks + 2 * (self.ranks - rank - 1) + 1
        return min(self.micros * each, ahead)

    def kept(self, rank: int, kept: Sequence[float]) -> float:
        """Micro-batches in flight in the mean over a rank's stages, of which each keeps so many bytes for one."""
        if not sum(kept):
            return 0.0
        ways = self._ways(rank, len(kept))
        return max(sum(n * size for n, size in zip(way, kept, strict=True)) for way in ways) / sum(kept)

    def least(self, rank: int, each: int) -> float:
        """Micro-batches in flight in the mean over so many stages of a rank, whatever each of them keeps."""
        return max(min(way) for way in self._ways(rank, each))

    def _ways(self, rank: int, each: int) -> Sequence[Sequence[float]]:
        """How many micro-batches a rank's stages hold when they hold the most; some hold them in turns."""
        if self.schedule == "interleaved":
            return most_held(self.ranks, each, self.micros, rank)
        return [[self.most(rank, self.ranks * each) / each] * each]

    def half_done(self, rank: int) -> int:
        """Of the micro-batches in flight on a pipeline rank those that are half through backward.

        That is when the rank begins the first half of another, which is there with all that it keeps; of other
        frameworks, whose memory is not followed through backward, when it is through with that.
        """
        return min(self.micros - self.stepwise, rank + 1 - self.stepwise) if self.schedule == "zero-bubble" else 0


def most_held(ranks: int, each: int, micros: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of how many micro-batches a rank's interleaved stages hold activations when they hold the most together.

    Its first backward comes behind so many forwards (Narayanan et al., 2021), which go round its stages with as many
    micro-batches as there are ranks; later the first stages are ahead, by as many again at the most.

    Returns:
        for each stage how many at first, and how many when the first stages have gone ahead as far as they do.
    """
    most = min(micros * each, (each - 1) * ranks + 2 * (ranks - rank - 1) + 1)
    rounds, rest = divmod(most, ranks * each)
    first = [rounds * ranks + min(max(rest - k * ranks, 0), ranks) for k in range(each)]
    ahead, left = [], most
    for _ in range(each):
        ahead.append(min(left, micros, 2 * ranks))
        left -= ahead[-1]
    return tuple(first), tuple(ahead)
