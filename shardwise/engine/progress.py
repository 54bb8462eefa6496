"""Progress: what steps have been made, and the one line that shows it."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from dataclasses import dataclass
from typing import TextIO

import torch

from shardwise.job import Batch, batch_tensors

_EVERY = 5.0  # seconds between lines where they are not rewritten in place


@dataclass
class Run:
    """Steps that were made: their losses, their seconds without and with the reading of data, and what a step takes."""

    losses: list[float]
    seconds: list[float]
    elapsed: float = 0.0
    unit: str = "samples"
    per_step: int = 0


def counted(batch: Batch) -> tuple[str, int]:
    """What a batch is counted in: tokens where it has a whole-number tensor of samples and positions, else samples."""
    tensors = [t for t in batch_tensors(batch) if t.ndim]
    for tensor in tensors:
        if tensor.ndim == 2 and tensor.dtype in (torch.int64, torch.int32) and tensor.shape[1] > 1:
            return "tokens", tensor.numel()
    return "samples", int(tensors[0].shape[0]) if tensors else 0


class Progress:
    """One line: step, loss, rate, memory. Rewritten in place on a terminal, else printed every few seconds."""

    def __init__(
        self,
        steps: int,
        *,
        enabled: bool = True,
        terminal: bool | None = None,
        label: str = "",
        out: TextIO | None = None,
    ) -> None:
        self._steps = steps
        self._label = label
        self._enabled = enabled
        self._out = out or sys.stdout
        self._terminal = self._out.isatty() if terminal is None else terminal
        self._shown = -math.inf

    def __call__(self, run: Run, memory: int) -> None:
        done = len(run.losses)
        now = time.monotonic()
        last = done == self._steps
        if not self._enabled or not (last or now - self._shown >= (0.1 if self._terminal else _EVERY)):
            return
        self._shown = now
        line = self._label + progress_line(run, self._steps, memory)
        end = "\n" if last or not self._terminal else ""
        with contextlib.suppress(BrokenPipeError):
            self._out.write(f"\r{line}\x1b[K{end}" if self._terminal else f"{line}\n")
            self._out.flush()


class SampleProgress:
    """One line: samples done, rate, time left. Rewritten in place on a terminal, else printed every few seconds.

    Args:
        samples: in all, or None where that is not known.
        before: of them that were done by an earlier run.
        unit: what they are called.
    """

    def __init__(
        self,
        samples: int | None,
        before: int = 0,
        *,
        enabled: bool = True,
        out: TextIO | None = None,
        unit: str = "samples",
    ) -> None:
        self._samples, self._done = samples, before
        self._first: int | None = None
        """Samples done when the clock was started: starting the ranks is no part of the rate."""
        self._enabled = enabled
        self._unit = unit
        self._out = out or sys.stdout
        self._terminal = self._out.isatty()
        self._began = self._shown = time.monotonic()
        self._shown_done = -1

    def __call__(self, samples: int) -> None:
        """Counts samples that are done."""
        self._done += samples
        if self._first is None:
            self._first, self._began = self._done, time.monotonic()
        if time.monotonic() - self._shown >= (0.1 if self._terminal else _EVERY):
            self._show("")

    def end(self) -> None:
        """Shows the last state, where it is not there already."""
        if self._terminal or self._shown_done != self._done:
            self._show("\n")

    def _show(self, end: str) -> None:
        self._shown, self._shown_done = time.monotonic(), self._done
        if not self._enabled:
            return
        seconds = self._shown - self._began
        line = samples_line(self._done, self._samples, self._first or self._done, seconds, self._unit)
        with contextlib.suppress(BrokenPipeError):
            self._out.write(f"\r{line}\x1b[K{end}" if self._terminal else f"{line}\n")
            self._out.flush()


def samples_line(done: int, samples: int | None, first: int, seconds: float, unit: str = "samples") -> str:
    """Samples done, rate, time left, e.g. `12,800/50,000 samples  5,120 samples/s  7 s left`.

    The rate is of the samples behind the `first` that were done, in the seconds since then.
    """
    of = f"/{samples:,}" if samples is not None else ""
    if done == first or seconds <= 0:
        return f"{done:,}{of} {unit}"
    rate = (done - first) / seconds
    left = f"  {(samples - done) / rate:,.0f} s left" if samples is not None else ""
    return f"{done:,}{of} {unit}  {rate:,.{0 if rate >= 100 else 1}f} {unit}/s{left}"


def progress_line(run: Run, steps: int, memory: int) -> str:
    """Step, loss, rate and peak memory, e.g. `step 10/200  loss 2.3456  51,200 tokens/s  memory 0.41 GB`."""
    done = len(run.losses)
    rate = run.per_step * done / run.elapsed if run.elapsed else 0.0
    return (
        f"step {done:>{len(str(steps))}}/{steps}  loss {run.losses[-1]:.4f}  "
        f"{rate:,.{0 if rate >= 100 else 1}f} {run.unit}/s  memory {memory / 1e9:.2f} GB"
    )


def median(values: tuple[float, ...] | list[float]) -> float:
    """The middle value; 0 of none."""
    ordered = sorted(values)
    half, odd = divmod(len(ordered), 2)
    if not ordered:
        return 0.0
    return ordered[half] if odd else (ordered[half - 1] + ordered[half]) / 2
