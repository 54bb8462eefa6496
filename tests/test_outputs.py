"""Files of outputs are whole or not there, and a run that was ended goes on behind its last part."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shardwise.errors import FileError
from shardwise.files import outputs as outputs_module
from shardwise.files.formats import FORMATS
from shardwise.files.outputs import Outputs
from tests.files import ARRAYS, WITHOUT_PYARROW, read


def chunks(samples: int = 11, size: int = 4, first: int = 0) -> Iterator[dict[str, Any]]:
    """Outputs of a model, a chunk after another."""
    for start in range(first, samples, size):
        rows = torch.arange(start, min(start + size, samples))
        yield {"logits": rows[:, None, None] * torch.ones(2, 3) / 7, "more": (rows, rows > 5)}


def flat(output: dict[str, Any]) -> dict[str, Any]:
    return {"logits": output["logits"], "more.0": output["more"][0], "more.1": output["more"][1]}


WHOLE = {name: torch.cat([flat(chunk)[name] for chunk in chunks()]).numpy() for name in flat(next(chunks()))}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("parts", [1, 3])
def test_outputs_read_back(suffix: str, parts: int, tmp_path: Path) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path = tmp_path / "new" / f"a{suffix}"
    one = suffix == ".npy"
    with Outputs(path, {}) as outputs:
        for chunk in chunks():
            outputs.add(chunk["logits"] if one else chunk)
            if parts > 1:
                outputs.flush()
        assert not path.exists()
        assert outputs.finish() == 11
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    found = read(path)
    want = {"output": WHOLE["logits"]} if one else WHOLE
    # This format has tensors of large items first.
    assert (sorted(found) == sorted(want)) if suffix == ".safetensors" else (list(found) == list(want))
    for name, array in want.items():
        assert np.array_equal(found[name].astype(array.dtype), array), name
        assert found[name].dtype == array.dtype or suffix in (".jsonl", ".parquet")


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".jsonl"])
def test_one_tensor_of_bfloat16(suffix: str, tmp_path: Path) -> None:
    tensor = torch.linspace(0, 1, 6).bfloat16().view(3, 2)
    with Outputs(tmp_path / f"a{suffix}", {}) as outputs:
        outputs.add(tensor)
        outputs.finish()
    if suffix == ".safetensors":
        assert torch.equal(load_file(tmp_path / "a.safetensors")["output"], tensor)
    else:
        assert np.array_equal(read(tmp_path / f"a{suffix}")["output"], tensor.float().numpy())


def test_of_no_samples_there_is_an_empty_file(tmp_path: Path) -> None:
    for suffix in WITHOUT_PYARROW:
        with Outputs(tmp_path / f"a{suffix}", {}) as outputs:
            assert outputs.finish() == 0
    assert len(np.load(tmp_path / "a.npy")) == 0
    assert dict(np.load(tmp_path / "a.npz")) == {} == load_file(tmp_path / "a.safetensors")
    assert (tmp_path / "a.jsonl").read_text() == ""


def test_shapes_that_differ_are_for_lines(tmp_path: Path) -> None:
    ragged = [torch.ones(2, 3), torch.ones(2, 4)]
    with Outputs(tmp_path / "a.jsonl", {}) as outputs:
        for tensor in ragged:
            outputs.add(tensor)
        outputs.finish()
    assert [len(json.loads(line)) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [3, 3, 4, 4]
    for suffix in ARRAYS:
        with Outputs(tmp_path / f"a{suffix}", {}) as outputs:
            outputs.add(ragged[0])
            with pytest.raises(FileError, match=r"'output' float32 \(4,\) for some .*; name a .jsonl file"):
                outputs.add(ragged[1])


@pytest.mark.parametrize(
    ("suffix", "output", "message"),
    [
        (".txt", None, "unknown type '.txt'; name a file of .npy"),
        (".npy", {"a": torch.ones(2), "b": torch.ones(2)}, r"gives 2 tensors \('a', 'b'\), but .npy holds one; name"),
        (".npz", {"a": torch.ones(2), "loss": torch.tensor(1.0)}, r"the samples as its first dim.*'loss' \(\)"),
        (".npz", {"a": torch.ones(2), "b": torch.ones(3)}, r"'a' \(2,\), 'b' \(3,\)"),
        (".npz", {"a": "text"}, "gives no tensor"),
        (".jsonl", torch.ones(2, dtype=torch.complex64), "complex64, which .jsonl has not"),
        (".npz", torch.ones(2, dtype=torch.complex128), "'output' holds complex128, which no part can hold"),
    ],
)
def test_outputs_that_do_not_fit_are_one_message(suffix: str, output: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=message), Outputs(tmp_path / f"a{suffix}", {}) as outputs:
        outputs.add(output)
    assert not list(tmp_path.iterdir()), "nothing is left where nothing was written"


def interrupted(path: Path, stop: int, run: dict[str, Any] | None = None) -> None:
    """A run that ends without a word after some chunks; what was flushed is written."""
    outputs = Outputs(path, run or {"job": "a"})
    for chunk in list(chunks())[:stop]:
        outputs.add(chunk)
        outputs.flush()
    outputs._log.close()


def finished(path: Path) -> int:
    """Goes on with a run to its end; where it began."""
    with Outputs(path, {"job": "a"}) as outputs:
        done = outputs.done
        for chunk in chunks(first=done):
            outputs.add(chunk)
        assert outputs.finish() == 11
    found = read(path)
    assert all(np.array_equal(found[name], array) for name, array in WHOLE.items())
    return done


def test_a_run_goes_on_behind_its_last_part(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    interrupted(path, 2)
    assert not path.exists()
    assert finished(path) == 8


@pytest.mark.parametrize("damage", ["torn line", "torn part", "no line", "a part is gone", "nothing whole"])
def test_what_was_not_written_to_its_end_is_done_again(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    interrupted(path, 2)
    log = tmp_path / "a.npz.parts" / "run.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    if damage == "torn line":
        log.write_bytes(b"".join(lines[:2]) + lines[2][:20])
    elif damage == "torn part":
        (log.parent / "8-11.safetensors.tmp").write_bytes(b"half")
    elif damage == "no line":
        log.write_bytes(b"".join(lines[:2]))
    elif damage == "a part is gone":
        (log.parent / "4-8.safetensors").unlink()
    else:
        log.write_bytes(lines[0][:5])
    assert finished(path) == {"torn part": 8, "nothing whole": 0}.get(damage, 4)


def test_a_damaged_part_is_named_and_can_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    interrupted(path, 3)
    part = tmp_path / "a.npz.parts" / "4-8.safetensors"
    data = bytearray(part.read_bytes())
    data[-3] ^= 1
    part.write_bytes(data)
    with pytest.raises(FileError, match=r"4-8.safetensors is not as it was written .* samples from 4 on"):
        finished(path)
    assert not path.exists()
    part.unlink()
    assert finished(path) == 4


def test_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    interrupted(path, 2, {"job": "a", "input": [3, "x"]})
    before = sorted((tmp_path / "a.npz.parts").iterdir())
    with pytest.raises(FileError, match=r"the outputs of another run, which differs in input; remove it, or write to"):
        Outputs(path, {"job": "a", "input": [4, "x"]})
    assert sorted((tmp_path / "a.npz.parts").iterdir()) == before


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    with Outputs(tmp_path / "a.npz", {}) as first:
        with pytest.raises(FileError, match="another run is writing"):
            Outputs(tmp_path / "a.npz", {})
        first.add(torch.ones(2))
        assert first.finish() == 2


def test_an_interrupted_run_keeps_what_it_had(tmp_path: Path) -> None:
    def run() -> None:
        with Outputs(tmp_path / "a.npz", {"job": "a"}) as outputs:
            outputs.add(next(chunks()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert finished(tmp_path / "a.npz") == 4


def test_an_earlier_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"old")
    interrupted(path, 2)
    assert path.read_bytes() == b"old"
    finished(path)


def test_memory_does_not_grow_with_the_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(outputs_module, "_PART_BYTES", 1 << 20)
    chunk = torch.zeros(1 << 15)[:, None]  # 128 KiB
    with Outputs(tmp_path / "a.npy", {}) as outputs:
        tracemalloc.start()
        for _ in range(400):
            outputs.add(chunk)
        outputs.finish()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert np.load(tmp_path / "a.npy", mmap_mode="r").shape == (400 << 15, 1)
    assert peak < 10 << 20


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small disk needs root: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_loses_nothing_that_was_written(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    rows = torch.arange(100_000, dtype=torch.float64)[:, None] * torch.ones(2)  # 1.6 MB

    def add_all(outputs: Outputs) -> None:
        for start in range(0, 100_000, 10_000):
            outputs.add(rows[start : start + 10_000])
            outputs.flush()

    with small_disk(disk, "4m"):
        path = disk / "a.npy"
        ballast = disk / "ballast"
        ballast.write_bytes(b"0" * 2_800_000)
        with Outputs(path, {}) as outputs:  # there is room for some parts
            with pytest.raises(
                FileError, match="No space left on device; make room or give another path; the outputs of"
            ):
                add_all(outputs)
            done = outputs.done
        assert 10_000 <= done <= 90_000
        assert not path.exists()
        ballast.write_bytes(b"0" * 1_200_000)
        with Outputs(path, {}) as outputs:  # for all parts, but not for the file
            assert outputs.done == done
            outputs.add(rows[done:])
            with pytest.raises(FileError, match=r"No space left on device.* the outputs of 100,000 samples are kept"):
                outputs.finish()
        assert sorted(p.name for p in disk.iterdir()) == ["a.npy.parts", "ballast"]
        ballast.unlink()
        with Outputs(path, {}) as outputs:
            assert outputs.done == 100_000
            assert outputs.finish() == 100_000
        assert np.array_equal(np.load(path), rows.numpy())
