"""One exception tree. A message is the fact, the numbers, the remedy.

`UserError` is the user's to mend (exit status 2); `RunError` is a run or a proof that failed (exit status 1).
"""

from __future__ import annotations


class ShardwiseError(Exception):
    """Base of every error that Shardwise raises on purpose."""

    exit_status = 1


class UserError(ShardwiseError):
    """Something the user can mend: a bad spec, a batch that does not divide, an unknown dim."""

    exit_status = 2


class SpecError(UserError):
    """A SPEC that does not import, or does not return a Job."""


class JobError(UserError):
    """A Job whose parts do not fit together: no parameters, an empty dataset, a bad precision."""


class PlanError(UserError):
    """A plan that does not fit the graph, the ranks or the batch."""


class MachineError(UserError):
    """A device, network or cluster that is unknown, or whose description lacks a number or has a wrong one."""


class LaunchError(UserError):
    """A launch that cannot start: a port in use, an address that is not trusted, a missing device."""


class ArrayError(UserError):
    """An array that cannot be mapped over, or a function that does not turn its blocks into blocks."""


class FileError(UserError):
    """A file of inputs or outputs that cannot be read or written, or does not fit the job."""


class FieldError(FileError):
    """A sample from elsewhere that does not fit the job's own: which field, what is expected, what is given."""

    def __init__(self, message: str, *, field: str = "", expected: object = None, given: object = None) -> None:
        super().__init__(message)
        self.field, self.expected, self.given = field, expected, given


class WeightsError(UserError):
    """Weights that cannot be read or written, or that are not those of the model."""


class CaptureError(ShardwiseError):
    """A model that does not capture. It still runs split by data; the message says why it did not capture."""

    exit_status = 2


class RunError(ShardwiseError):
    """A run that failed: a rank died, the loss became NaN, a collective timed out."""


class LostRankError(RunError):
    """A rank whose process ended though nobody told it to."""


class ProofError(ShardwiseError):
    """A split that does not compute what one device computes."""
