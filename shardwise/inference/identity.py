"""Identity: what tells a run from others, so that none goes on with the outputs of another that was killed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from shardwise.job import Job
from shardwise.weights.find import find_files

_ENDS = 1 << 20  # bytes


def settings_of(job: Job) -> dict[str, Any]:
    """What a job's outputs depend on beside its code: its name, precision, seed and files of weights."""
    found: dict[str, Any] = {"job": job.title(), "precision": job.precision, "seed": job.seed}
    if job.weights is not None:
        found["weights"] = [identity_of(file) for file in find_files(Path(job.weights))[0]]
    return found


def identity_of(file: Path) -> list[Any]:
    """What tells a file from another: its size, when it was changed, and a hash of its first and last megabyte."""
    found = hashlib.sha256()
    with file.open("rb") as content:
        size = content.seek(0, 2)
        for at in (0, max(0, size - _ENDS)):
            content.seek(at)
            found.update(content.read(_ENDS))
    return [size, file.stat().st_mtime_ns, found.hexdigest()]


def code_of(spec: str) -> str:
    """What tells a SPEC from another: the hash of its file and its function, or its name."""
    target, _, name = spec.rpartition(":")
    return f"{hashlib.sha256(Path(target).read_bytes()).hexdigest()}:{name}" if target.endswith(".py") else spec
