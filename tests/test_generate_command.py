"""The command `generate`: from prompts in a file to their tokens, on local ranks and on a launch's."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardwise.cli import main
from shardwise.engine.launch import joined
from shardwise.files.outputs import Outputs
from shardwise.inference.generate import generate
from shardwise.inference.prompts import read_prompts
from shardwise.machine.backend import Backend
from shardwise.plan.plan import Plan
from tests.conftest import pipeline, tensor
from tests.pool import Pool
from tests.test_generate import PROMPTS, cut
from tests.test_launch import clean_environment
from tests.zoo import generating

slow = pytest.mark.slow

SPEC = """
import torch
import shardwise as sw
from tests.zoo import generating

def job():
    return generating.buffered()

def bare():
    return sw.Job(model=lambda: torch.nn.Linear(3, 2), data=[])
"""
NEW = 6
DRAWN = ["--temperature", "1.5", "--top-k", "40", "--top-p", "0.95", "--seed", "7"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "spec.py").write_text(SPEC)
    lines = [json.dumps(prompt if i % 2 else {"ids": prompt}) for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def one_rank(**settings: Any) -> list[list[int]]:
    """What `sw.generate` gives in this process alone."""
    with warnings.catch_warnings(), joined(backend=Backend.cpu(), threads=1):
        warnings.simplefilter("ignore")
        found = generate(generating.buffered(), PROMPTS, Plan(), tokens=NEW, **settings)
        return [row.tolist() for row in found]


def rows(text: str) -> list[list[int]]:
    return [json.loads(line) for line in text.splitlines()]


def typed(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """A command on a rank of a launch: its exit status, and what it wrote to stdout and stderr."""
    warnings.simplefilter("ignore")
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("MASTER_ADDR", "127.0.0.1")  # as torchrun does; the process group is there already
        patch.chdir(folder)
        return main(list(arguments)), out.getvalue(), err.getvalue()


def generated(folder: Path, *arguments: str) -> tuple[int, str, str]:
    return typed(folder, "generate", "spec.py:job", "--input", "in.jsonl", "--tokens", str(NEW), *arguments)


@slow
def test_a_command_as_it_is_typed(folder: Path) -> None:
    options = ["--input", "in.jsonl", "--tokens", str(NEW), "--ranks", "2", "--output", "out.jsonl"]
    command = [sys.executable, "-m", "shardwise", "generate", "spec.py:job", *options]
    done = subprocess.run(command, cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert rows((folder / "out.jsonl").read_text()) == one_rank()
    first, *_, progress, last = done.stdout.splitlines()
    assert first == (
        "buffered generates on 2 ranks (data 2): 6 prompts of 1 to 11 tokens, up to 6 new tokens behind each, "
        "the likeliest"
    )
    assert progress.startswith("6/6 prompts")
    assert last.startswith("6 prompts, 36 new tokens in ") and last.endswith(": out.jsonl") and " tokens/s " in last
    assert not done.stderr and not list(folder.glob("*.parts"))


@slow
def test_the_ranks_of_a_launch_write_what_one_rank_writes(pool: Pool, folder: Path) -> None:
    """Rank 0 alone says something."""
    drawn = one_rank(temperature=1.5, top_k=40, top_p=0.95, seed=7)
    assert drawn != one_rank()
    (status, out, err), other = pool(2).run(generated, folder, *DRAWN, "--ranks", "2", "--json", timeout=200)
    assert status == 0 and json.loads(out)["rows"] == drawn and json.loads(out)["ranks"] == 2
    assert "drawn with temperature 1.5, top-k 40, top-p 0.95, seed 7" in err and "36 new tokens in" in err
    assert other == (0, "", "")


@pytest.mark.prove
@pytest.mark.parametrize("way", ["tensor", "pipeline"])
def test_every_plan_writes_what_one_rank_writes(way: str, pool: Pool, folder: Path) -> None:
    plans = {"tensor": Plan((tensor(),)), "pipeline": Plan((pipeline(),), cut(generating.buffered(), 2))}
    (folder / "plan.txt").write_text(plans[way].text())
    (status, out, err), _ = pool(2).run(generated, folder, "--plan", "plan.txt", timeout=200)
    assert (status, rows(out)) == (0, one_rank()), err


@pytest.mark.prove
@pytest.mark.parametrize("command", ["generate", "predict"])
def test_under_torchrun(command: str, folder: Path) -> None:
    """As it is typed; the rows are on stdout alone."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    typed = {
        "generate": ["generate", "spec.py:job", "--input", "in.jsonl", "--tokens", str(NEW)],
        "predict": ["predict", "tests.zoo.plain:qkv_attention", "--output", "out.npy"],
    }[command]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "shardwise", *typed],
        cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if command == "generate":
        assert rows(done.stdout) == one_rank()
    else:
        assert done.stdout.count("samples in") == 1 and len(np.load(folder / "out.npy")) > 8


def interrupted(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """The command, whose process is stopped when two rows are on the disk."""
    add = Outputs.add

    def two(self: Outputs, output: Any) -> int:
        if self.done == 2:
            raise KeyboardInterrupt
        found = add(self, output)
        self.flush()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outputs, "add", two)
        return generated(folder, *arguments)


@slow
def test_a_run_that_was_stopped_goes_on_with_the_same_draws(pool: Pool, folder: Path) -> None:
    to = [*DRAWN, "--output", "out.jsonl"]
    (status, _, err), _ = pool(2).run(interrupted, folder, *to, timeout=100)
    assert status == 130 and "interrupted" in err
    assert not (folder / "out.jsonl").exists() and (folder / "out.jsonl.parts").exists()
    (status, _, err), _ = pool(2).run(generated, folder, *to[:-3], "8", *to[-2:], timeout=100)
    assert status == 2 and "the outputs of another run, which differs in seed" in err

    (status, out, err), _ = pool(2).run(generated, folder, *to, timeout=100)
    assert status == 0 and "6 prompts (2 of them by an earlier run), 24 new tokens" in out, err
    assert rows((folder / "out.jsonl").read_text()) == one_rank(temperature=1.5, top_k=40, top_p=0.95, seed=7)
    assert not (folder / "out.jsonl.parts").exists()


@slow
def test_rows_end_where_they_are_told(pool: Pool, folder: Path) -> None:
    everything = one_rank()
    end = everything[0][2]
    (status, _, err), _ = pool(2).run(generated, folder, "--end", f"{end},127", "--output", "out.jsonl", timeout=100)
    assert status == 0, err
    found = rows((folder / "out.jsonl").read_text())
    assert len(found[0]) <= 3 and found[0][-1] == end
    for row, whole in zip(found, everything, strict=True):
        assert row == whole[: len(row)] and (len(row) == NEW or row[-1] in (end, 127))


@slow
@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (
            ["--input", "big.jsonl"],
            "token 128 is in a prompt, but Buffered has a vocabulary of 128; give tokens from 0 to",
        ),
        (["--tokens", "60"], "are 70 positions, but Buffered has 64; give shorter prompts or fewer tokens"),
        (["--ranks", "3"], "--ranks 3 is asked for, but this is one of 2 ranks that torchrun started; leave --ranks"),
    ],
)
def test_what_does_not_fit_the_model_or_the_launch(pool: Pool, folder: Path, given: list[str], wanted: str) -> None:
    (folder / "big.jsonl").write_text("[1, 128]\n")
    for status, out, err in pool(2).run(generated, folder, *given, "--output", "out.jsonl", timeout=100):
        assert status == 2 and wanted in err and err.count("error") == 1
        assert out.count("\n") <= 1
    assert not list(folder.glob("out*"))


# -- without any rank --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[1]\n\n[]\n", "prompt 1 (in.jsonl, line 3) is empty; give tokens in one dim, at least one"),
        ('[1, "a"]\n', "prompt 0 (in.jsonl, line 1) has 'a'; tokens are whole numbers"),
        ("[[1], [2, 3]]\n", "prompt 0 (in.jsonl, line 1) has [1]; tokens are whole numbers"),
        (f"[3, {1 << 70}]\n", f"has {1 << 70}; tokens are whole numbers below 2**63"),
        ("null\n", "prompt 0 (in.jsonl, line 1) has None; tokens are whole numbers"),
        ("[0.5]\n", "is of torch.float32; tokens are whole numbers"),
        ("[3, -1]\n", "prompt 0 (in.jsonl, line 1) has token -1; tokens are 0 or more"),
        ("[3, 1\n", "in.jsonl, line 1 is not JSON"),
        ('{"a": [1], "b": [2]}\n', "line 1 has 2 fields ('a', 'b'); say with --field which one has the tokens"),
        ('{"a": [1]}\n{"b": [2]}\n', "line 2 has no field 'a'; it has 'b'"),
    ],
)
def test_bad_prompts(
    text: str, wanted: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "in.jsonl").write_text(text)
    monkeypatch.chdir(folder)
    assert main(["generate", "spec.py:job", "--input", "in.jsonl", "--output", "out.jsonl"]) == 2
    told = capsys.readouterr()
    assert wanted in told.err and told.err.count("\n") == 1 and not told.out
    assert not list(folder.glob("out*"))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--input", "none.jsonl"], "none.jsonl cannot be read: No such file"),
        (["--input", "in.csv"], "unknown type '.csv'"),
        (["--field", "words"], "line 1 has no field 'words'; it has 'ids'"),
        (["--field", "ids"], "line 2 has no fields, so that 'ids' is not one of them; leave --field out"),
        (["--output", "out.npy"], "out.npy has the type '.npy', but rows may be of unlike lengths; name a .jsonl"),
        (["--top-k", "3"], "nothing is drawn without a temperature; give one"),
        (["--temperature", "0"], "must be a number above 0, but is '0'"),
        (["--top-p", "1.5"], "must be above 0 and at most 1, but is '1.5'"),
        (["--end", "3,x"], "must be a whole number of at least 0, but is 'x'"),
        (["--tokens", "0"], "at least 1, but is '0'"),
        (["--precision", "bf16"], "unrecognized arguments: --precision"),
        (
            ["--objective", "memory"],
            "the job's own samples, of which there are 0; give the job some as data, or give a",
        ),
    ],
)
def test_bad_commands(
    given: list[str], wanted: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert main(["generate", "spec.py:job", "--input", "in.jsonl", *given]) == 2
    told = capsys.readouterr()
    assert wanted in told.err and told.err.count("\n") == 1 and not told.out


def test_no_prompts_are_no_rows(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "in.jsonl").write_text("")
    monkeypatch.chdir(folder)
    assert main(["generate", "spec.py:job", "--input", "in.jsonl", "--output", "out.jsonl"]) == 0
    assert (folder / "out.jsonl").read_text() == "" and "0 prompts, 0 new tokens" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint64])
def test_prompts_of_an_array(dtype: type, tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", np.array([[1, 2, 65535], [3, 4, 5]], dtype=dtype))
    assert [prompt.tolist() for prompt in read_prompts(tmp_path / "in.npy")] == [[1, 2, 65535], [3, 4, 5]]


def test_a_field_of_several(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a b", "ids": [1, 2]}\n{"ids": [3], "text": "c"}\n')
    assert [prompt.tolist() for prompt in read_prompts(tmp_path / "in.jsonl", "ids")] == [[1, 2], [3]]
