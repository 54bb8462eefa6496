"""The command `predict`: from a file to a file, and on from where a killed run was."""

from __future__ import annotations

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

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

import shardwise as sw
from shardwise.cli import main
from shardwise.errors import FileError, RunError
from shardwise.files.outputs import Outputs
from shardwise.inference.predict_files import predict_file
from tests.pool import Pool
from tests.test_generate_command import typed

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
    assert "the outputs of another run, which differs in input" in other.stderr

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


@pytest.mark.slow
def test_a_run_with_other_weights_is_not_gone_on_with(tmp_path: Path) -> None:
    job = sw.Job(model=lambda: nn.Linear(3, 2), data=TensorDataset(torch.ones(8, 3)), global_batch=2)
    weights = tmp_path / "w.safetensors"
    save_file(dict(job.build().state_dict()), weights)
    job = job.with_(weights=weights)

    class Full(Exception):
        pass

    def some() -> Iterator[torch.Tensor]:
        yield from torch.ones(5, 3)
        raise Full

    class Ending(IterableDataset[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            return some()

    with pytest.raises(RunError, match="Full"):
        predict_file(job, Ending(), tmp_path / "out.npy", run={}, ranks=1, progress=False)
    save_file({name: tensor + 1 for name, tensor in job.build().state_dict().items()}, weights)
    with pytest.raises(FileError, match="the outputs of another run, which differs in weights"):
        predict_file(job, job.data, tmp_path / "out.npy", run={}, ranks=1, progress=False)


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


@pytest.mark.parametrize("command", ["predict", "train"])
def test_a_launch_has_the_ranks_that_it_has(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    output = ["--output", "out.npz"] if command == "predict" else []
    assert main([command, "spec.py:job", *output, "--ranks", "3"]) == 2
    assert "--ranks 3 is asked for, but this is one of 2 ranks that torchrun started" in capsys.readouterr().err


def stopped(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """The command on a rank of a launch, whose process is stopped when three chunks are on the disk."""
    add = Outputs.add

    def three(self: Outputs, output: Any) -> int:
        if self.done == 12:
            raise KeyboardInterrupt
        found = add(self, output)
        self.flush()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outputs, "add", three)
        return typed(folder, *arguments)


@pytest.mark.slow
def test_the_ranks_of_a_launch_write_one_file_and_go_on_with_it(pool: Pool, folder: Path) -> None:
    command = ["predict", "spec.py:job", "--data", "spec.py:data", "--batch", "4", "--output", "out.npz"]
    (status, _, err), other = pool(2).run(stopped, folder, *command, timeout=100)
    assert status == 130 and "interrupted" in err and other[0] == 0
    assert not (folder / "out.npz").exists()
    (status, out, err), other = pool(2).run(typed, folder, *command, "--ranks", "2", "--precision", "bf16", timeout=100)
    assert status == 2 and "the outputs of another run, which differs in held" in err
    assert other[0] == 2 and "rank 0 does not write out.npz; its own message says why" in other[2]
    (status, out, err), other = pool(2).run(typed, folder, *command, timeout=100)
    assert status == 0 and "50 samples (12 of them by an earlier run) in" in out, err
    assert other == (0, "", "")
    assert np.load(folder / "out.npz")["sum"].tolist() == [3.0 * i for i in range(50)]
    assert not list(folder.glob("*.parts"))
