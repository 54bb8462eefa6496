"""Files of inputs fit the job or say why not; files of outputs are whole or not there, and a killed run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import shardwise as sw
from shardwise.cli import main
from shardwise.engine import outputs as outputs_module
from shardwise.engine.formats import FORMATS
from shardwise.engine.inputs import READERS, open_inputs
from shardwise.engine.outputs import Outputs
from shardwise.errors import FileError

ARRAYS = [".npy", ".npz", ".safetensors"]
WITHOUT_PYARROW = [*ARRAYS, ".jsonl"]


class Named(nn.Module):
    """Takes two tensors by name, one of them optional."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        found: Tensor = self.layer(x)
        return found if shift is None else found + shift[:, None]


def job(sample: Any, **settings: Any) -> sw.Job:
    return sw.Job(model=Named, data=[sample] * 4, loss=lambda output, batch: output.sum(), **settings)  # type: ignore[arg-type]


ONE = torch.zeros(3)
PAIR = (torch.zeros(3), torch.tensor(1))
DICT = {"x": torch.zeros(3), "shift": torch.tensor(0.0), "label": torch.tensor(2)}


def write(path: Path, arrays: dict[str, Any]) -> Path:
    """A file of these arrays."""
    first = next(iter(arrays.values()), None)
    if path.suffix == ".npy":
        np.save(path, np.asarray(first))
    elif path.suffix == ".npz":
        np.savez(path, **{name: np.asarray(array) for name, array in arrays.items()})
    elif path.suffix == ".safetensors":
        save_file({name: torch.as_tensor(array) for name, array in arrays.items()}, path)
    elif path.suffix == ".jsonl":
        lists = {name: np.asarray(array).tolist() for name, array in arrays.items()}
        rows = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
        table = sys.modules["pyarrow"].table({name: np.asarray(array).tolist() for name, array in arrays.items()})
        parquet.write_table(table, path, row_group_size=3)
    return path


def read(path: Path) -> dict[str, Any]:
    """What a file of outputs has, as NumPy arrays."""
    if path.suffix == ".npy":
        return {"output": np.load(path)}
    if path.suffix == ".npz":
        return dict(np.load(path))
    if path.suffix == ".safetensors":
        return {name: tensor.numpy() for name, tensor in load_file(path).items()}
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row if isinstance(row, dict) else {"output": row} for row in rows]
        return {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    return {name: np.asarray(column) for name, column in parquet.read_table(path).to_pydict().items()}


# --- inputs -----------------------------------------------------------------------------------------------------------


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


# --- outputs ----------------------------------------------------------------------------------------------------------


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
    assert list(found) == list(want)
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
    with pytest.raises(FileError, match=r"the outputs of another run, whose input differs; remove it, or write to"):
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


# --- the command ------------------------------------------------------------------------------------------------------

SPEC = """
    import os, time, torch
    import shardwise as sw

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, x):
            time.sleep(float(os.environ.get("SLOW", "0")))
            return {"scores": self.layer(x), "sum": x.sum(1)}

    def job():
        data = [{"x": torch.zeros(3), "label": torch.tensor(0)}] * 8
        return sw.Job(model=Model, data=data, loss=lambda output, batch: output["sum"].sum(), global_batch=8)

    def data():
        return [{"x": torch.full((3,), float(i))} for i in range(50)]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "spec.py").write_text(textwrap.dedent(SPEC))
    np.savez(tmp_path / "in.npz", x=np.random.default_rng(0).random((300, 3), np.float32))
    np.savez(tmp_path / "other.npz", x=np.ones((10, 3), np.float32))
    np.savez(tmp_path / "wrong.npz", x=np.ones((10, 4), np.float32))
    return tmp_path


def predicted(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardwise.cli", "predict", "spec.py:job", *arguments]
    root = str(Path(sw.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": root, **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_predict_writes_what_the_model_gives(folder: Path) -> None:
    done = predicted(folder, "--input", "in.npz", "--output", "out.npz", "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert "300/300 samples" in done.stdout
    assert "300 samples in" in done.stdout and "out.npz" in done.stdout
    found, x = dict(np.load(folder / "out.npz")), np.load(folder / "in.npz")["x"]
    model = sw.load_spec(f"{folder}/spec.py:job").build().eval()
    want = model(torch.from_numpy(x))
    for name in ("scores", "sum"):
        assert np.allclose(found[name], want[name].detach().numpy(), rtol=1e-5, atol=1e-6)
    assert not list(folder.glob("*.parts"))

    done = predicted(
        folder, "--data", "spec.py:data", "--output", "data.jsonl", "--batch", "7", "--ranks", "1", "--json"
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["samples"] == 50 and told["before"] == 0 and told["bytes"] > 0
    assert [json.loads(line)["sum"] for line in (folder / "data.jsonl").read_text().splitlines()] == [
        3.0 * i for i in range(50)
    ]


@pytest.mark.slow
def test_a_killed_command_goes_on(folder: Path) -> None:
    assert predicted(folder, "--input", "in.npz", "--output", "whole.npz", "--ranks", "1").returncode == 0
    command = [sys.executable, "-m", "shardwise.cli", "predict", "spec.py:job", "--ranks", "2", "--input", "in.npz",
               "--output", "out.npz"]  # fmt: skip
    root = str(Path(sw.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": root, "SLOW": "0.6"}
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = folder / "out.npz.parts" / "run.jsonl"
    limit = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") > 1):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "out.npz").exists()
    kept = json.loads(log.read_text().splitlines()[-1])["stop"]
    assert 0 < kept < 300

    other = predicted(folder, "--input", "other.npz", "--output", "out.npz")
    assert other.returncode == 2
    assert "the outputs of another run, whose input differs" in other.stderr

    done = predicted(folder, "--input", "in.npz", "--output", "out.npz", "--ranks", "2", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["before"] >= kept and told["samples"] == 300
    whole, found = dict(np.load(folder / "whole.npz")), dict(np.load(folder / "out.npz"))
    assert list(found) == list(whole)
    for name, array in whole.items():
        assert found[name].shape == array.shape
        assert np.allclose(found[name], array, rtol=1e-5, atol=1e-6)
    assert not list(folder.glob("*.parts"))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--input", "wrong.npz"], r"field 'x' has the shape (4,), but the job's own samples have (3,)"),
        (["--input", "none.npz"], "cannot be read: No such file"),
        (["--input", "in.csv"], "unknown type '.csv'"),
        (["--input", "in.npz", "--output", "out.csv"], "unknown type '.csv'"),
        (["--input", "in.npz", "--data", "spec.py:data"], "not allowed with argument --input"),
        (["--data", "spec.py:job"], "must return a Dataset, but returned Job"),
        (["--data", "spec.py:nothing"], "has no function 'nothing'"),
    ],
)
def test_bad_commands(
    arguments: list[str], wanted: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    output = [] if "--output" in arguments else ["--output", "out.npz"]
    assert main(["predict", "spec.py:job", *arguments, *output]) == 2
    told = capsys.readouterr()
    assert wanted in told.err and told.err.count("\n") == 1
    assert not list(folder.glob("out*"))


def test_predict_is_not_for_torchrun(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    assert main(["predict", "spec.py:job", "--input", "in.npz", "--output", "out.npz"]) == 2
    assert "run it without torchrun" in capsys.readouterr().err
