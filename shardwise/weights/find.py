"""Find: which files hold the weights that a path names, and what an index may point at."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwise.errors import WeightsError

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_LARGEST_INDEX = 100 << 20  # bytes; safetensors' own limit for a header
_SHOWN = 8


def find_files(path: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The files of a path, and, for a folder with an index, the file of each name.

    Raises:
        WeightsError: there is none, several and no index, or an index that names something else than files beside it.
    """
    if path.suffix in _PICKLES:
        raise WeightsError(
            f"{path} is not read, for a {path.suffix} file is a pickle, and whoever wrote one can run code where it is "
            "read; write the weights as safetensors (safetensors.torch.save_file) where you trust it"
        )
    if path.is_dir():
        return _in_folder(path)
    if path.name.endswith(INDEX):
        return _indexed(path)
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise WeightsError(f"{path} {what}; weights are a {SUFFIX} file, or a folder of such files with their index")
    return [path], None


def _in_folder(folder: Path) -> tuple[list[Path], dict[str, Path] | None]:
    index = folder / f"model{INDEX}"
    indices = [index] if index.is_file() else sorted(folder.glob(f"*{INDEX}"))
    if len(indices) == 1:
        return _indexed(indices[0])
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        raise WeightsError(f"{folder} has no {SUFFIX} file; weights are one such file, or several with their index")
    if len(files) > 1 or indices:
        names = ", ".join(file.name for file in (indices or files)[:_SHOWN])
        told = "and no index" if not indices else "to choose from"
        raise WeightsError(
            f"{folder} has {len(indices or files)} {'indices' if indices else 'files of weights'} {told} ({names}); "
            f"name one of them, or add the index model{INDEX}"
        )
    _check_place(files[0], folder)
    return files, None


def _indexed(index: Path) -> tuple[list[Path], dict[str, Path]]:
    folder = index.parent
    try:
        if index.stat().st_size > _LARGEST_INDEX:
            raise WeightsError(f"{index} has {index.stat().st_size:,} bytes, more than an index can have")
        read: Any = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{index} cannot be read: {error.strerror}; give another path") from error
    except ValueError as error:
        raise WeightsError(f"{index} is not JSON: {error}; get the file again") from error
    named = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(named, Mapping) or not named or not all(isinstance(v, str) for v in named.values()):
        raise WeightsError(f"{index} has no weight_map of names to files; get the file again")
    for file in dict.fromkeys(named.values()):
        if file in ("", ".", "..") or Path(file).name != file or not file.endswith(SUFFIX):
            raise WeightsError(f"{index} names {file!r}, but may only name {SUFFIX} files beside it")
        if not (folder / file).exists():
            raise WeightsError(f"{index} names {file}, which is not in {folder}; get the missing file")
        _check_place(folder / file, folder)
    return [folder / file for file in dict.fromkeys(named.values())], {n: folder / f for n, f in named.items()}


def _check_place(file: Path, folder: Path) -> None:
    """Check that a file in a folder is one, and no link to somewhere else.

    In a cache of the Hugging Face hub the files of `MODEL/snapshots/VERSION` are links into `MODEL/blobs`.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    real = Path(os.path.realpath(file))
    if not real.is_relative_to(root):
        raise WeightsError(f"{file} is a link to {real}, out of {root}; copy the file there, or give its own path")
    if not real.is_file():
        raise WeightsError(f"{file} is no file")
