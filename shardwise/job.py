"""Job: what to train or to infer, and SPEC, the way the command line names one."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, default_collate

from shardwise.errors import JobError, SpecError
from shardwise.seeding import seeded
from shardwise.weights.bare import build_bare, drawing, kept_buffers
from shardwise.weights.files import WeightFiles
from shardwise.weights.fill import Weights

Batch = Any
"""A dict, tuple, list or tensor of tensors, batch dimension first."""

Loss = Callable[[Any, Batch], Any]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Any]
Precision = Literal["fp32", "bf16"]
PRECISIONS = ("fp32", "bf16")
L = TypeVar("L")
_LOG = logging.getLogger(__name__)


def adamw(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The default optimizer: AdamW with a learning rate of 3e-4."""
    return torch.optim.AdamW(params, lr=3e-4)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train: a model, its data and how one update is made.

    Args:
        model: takes nothing and builds the module under any device context, `meta` included.
        data: a map-style or iterable Dataset of samples.
        loss: `loss(output, batch)` returns a mean, or `(sum, count)`; None means `output.loss`.
        optimizer: `optimizer(params)` returns an Optimizer, or `(Optimizer, LRScheduler)`.
        global_batch: samples per update, over all ranks and micro-batches. The plan never changes it.
        precision: "fp32", or "bf16" (autocast, with fp32 master weights).
        clip_norm: largest 2-norm of the whole gradient, or None.
        seed: of the initial weights, the order of the data and dropout.
        collate: turns a list of samples into a batch; None means torch's `default_collate`.
        name: what reports call it; None means the model's class.
        weights: a safetensors file, or a folder of them with their index, that has the model's parameters and saved
            buffers; None means that `model` and `seed` make them.
        weights_names: the name in `weights` of a name of the model's, where it is another. Tensors that it does not
            name are then not read; without it there must be none.

    Raises:
        JobError: a field is out of range.
    """

    model: Callable[[], nn.Module]
    data: Dataset[Any]
    loss: Loss | None = None
    optimizer: OptimizerFactory = adamw
    global_batch: int = 32
    precision: Precision = "fp32"
    clip_norm: float | None = None
    seed: int = 0
    collate: Callable[[list[Any]], Batch] | None = None
    name: str | None = None
    weights: Path | str | None = None
    weights_names: Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        if not callable(self.model) or isinstance(self.model, nn.Module):
            raise JobError(
                f"model must be a function that builds the module, but is {type(self.model).__name__}; "
                "write model=lambda: MyModel(...)"
            )
        if not isinstance(self.global_batch, int) or self.global_batch < 1:
            raise JobError(f"global_batch must be a whole number of at least 1, but is {self.global_batch!r}")
        if self.precision not in PRECISIONS:
            hint = "; to predict with weights in int8, give it to predict" if f"{self.precision}" == "int8" else ""
            raise JobError(f"precision must be one of {', '.join(PRECISIONS)}, but is {self.precision!r}{hint}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise JobError(f"clip_norm must be positive or None, but is {self.clip_norm!r}")
        if self.weights is not None and not isinstance(self.weights, (str, Path)):
            raise JobError(f"weights must be the path of a file or folder, but is {type(self.weights).__name__}")

    def with_(self, **changes: Any) -> Job:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def build(self, device: torch.device | str = "cpu") -> nn.Module:
        """The module on `device`, its initial weights drawn from `seed`, or read from `weights`; on `meta` without any.

        Raises:
            JobError: the function does not return a module, or the module has no parameters.
            WeightsError: the weights cannot be read, or are not those of this module.
        """
        if torch.device(device).type == "meta":
            return self._without_weights()
        module, weights = self.bare(device)
        if weights is not None:
            weights.fill(module, dict(module.named_parameters()), device)
        return module

    def bare(self, device: torch.device | str = "cpu") -> tuple[nn.Module, Weights | None]:
        """The module with its parameters on `meta`, and what reads them; its other tensors have their values.

        Without `weights` the module is whole, and there is nothing to read. So too where it cannot be built without its
        parameters, which a warning in the log says.

        Raises:
            JobError, WeightsError: as `build`.
        """
        if self.weights is None:
            return self._built(device), None
        files = WeightFiles(self.weights)
        module, why = build_bare(self.model, self.seed, device)
        if module is None:
            _LOG.warning("%s is built whole before its weights are read, because %s", self.title(), why)
            whole = self._built(device)
            self._weights(whole, files).fill(whole)
            return whole, None
        weights = self._weights(module, files)
        weights.fill(module, kept_buffers(module), device)
        return module, weights

    def _weights(self, module: nn.Module, files: WeightFiles) -> Weights:
        return Weights(module, files, self.weights_names, model=type(module).__name__)

    def _without_weights(self) -> nn.Module:
        """The module on `meta`, by way of its weights where it looks at them while it is built."""
        try:
            return self._built("meta")
        except (RuntimeError, NotImplementedError) as error:
            why = str(error).partition("\n")[0]
        module = self._built("cpu").to("meta")
        _LOG.warning("%s is built with its weights even where only its shapes are asked for: %s", self.title(), why)
        return module

    def _built(self, device: torch.device | str) -> nn.Module:
        """The module as the function makes it."""
        with drawing(self.seed, device):
            module = self.model()
        if not isinstance(module, nn.Module):
            raise JobError(f"model() must return an nn.Module, but returned {type(module).__name__}")
        if next(module.parameters(), None) is None:
            raise JobError(f"{type(module).__name__} has no parameters, so there is nothing to train or to split")
        return module

    def samples(self) -> int | None:
        """Number of samples, or None for an iterable dataset without a length."""
        try:
            return len(self.data)  # type: ignore[arg-type]
        except TypeError:
            return None

    def batch(self, indices: Iterable[int], *, epoch: int = 0) -> Batch:
        """The batch of these samples; an iterable dataset is read from its start, as many as asked.

        What is drawn from the generators of torch, NumPy or `random` meanwhile depends on the job's seed, the epoch and
        the first sample alone, so that each rank reads the same batch.
        """
        wanted = list(indices)
        with seeded(self.seed, epoch, wanted[0] if wanted else 0):
            return self._batch(wanted)

    def _batch(self, wanted: list[int]) -> Batch:
        if isinstance(self.data, IterableDataset):
            stream = iter(self.data)
            rows = [row for row, _ in zip(stream, wanted, strict=False)]
        else:
            count = self.samples()
            if count is not None and wanted and max(wanted) >= count:
                raise JobError(
                    f"the dataset has {count} samples, but sample {max(wanted)} is needed "
                    f"(global_batch is {self.global_batch}); give more data or a smaller global_batch"
                )
            rows = [self.data[i] for i in wanted]
        if len(rows) < len(wanted) or not rows:
            raise JobError(
                f"the dataset gave {len(rows)} samples, but {len(wanted)} are needed "
                f"(global_batch is {self.global_batch}); give more data or a smaller global_batch"
            )
        return (self.collate or default_collate)(rows)

    def title(self) -> str:
        """What reports call this job."""
        return self.name or getattr(self.model, "__name__", "model").replace("<lambda>", "model")


def batch_tensors(batch: Batch) -> list[Tensor]:
    """The tensors of a batch in a fixed order (keys of a dict in their own order)."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, dict):
        return [t for value in batch.values() for t in batch_tensors(value)]
    if isinstance(batch, (tuple, list)):
        return [t for value in batch for t in batch_tensors(value)]
    if hasattr(batch, "items"):
        return [t for _, value in batch.items() for t in batch_tensors(value)]
    return []


def lifts(dtype: torch.dtype) -> dict[torch.dtype, torch.dtype]:
    """For each other floating-point dtype this one in its place, and for each complex one its complex counterpart."""
    real = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    pairs = torch.complex128 if dtype == torch.float64 else torch.complex64
    found = {**dict.fromkeys(real, dtype), **dict.fromkeys((torch.complex64, torch.complex128), pairs)}
    return {old: new for old, new in found.items() if old != new}


def lift(what: L, dtype: torch.dtype) -> L:
    """A tensor, a batch, or a module in place, with what is floating-point in `dtype`."""
    new = lifts(dtype)
    found: L
    if isinstance(what, nn.Module):
        # What `to` does, which would make complex parameters real.
        found = what._apply(lambda t: t.to(new.get(t.dtype, t.dtype)))  # type: ignore[no-untyped-call]
    else:
        found = map_batch(what, lambda t: t.to(new.get(t.dtype, t.dtype)))
    return found


def digest(batch: Batch) -> int:
    """A number for the contents of a batch: equal for equal ones, and hardly ever for others."""
    found = 0
    for tensor in batch_tensors(batch):
        found = zlib.crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def map_batch(batch: Batch, fn: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with `fn` applied to every tensor, its structure kept."""
    if isinstance(batch, Tensor):
        return fn(batch)
    if isinstance(batch, dict) or hasattr(batch, "items"):
        return {key: map_batch(value, fn) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_batch(value, fn) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_batch(value, fn) for value in batch)
    return batch


def batch_size(batch: Batch) -> int:
    """Number of samples in a batch.

    Raises:
        JobError: there is no tensor, or the tensors disagree on their first dim.
    """
    sizes = {int(t.shape[0]) for t in batch_tensors(batch) if t.ndim}
    if len(sizes) != 1:
        raise JobError(
            f"every tensor of a batch must have the samples as its first dim, but the first dims are {sorted(sizes)}"
        )
    return sizes.pop()


def slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Samples `start` to `stop` of a batch; tensors without dims are kept."""
    return map_batch(batch, lambda t: t[start:stop] if t.ndim else t)


def load_spec(spec: str) -> Job:
    """The Job that a SPEC names: `path/to/file.py:function` or `package.module:function`.

    Every rank reads it for itself, so random numbers are seeded meanwhile: what is drawn is the same on all of them.

    Raises:
        SpecError: the spec is malformed, does not import, or its function does not return a Job.
    """
    job, name = _returned(spec)
    if not isinstance(job, Job):
        raise SpecError(f"{spec} must return a shardwise.Job, but returned {type(job).__name__}")
    return job if job.name else job.with_(name=name)


def load_data(spec: str) -> Dataset[Any]:
    """The dataset that a SPEC names, which is written as a job's; what has samples to index or to iterate will do.

    Raises:
        SpecError: as `load_spec`, or its function does not return a dataset.
    """
    data, _ = _returned(spec)
    if isinstance(data, (Job, str, bytes)) or not (hasattr(data, "__getitem__") or hasattr(data, "__iter__")):
        raise SpecError(f"{spec} must return a Dataset, but returned {type(data).__name__}")
    found: Dataset[Any] = data
    return found


def _returned(spec: str) -> tuple[Any, str]:
    """What the function of a SPEC returns, and its name."""
    target, colon, name = spec.rpartition(":")
    if not colon or not target or not name:
        raise SpecError(f"SPEC must be file.py:function or package.module:function, but is {spec!r}")
    with seeded(0):
        module = _import_file(Path(target)) if target.endswith(".py") else _import_module(target)
        function = getattr(module, name, None)
        if not callable(function):
            raise SpecError(f"{target} has no function {name!r}; it has: {', '.join(_functions(module)) or 'none'}")
        try:
            return function(), name
        except Exception as error:
            raise SpecError(f"{spec} failed: {type(error).__name__}: {error}") from error


def _functions(module: Any) -> list[str]:
    """Names of the functions and classes that a module defines itself and does not hide."""
    own = {key: value for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    return [key for key, value in own.items() if callable(value) and not key.startswith("_")]


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise SpecError(f"there is no file {path}; SPEC is file.py:function")
    name = f"shardwise_spec_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SpecError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SpecError(f"{path} does not import: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def _import_module(name: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise SpecError(f"module {name!r} does not import: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
