"""Candidate: a strategy's plan for a job, or why there is none; and the arithmetic that makers of plans share."""

from __future__ import annotations

from dataclasses import dataclass

from shardwise.plan.plan import Plan


@dataclass(frozen=True)
class Candidate:
    """A strategy's plan for a job.

    Attributes:
        strategy: one of `strategies.STRATEGIES`.
        plan: None where the strategy does not apply.
        reason: what the plan splits, or why the strategy does not apply.
    """

    strategy: str
    plan: Plan | None
    reason: str


class NotApplicable(Exception):
    """A strategy cannot split this job; the message says why."""


def check_divides(total: int, ranks: int) -> None:
    """Check that ranks get equally many of `total` samples.

    Raises:
        NotApplicable: they do not.
    """
    if total % ranks:
        near = f"{total - total % ranks} or {total + ranks - total % ranks}" if total > ranks else f"{ranks}"
        raise NotApplicable(f"the global batch of {total} samples does not divide by {ranks} ranks; take {near}")


def micro_batches(samples: int, ranks: int) -> list[int]:
    """Numbers of micro-batches worth trying, best first: enough to fill the pipeline, and equal ones."""
    wanted = [n for n in (4 * ranks, 2 * ranks, ranks) if samples % n == 0]
    others = [n for n in range(min(4 * ranks, samples), 1, -1) if samples % n == 0 and n not in wanted]
    return wanted + others


def factors(number: int) -> list[int]:
    """The prime factors of a number, the smallest first."""
    found, rest, factor = [], number, 2
    while rest > 1:
        while rest % factor == 0:
            found.append(factor)
            rest //= factor
        factor += 1
    return found
