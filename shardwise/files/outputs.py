"""Outputs: what a model gives, written in parts as it comes, and put together into one file at the end.

    FILE.parts/run.jsonl             the run, then one line for each part that is whole: its samples, its SHA-256
    FILE.parts/0-4096.safetensors    the outputs of these samples

A run that was killed goes on behind the last part that `run.jsonl` names. FILE itself appears when all is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from shardwise.errors import FileError
from shardwise.files.formats import FORMATS, Format, Head, Part
from shardwise.weights.format import NAMES

ONE = "output"
"""What the tensor is called where a model gives one."""
_PART_BYTES = 32 << 20  # of outputs in a part, so that a part is written in a fraction of the time it is to save
_PART_SECONDS = 2.0  # and of a slow model's no longer; then less is lost


@dataclass(frozen=True)
class _Line:
    """A part as `run.jsonl` has it."""

    file: str
    start: int
    stop: int
    sha256: str
    heads: Head
    """Of each tensor the dtype, and the shape of one sample."""


class Outputs:
    """The outputs of a run on their way into a file; what `done` counts is on the disk.

        with Outputs(Path("out.npz"), run={"job": "mine"}) as outputs:
            for output in predict(job, rest(outputs.done)):
                outputs.add(output)
            outputs.finish()

    Args:
        path: of the file; its ending says of which type.
        run: names and numbers of what is computed; a run that was killed is gone on with only if they are the same.
        format: of the file; None means the one of its ending.

    Raises:
        FileError: the type is unknown, the path cannot be written, or has the parts of another run.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], format: Format | None = None) -> None:
        if format is None and path.suffix not in FORMATS:
            raise FileError(f"{path} has the unknown type {path.suffix!r}; name a file of {', '.join(FORMATS)}")
        self._path, self._format = path, format or FORMATS[path.suffix](path)
        self._folder = path.with_name(f"{path.name}.parts")
        self._run = json.loads(json.dumps(dict(run)))
        self._lines: list[_Line] = []
        self._end = 0
        """Bytes of the log that count."""
        self._waiting: list[dict[str, Tensor]] = []
        self._bytes, self._since = 0, time.monotonic()
        with _disk(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._log = (self._folder / "run.jsonl").open("a+b", buffering=0)
            try:
                self._resume()
            except BaseException:
                self._log.close()
                raise

    @property
    def done(self) -> int:
        """Samples whose outputs are on the disk."""
        return self._lines[-1].stop if self._lines else 0

    def add(self, output: Any) -> int:
        """Takes the output of the next samples; their number. They are on the disk when a part is full.

        Raises:
            FileError: the disk is full, or the file cannot hold such an output.
        """
        tensors = named(output)
        samples = _samples(tensors)
        odd = next((name for name, tensor in tensors.items() if tensor.dtype not in NAMES), None)
        if odd is not None:
            raise FileError(
                f"output {odd!r} holds {_head(tensors)[odd][0]}, which no part can hold; give another dtype"
            )
        self._format.check([_head(tensors), *(line.heads for line in self._lines[:1])], ONE)
        if self._waiting:
            self._format.check([_head(tensors), _head(self._waiting[0])], ONE)
        self._waiting.append(tensors)
        self._bytes += sum(t.nbytes for t in tensors.values())
        if self._bytes >= _PART_BYTES or time.monotonic() - self._since >= _PART_SECONDS:
            self.flush()
        return samples

    def flush(self) -> None:
        """Writes what was added as a part."""
        if not self._waiting:
            return
        alike = len({tuple(_head(tensors).items()) for tensors in self._waiting}) == 1
        groups = [self._waiting] if alike else [[tensors] for tensors in self._waiting]
        self._waiting, self._bytes = [], 0
        for group in groups:
            with _disk(self._path, self.done):
                self._write({name: torch.cat([tensors[name] for tensors in group]) for name in group[0]})
        self._since = time.monotonic()

    def finish(self) -> int:
        """Puts the parts together into the file, and removes them. Returns the number of samples.

        Raises:
            FileError: a part is damaged, or the disk is full; the parts stay.
        """
        self.flush()
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        parts = [Part(line.start, line.stop, line.heads, self._reader(line)) for line in self._lines]
        try:
            with _disk(self._path, self.done):
                with beside.open("wb") as file:
                    self._format.write(file, parts)
                    file.flush()
                    os.fsync(file.fileno())
                beside.replace(self._path)
                _sync(self._path.parent)
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        return self.done

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None and not isinstance(error, FileError):
                with contextlib.suppress(FileError):  # the first error is the one to tell
                    self.flush()
        finally:
            self._log.close()
            if not self._lines and self._folder.exists():
                shutil.rmtree(self._folder, ignore_errors=True)

    # --- parts

    def _resume(self) -> None:
        """Reads which parts there are, and drops what was not written to its end."""
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FileError(f"another run is writing {self._path}; give another path, or wait for it") from error
        self._log.seek(0)
        found = _whole_lines(self._log.read())
        if not found:
            self._log.truncate(0)
            self._log_line(_as_line({"run": self._run}))
        elif found[0][0].get("run") != self._run:
            was = found[0][0].get("run")
            other = [k for k in self._run if not isinstance(was, dict) or was.get(k) != self._run[k]]
            raise FileError(
                f"{self._folder} has the outputs of another run, which differs in {' and '.join(other) or 'settings'}; "
                "remove it, or write to another file"
            )
        else:
            self._end = found[0][1]
        for entry, end in found[1:]:
            line = _Line(**{**entry, "heads": {k: (d, tuple(s)) for k, (d, s) in entry["heads"].items()}})
            if line.start != self.done or not (self._folder / line.file).is_file():
                break
            self._lines.append(line)
            self._end = end
        self._log.truncate(self._end)
        known = {line.file for line in self._lines}
        for stray in self._folder.glob("*.safetensors*"):
            if stray.name not in known:
                stray.unlink()

    def _write(self, tensors: dict[str, Tensor]) -> None:
        """A part, whole or not at all: it counts once its line is on the disk."""
        start, stop = self.done, self.done + _samples(tensors)
        data = save({name: t.contiguous() for name, t in tensors.items()})
        file = self._folder / f"{start}-{stop}.safetensors"
        beside = file.with_name(f"{file.name}.tmp")
        line = _Line(file.name, start, stop, hashlib.sha256(data).hexdigest(), _head(tensors))
        try:
            with beside.open("wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            beside.replace(file)
            _sync(self._folder)
            self._log_line(_as_line(asdict(line)))
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
                os.ftruncate(self._log.fileno(), self._end)
            raise
        self._lines.append(line)

    def _log_line(self, text: bytes) -> None:
        if self._log.write(text) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._log.fileno())
        self._end += len(text)

    def _reader(self, line: _Line) -> Any:
        def read() -> dict[str, Tensor]:
            file = self._folder / line.file
            data = file.read_bytes()
            try:
                if hashlib.sha256(data).hexdigest() == line.sha256:
                    found: dict[str, Tensor] = load(data)
                    return found
            except SafetensorError:
                pass
            raise FileError(
                f"{file} is not as it was written (its SHA-256 differs); remove it and run again, "
                f"which computes the samples from {line.start} on again"
            )

        return read


def _as_line(entry: dict[str, Any]) -> bytes:
    return (json.dumps(entry) + "\n").encode()


def _whole_lines(log: bytes) -> list[tuple[dict[str, Any], int]]:
    """The lines of a log up to the first that is not whole, and where each ends."""
    found: list[tuple[dict[str, Any], int]] = []
    end = 0
    for line in log.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(entry, dict):
            break
        end += len(line)
        found.append((entry, end))
    return found


def _sync(folder: Path) -> None:
    """Makes the names in a folder last, as fsync makes what is in a file last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _disk(path: Path, done: int | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = f"the outputs of {done:,} samples are kept, and the same command goes on from there" if done else ""
        raise FileError(
            f"{path} cannot be written: {os.strerror(error.errno or 0)}; make room or give another path"
            + (f"; {kept}" if kept else "")
        ) from error


# --- what a model gives -----------------------------------------------------------------------------------------------


def named(output: Any) -> dict[str, Tensor]:
    """The tensors of an output by name: keys, positions, and dots between them; numbers and texts are left out."""
    found: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            found[name or ONE] = value.detach()
            return
        if isinstance(value, Mapping):
            parts = [(str(key), part) for key, part in value.items()]
        elif isinstance(value, (tuple, list)):
            parts = [(str(i), part) for i, part in enumerate(value)]
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        else:
            parts = []
        for key, part in parts:
            walk(part, f"{name}.{key}" if name else key)

    walk(output, "")
    return found


def _samples(tensors: Mapping[str, Tensor]) -> int:
    sizes = {t.shape[0] for t in tensors.values() if t.ndim}
    if len(sizes) != 1 or not all(t.ndim for t in tensors.values()):
        told = ", ".join(f"{name!r} {tuple(t.shape)}" for name, t in tensors.items()) or "no tensor"
        raise FileError(
            f"every output must have the samples as its first dim, but the model gives {told}; "
            "let it return what belongs to samples alone"
        )
    return sizes.pop()


def _head(tensors: Mapping[str, Tensor]) -> Head:
    return {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape[1:])) for name, t in tensors.items()}
