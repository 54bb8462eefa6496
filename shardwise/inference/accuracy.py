"""Accuracy: how far a job's outputs in one precision are from those in another, on its first samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from torch.utils.data import Dataset, IterableDataset, Subset

from shardwise.errors import RunError
from shardwise.graph.output import taken_apart
from shardwise.inference.precision import Precision
from shardwise.inference.predict import predict
from shardwise.job import Job
from shardwise.plan.plan import Plan


@dataclass(frozen=True)
class Accuracy:
    """How far outputs are from others.

    Attributes:
        precision, against: of the outputs, and of those that they are compared with.
        samples: compared.
        relative: 2-norm of all differences by the 2-norm of the other outputs.
        largest: difference of one entry.
        same: share of rows whose largest entry is the same one; None where no output has rows.
        rows: how many: vectors along the last dim of outputs that are matrices or batches of them, such as scores of
            classes, or of tokens at each position.
    """

    precision: str
    against: str
    samples: int
    relative: float
    largest: float
    same: float | None
    rows: int

    def text(self) -> str:
        """One line of it."""
        told = f"{self.precision} against {self.against} on the first {self.samples:,} samples: off by "
        told += f"{self.relative:.2%} of the norm, at most {self.largest:.3g} in an entry"
        return told if self.same is None else f"{told}; same argmax in {self.same:.2%} of {self.rows:,} rows"

    def to_dict(self) -> dict[str, Any]:
        """The same as numbers and strings."""
        return asdict(self)


def accuracy(
    job: Job,
    data: Dataset[Any] | None = None,
    plan: Plan | None = None,
    *,
    precision: Precision,
    against: Precision = "fp32",
    chunks: int = 1,
    ranks: int | None = None,
    spec: str | None = None,
) -> Accuracy:
    """How far a job's outputs in one precision are from those in another.

    Runs the first `chunks` chunks of the data twice, by the same plan, one after the other. The other arguments are
    those of `predict`.

    Raises:
        UserError, RunError: as `predict`.
    """
    data = first(job.data if data is None else data, chunks * job.global_batch)
    with closing(predict(job, data, plan, precision=against, ranks=ranks, spec=spec)) as outputs:
        true = list(outputs)
    with closing(predict(job, data, plan, precision=precision, ranks=ranks, spec=spec)) as outputs:
        return difference(outputs, true, precision, against)


def first(data: Dataset[Any], count: int) -> Dataset[Any]:
    """The first samples of a dataset."""
    if isinstance(data, IterableDataset):
        return _First(data, count)
    return Subset(data, range(min(count, len(data))))  # type: ignore[arg-type]


class _First(IterableDataset[Any]):
    """The first samples of a stream."""

    def __init__(self, data: IterableDataset[Any], count: int) -> None:
        self._data, self._count = data, count

    def __iter__(self) -> Any:
        return itertools.islice(iter(self._data), self._count)


def difference(found: Iterable[Any], true: Sequence[Any], precision: str, against: str) -> Accuracy:
    """How far outputs are from others, chunk by chunk; entries that are infinite in both count as equal.

    Raises:
        RunError: they are not of the same structure.
    """
    apart = norm = largest = 0.0
    samples = rows = same = 0
    for ours, theirs in zip(found, true, strict=False):
        (form, mine), (other_form, others) = taken_apart(ours), taken_apart(theirs)
        if form != other_form or [t.shape for t in mine] != [t.shape for t in others]:
            raise RunError(f"in {precision} the outputs have another structure than in {against}")
        samples += next((len(t) for t in mine if t.ndim), 1)
        for a, b in zip(mine, others, strict=True):
            if not a.is_floating_point() or not a.numel():
                continue
            if a.ndim in (2, 3) and a.shape[-1] > 1:
                equal = a.argmax(-1) == b.argmax(-1)
                rows, same = rows + equal.numel(), same + int(equal.sum())
            wide, wanted = a.double(), b.double()
            gap = (wide - wanted).abs().masked_fill(wide == wanted, 0.0)  # infinities less each other are no number
            apart += float(gap.pow(2).sum())
            norm += float(wanted[wanted.isfinite()].pow(2).sum())
            # What is a number on one side alone is as far off as can be.
            largest = max(largest, float(gap.nan_to_num(nan=math.inf).max()))
    relative = math.sqrt(apart / norm) if norm else (0.0 if largest == 0 else math.inf)
    return Accuracy(precision, against, samples, relative, largest, same / rows if rows else None, rows)
