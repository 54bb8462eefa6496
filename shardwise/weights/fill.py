"""Fill: the values of a module's parameters and buffers from files, checked to be those of this module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from shardwise.errors import WeightsError
from shardwise.weights.bare import kept_buffers
from shardwise.weights.files import Ranges, WeightFiles, count

Rename = Callable[[str], str]
_SHOWN = 3


class Weights:
    """Files that have the values of a module's parameters and saved buffers.

    Args:
        module: its names, shapes and dtypes are kept, as they are now.
        files: those of the weights.
        rename: the name in the files of a name of the module's. Where it is given, the files may have other tensors.
        model: what messages call the module.

    Raises:
        WeightsError: a name is missing or too many, or a shape or kind of number is another; all in one message.
    """

    def __init__(self, module: nn.Module, files: WeightFiles, rename: Rename | None = None, *, model: str) -> None:
        self.files = files
        tensors = _tensors(module)
        self._dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._sources: dict[str, list[str]] = {}
        """For each name of the module's those in the files of the same tensor: several where it is tied."""
        tied: dict[int, list[str]] = {}
        for name, tensor in tensors.items():
            tied.setdefault(id(tensor), []).append(name)
        look = rename or (lambda name: name)
        for names in tied.values():
            found = [source for source in dict.fromkeys(map(look, names)) if source in files.entries]
            self._sources |= dict.fromkeys(names, found)
        # What the module has and no longer saves, such as positions, files of earlier versions still have.
        known = None if rename else {*tensors, *(name for name, _ in module.named_buffers(remove_duplicate=False))}
        self._check([names[0] for names in tied.values()], known, model)

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, name: str, ranges: Sequence[Ranges] | None = None) -> Tensor:
        """A part of a parameter or buffer, in the dtype that the module had it in, on the CPU.

        Raises:
            WeightsError: it is tied, and the files have several values of it that differ.
        """
        shape = self._shapes[name] if ranges is None else [count(dim) for dim in ranges]
        out = torch.empty(shape, dtype=self._dtypes[name], device="cpu")
        self._read(name, out, ranges)
        return out

    def fill(self, module: nn.Module, names: Collection[str] | None = None, device: torch.device | str = "cpu") -> None:
        """Give a module the values of these of its parameters and saved buffers; None means all.

        Those on `meta` get memory on `device`; the others keep theirs.
        """
        chosen = {id(t): (n, t) for n, t in _tensors(module).items() if names is None or n in names}
        for name, tensor in chosen.values():
            if not tensor.is_meta:
                self._read(name, tensor.data, None)
            elif tensor.dtype != self._dtypes[name]:
                _put(module, tensor, self.read(name).to(device, tensor.dtype))
            else:
                value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                self._read(name, value, None)
                _put(module, tensor, value)

    def _read(self, name: str, out: Tensor, ranges: Sequence[Ranges] | None) -> None:
        first, *others = self._sources[name]
        self.files.read(first, out, ranges)
        for other in others:
            if not torch.equal(self.files.read(other, torch.empty_like(out), ranges), out):
                raise WeightsError(
                    f"{first} and {other} are one parameter of the model, but {self.files.path} has two different "
                    "values of them; untie them in the model, or keep one in the file"
                )

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check(self, names: Sequence[str], known: Collection[str] | None, model: str) -> None:
        """Check that the files have every name, as the module has it, and none but `known`, where that is given."""
        entries = self.files.entries
        missing = [n for n in names if not self._sources[n]]
        unlike = [told for n in names if (told := self._unlike(n))]
        unexpected = [] if known is None else [n for n in entries if n not in known]
        parts = ((missing, "missing"), (unexpected, "unexpected"), (unlike, "of another shape or kind"))
        facts = [f"{len(found)} {what} ({_few(found)})" for found, what in parts if found]
        if facts:
            raise WeightsError(
                f"{self.files.path} does not fit {model}: of {len(names)} tensors in the model and {len(entries)} in "
                f"the file, {', '.join(facts)}; {_remedy(missing, unexpected)}"
            )

    def _unlike(self, name: str) -> str:
        """How the files' tensor differs from the module's in shape or kind of number; empty where it does not."""
        for source in self._sources[name]:
            entry = self.files.entries[source]
            if entry.shape != self._shapes[name]:
                return f"{source} is {list(entry.shape)} for {list(self._shapes[name])}"
            if _kind(entry.dtype) != _kind(self._dtypes[name]):
                return f"{source} is {entry.dtype} for {self._dtypes[name]}"
        return ""


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and saved buffers of a module, tied ones under each of their names."""
    return dict(module.named_parameters(remove_duplicate=False)) | kept_buffers(module)


def _put(module: nn.Module, tensor: Tensor, value: Tensor) -> None:
    """Make a module's tensor on `meta` this value, wherever it is referred to."""
    new = nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    new.__dict__.update(tensor.__dict__)
    try:
        torch.utils.swap_tensors(tensor, new)
    except RuntimeError:  # it has weak references, as recurrent layers hold; they follow what is set
        for part in module.modules():
            for name in [n for n, t in (*part._parameters.items(), *part._buffers.items()) if t is tensor]:
                setattr(part, name, new)


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "real" if dtype.is_floating_point else "bool" if dtype == torch.bool else "whole"


def _few(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _remedy(missing: Sequence[str], unexpected: Collection[str]) -> str:
    """What would help: a prefix that one side's names have and the other's lack, or other files."""
    for name in missing[:1]:
        longer = next((u for u in unexpected if u.endswith(f".{name}")), "")
        shorter = next((u for u in unexpected if name.endswith(f".{u}")), "")
        prefix = longer.removesuffix(name) or name.removesuffix(shorter)
        if longer and all(prefix + n in unexpected for n in missing):
            return f"its names begin with {prefix!r}: give Job(weights_names=lambda name: {prefix!r} + name)"
        if shorter and all(n.removeprefix(prefix) in unexpected for n in missing):
            return f"its names lack {prefix!r}: give Job(weights_names=lambda name: name.removeprefix({prefix!r}))"
    return "give this model's files, or weights_names, a function from the model's names to the file's"
