"""Files of inputs fit the job or say why not."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch

import shardwise as sw
from shardwise.errors import FileError
from shardwise.files.inputs import READERS, open_inputs
from shardwise.files.outputs import Outputs
from tests.files import DICT, ONE, PAIR, WITHOUT_PYARROW, job, write


@pytest.mark.parametrize("suffix", READERS)
def test_a_file_becomes_samples_of_the_jobs_kind(suffix: str, tmp_path: Path) -> None:
    x, shift = np.random.default_rng(0).random((7, 3)), np.arange(7)
    arrays = {"x": x} if suffix == ".npy" else {"x": x, "shift": shift}
    samples = open_inputs(write(tmp_path / f"a{suffix}", arrays), job(PAIR if suffix == ".npy" else DICT))
    assert len(samples) == 7  # type: ignore[arg-type]
    for i in (6, 0, 3, 4):
        sample = samples[i]
        got = sample[0] if suffix == ".npy" else sample["x"]
        assert got.dtype == torch.float32
        assert torch.equal(got, torch.as_tensor(x[i], dtype=torch.float32))
        if suffix != ".npy":
            assert set(sample) == {"x", "shift"}
            assert sample["shift"].dtype == torch.float32 and sample["shift"] == float(i)


@pytest.mark.parametrize("suffix", WITHOUT_PYARROW)
def test_samples_travel_to_a_rank_as_a_path(suffix: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((5000, 3))
    samples = open_inputs(write(tmp_path / f"a{suffix}", {"x": x}), job(ONE))
    sent = cloudpickle.dumps(samples)
    assert len(sent) < 5000
    assert torch.equal(cloudpickle.loads(sent)[4321], samples[4321])


def test_a_tensor_alone_may_have_any_name(tmp_path: Path) -> None:
    samples = open_inputs(write(tmp_path / "a.npz", {"anything": np.ones((2, 3))}), job(ONE))
    assert torch.equal(samples[1], torch.ones(3))


def test_an_array_without_a_name_is_the_one_that_is_needed(tmp_path: Path) -> None:
    found = open_inputs(write(tmp_path / "a.npy", {"": np.ones((4, 3), np.float32)}), job(DICT))
    assert list(found[0]) == ["x"] and found[0]["x"].tolist() == [1.0, 1.0, 1.0]


def test_arrays_in_a_row_are_a_tuple(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.ones((2, 3)), np.array([4, 5]))
    first, second = open_inputs(tmp_path / "a.npz", job(PAIR))[1]
    assert torch.equal(first, torch.ones(3)) and second == 5


def test_lines_of_numbers_and_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n[1, 2, 3]\n\n[4, 5.5, 6]")
    samples = open_inputs(tmp_path / "a.jsonl", job(ONE))
    assert [samples[i].tolist() for i in range(2)] == [[1, 2, 3], [4, 5.5, 6]]


def test_other_byte_order_and_float64_are_kept_exactly(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((4, 3))
    np.save(tmp_path / "a.npy", x.astype(">f8"))
    samples = open_inputs(tmp_path / "a.npy", job(torch.zeros(3, dtype=torch.float64)))
    assert np.array_equal(samples[2].numpy(), x[2])


def test_a_job_that_collates_may_have_ragged_lists_and_texts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": [1, 2], "text": "ab"}\n{"x": [1, 2, 3], "text": "c"}\n')
    collating = job({"x": torch.zeros(9), "text": "abc"}, collate=lambda rows: rows)
    samples = open_inputs(tmp_path / "a.jsonl", collating)
    assert [len(samples[i]["x"]) for i in range(2)] == [2, 3]
    assert samples[1]["text"] == "c"


def test_an_array_larger_than_what_is_read_is_not_loaded(tmp_path: Path) -> None:
    np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float32, (200_000_000, 3))  # 2.4 GB, of holes
    samples = open_inputs(tmp_path / "a.npy", job(ONE))
    assert samples[199_999_999].tolist() == [0, 0, 0]
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert resident < 2_000_000_000


BAD = [
    ("a.txt", b"", ONE, r"unknown type '.txt'; give a file of .npy, .npz, .safetensors, .jsonl, .parquet"),
    ("none.npy", None, ONE, "cannot be read: No such file or directory"),
    ("a.npy", b"nonsense", ONE, "is not a whole .npy file"),
    ("a.npz", b"nonsense", ONE, "is not a whole .npz file"),
    ("a.safetensors", b"nonsense" * 4, ONE, "is not a whole .safetensors file"),
    ("a.jsonl", b"[1, 2, 3]\n[1, 2", ONE, "line 2 is not JSON"),
    ("a.jsonl", b"[1, 2, 3]\n[1, 2]", ONE, r"field 'input' has the shape \(2,\), but the job's own samples have "
     r"\(3,\); give samples of that shape, or a job whose collate pads them"),
    ("a.jsonl", b"[1, 2, 3]\n[1, [2], 3]", ONE, "line 2: field 'input' has lists of unlike lengths; pad them"),
    ("a.jsonl", b'["a", "b", "c"]', ONE, "has texts; numbers are needed, or a job whose collate"),
    ("a.jsonl", b"[1, 2, null]", ONE, "has values that are not numbers"),
    ("a.jsonl", b'{"x": 1, "z": 2}', ONE, r"has the fields 'x', 'z', but a sample of the job is one tensor"),
    ("a.jsonl", b'{"x": [1, 2, 3]}\n{"z": 1}', DICT, "line 2 lacks 'x', which the first sample has"),
    ("a.npy", np.zeros((4, 2)), ONE, r"field 'input' has the shape \(2,\), but the job's own samples have \(3,\)"),
    ("a.npy", np.zeros((4, 3, 1)), ONE, r"has the shape \(3, 1\), but the job's own samples have \(3,\); .*shape$"),
    ("a.npy", np.array(3.0), ONE, "the samples as the first dim of every field, .* but has 'input' "),
    ("a.npy", np.array(["a"]), ONE, "holds <U1; numbers are needed"),
    ("a.npy", np.zeros((4, 3)), torch.zeros(3, dtype=torch.int64), "holds torch.float64, but .* hold torch.int64"),
    ("a.npz", {"x": np.zeros((4, 3)), "shift": np.zeros(5)}, DICT, r"as many in each, but has 'x' \(4, 3\), 'sh"),
    ("a.npz", {"shift": np.zeros(4)}, DICT, "lacks 'x', .* it has 'shift'; the job's samples have 'x', 'shift'"),
    ("a.npz", {"x": np.zeros((4, 3)), "shfit": np.zeros(4)}, DICT, "lacks 'shift', .* it has 'x', 'shfit'"),
    ("a.npz", {}, DICT, "has no arrays"),
]  # fmt: skip


def read_all(path: Path, job: sw.Job) -> None:
    samples = open_inputs(path, job)
    for i in range(len(samples)):  # type: ignore[arg-type]
        samples[i]


@pytest.mark.parametrize(("file", "content", "sample", "message"), BAD)
def test_bad_inputs_are_one_message(file: str, content: Any, sample: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / file
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    with pytest.raises(FileError, match=message) as caught:
        read_all(path, job(sample))
    assert str(path) in str(caught.value)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(FileError, match="needs pyarrow; install it: pip install pyarrow"):
        open_inputs(tmp_path / "a.parquet", job(ONE))
    with pytest.raises(FileError, match="needs pyarrow"):
        Outputs(tmp_path / "b.parquet", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
