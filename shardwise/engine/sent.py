"""Sent: a job on its way to a rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardwise.job import Job, load_spec

_SETTINGS = ("global_batch", "precision", "clip_norm", "seed", "name", "weights")


@dataclass(frozen=True)
class Sent:
    """A job itself; or its SPEC, which a rank reads for itself, and the settings that its caller may have changed."""

    job: Job | None
    spec: str | None
    settings: dict[str, Any]

    @classmethod
    def of(cls, job: Job, spec: str | None) -> Sent:
        return cls(None if spec else job, spec, {key: getattr(job, key) for key in _SETTINGS})

    def loaded(self) -> Job:
        """The job, on the rank."""
        if self.spec is None:
            assert self.job is not None
            return self.job
        return load_spec(self.spec).with_(**self.settings)
