"""Predict from file to file: the outputs of a dataset's samples, in a file that a killed run goes on with."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset, Subset

from shardwise.engine.progress import SampleProgress
from shardwise.errors import RunError
from shardwise.inference.accuracy import Accuracy, difference, first
from shardwise.inference.identity import settings_of
from shardwise.inference.precision import Precision, check_precision
from shardwise.inference.predict import predict
from shardwise.inference.writing import writing
from shardwise.job import Job
from shardwise.plan.plan import Plan


@dataclass(frozen=True)
class Predicted:
    """What a run wrote.

    Attributes:
        output: the file.
        samples: in it.
        before: how many of them an earlier run had written.
        seconds: of this run, ranks and files included, less what fp32 took to compare with.
        bytes: of the file.
        ranks: that computed, where a plan or a number was given.
        precision: that the weights were held in, where one was asked for.
        accuracy: how far the first outputs of this run are from those in fp32; or why that is not known.
    """

    output: str
    samples: int
    before: int
    seconds: float
    bytes: int
    ranks: int | None
    precision: str | None = None
    accuracy: Accuracy | str | None = None

    @property
    def rate(self) -> float:
        """Samples per second of this run."""
        return (self.samples - self.before) / self.seconds if self.seconds else 0.0

    def text(self) -> str:
        """One line of it."""
        gone_on = f" ({self.before:,} of them by an earlier run)" if self.before else ""
        rate = f"{self.rate:,.{0 if self.rate >= 100 else 1}f} samples/s"
        told = f"{self.samples:,} samples{gone_on} in {self.seconds:.1f} s, {rate}: {self.output}, {self.bytes:,} bytes"
        if self.accuracy is None:
            return told
        return f"{told}\n{self.accuracy.text() if isinstance(self.accuracy, Accuracy) else self.accuracy}"

    def to_dict(self) -> dict[str, Any]:
        """The same as numbers and strings."""
        return {**asdict(self), "rate": self.rate}


def predict_file(
    job: Job,
    data: Dataset[Any],
    output: Path,
    *,
    run: dict[str, Any],
    plan: Plan | None = None,
    ranks: int | None = None,
    spec: str | None = None,
    precision: Precision | None = None,
    compare: int = 1,
    progress: bool = True,
) -> Predicted | None:
    """Writes the outputs of all samples to a file, whose ending says of which type.

    Under torchrun every rank has to call it; rank 0 writes the file, and the others get None.

    Args:
        run: what makes this run another than others, beside the job's settings; an unfinished run is gone on with only
            where it is the same.
        precision: as in `predict`; where it is another than fp32, the summary has the difference from it.
        compare: chunks that are computed in fp32 too, for that difference; 0 leaves it out.
        progress: whether to print a line of it.

    The other arguments are those of `predict`.

    Raises:
        FileError: a sample does not fit the job, or the outputs cannot be written.
        UserError, RunError: as `predict`.
    """
    settings = settings_of(job)
    if precision is not None:
        check_precision(precision)
        settings["held"] = precision
    began = time.perf_counter()
    with writing(output, {**settings, **run}) as to:
        rest = _rest(data, to.before)
        given = None if rest is job.data else rest  # which the ranks read by themselves
        true: list[Any] = []
        compared: list[Any] = []
        why = None
        if precision not in (None, "fp32") and compare:
            try:
                part = first(rest, compare * job.global_batch)
                true = list(predict(job, part, plan, precision="fp32", ranks=ranks, spec=spec))
            except RunError as error:  # the memory may not do for it
                why = f"not compared with fp32, in which it does not run: {error}"
            began = time.perf_counter()
        line = SampleProgress(_length(data), to.before, enabled=progress and to.gets)
        with closing(predict(job, given, plan, precision=precision, ranks=ranks, spec=spec)) as found:
            for output_of_chunk in found:
                assert to.outputs is not None
                if len(compared) < len(true):
                    compared.append(output_of_chunk)
                line(to.outputs.add(output_of_chunk))
        line.end()
        if to.outputs is None:
            return None
        samples = to.outputs.finish()
    seconds = time.perf_counter() - began
    ranks = to.place.world if to.place is not None else plan.ranks if plan is not None else ranks
    far = difference(compared, true, str(precision), "fp32") if compared else why
    return Predicted(str(output), samples, to.before, seconds, output.stat().st_size, ranks, precision, far)


def _length(data: Dataset[Any]) -> int | None:
    return None if isinstance(data, IterableDataset) else len(data)  # type: ignore[arg-type]


class _Later(IterableDataset[Any]):
    """A stream without its first samples."""

    def __init__(self, data: IterableDataset[Any], first: int) -> None:
        self._data, self._first = data, first

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._data), self._first, None)


def _rest(data: Dataset[Any], first: int) -> Dataset[Any]:
    if not first:
        return data
    if isinstance(data, IterableDataset):
        return _Later(data, first)
    return Subset(data, range(first, len(data)))  # type: ignore[arg-type]
