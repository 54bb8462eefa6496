"""The command line: what people and programs read, and the exit status of every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from html import escape
from pathlib import Path

import pytest

from shardwise.cli import main
from shardwise.plan.plan import Plan

SPECS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from shardwise import Job

def make(model, samples=64, batch=8, loss=lambda out, batch: nn.functional.cross_entropy(out, batch[1])):
    points = torch.randn(samples, 16, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(points, torch.arange(samples) % 4)
    return Job(model=model, data=data, loss=loss, optimizer=lambda p: torch.optim.SGD(p, 0.1), global_batch=batch)

def fine(): return make(lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
def bare(): return make(nn.ReLU)
def hopeless(): return make(lambda: nn.Linear(16, 4), loss=lambda out, batch: out.sum() * float("nan"))
def empty(): return make(lambda: nn.Linear(16, 4), samples=0)
def short(): return make(lambda: nn.Linear(16, 4), samples=4)
def odd(): return make(lambda: nn.Linear(16, 4), batch=7)
def unlike(): return make(lambda: nn.Linear(17, 4))
def unreduced(): return make(lambda: nn.Linear(16, 4), loss=lambda out, batch: out)
def number(): return 5
def broken(): raise ValueError("boom")
def greedy(x): return x
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "specs.py"
    path.write_text(SPECS)
    return path


def plan_file(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "plan.txt"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("missing", "has no function 'missing'; it has: make, fine"),
        ("number", "must return a shardwise.Job, but returned int"),
        ("broken", "failed: ValueError: boom"),
        ("greedy", "missing 1 required positional argument"),
        ("bare", "ReLU has no parameters"),
        ("empty", "the dataset is empty"),
        ("unlike", "does not run on its first 2 samples: RuntimeError: mat1 and mat2"),
        ("unreduced", "loss must be a scalar tensor or (sum, count), but is a tensor of 2 dims"),
    ],
)
def test_bad_specs(name: str, wanted: str, spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{spec}:{name}", "--ranks", "2"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("shardwise: error: ") and told.err.count("\n") == 1
    assert wanted in told.err
    assert told.out == ""


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["plan"], "arguments are required: SPEC"),
        (["plan", "nothing"], "SPEC must be file.py:function"),
        (["plan", "no_such_file.py:job"], "there is no file no_such_file.py"),
        (["plan", "no_such_module:job"], "does not import: ModuleNotFoundError"),
        (["plan", "a.py:b", "--ranks", "0"], "at least 1, but is '0'"),
        (["plan", "a.py:b", "--ranks", "two"], "at least 1, but is 'two'"),
        (["verify", "a.py:b", "--strategies", "data,magic"], "but has magic"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "arguments are required: COMMAND"),
    ],
)
def test_bad_arguments(arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (["hello"], "first line is 'shardwise plan 1', but this one's is 'hello'"),
        (["shardwise plan 1", "axis data four batch"], "line 2"),
        (["shardwise plan 1", "axis data 4 batch"], "the plan is for 4 ranks (data 4), but 2 are asked for"),
    ],
)
def test_bad_plans(
    lines: list[str], wanted: str, spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", f"{spec}:fine", "--plan", plan_file(tmp_path, *lines), "--ranks", "2"]) == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lines", "wanted", "status"),
    [
        ("fine", ["model 000000000000", "axis data 2 batch"], "the plan is for model 000000000000", 2),
        ("fine", ["axis tensor 2 nosuch"], "splits dim 'nosuch', but the model has no such dim; it has: ", 2),
        ("fine", ["axis tensor 3 width"], "3 does not divide 32", 2),
        ("odd", ["axis data 2 batch"], "7 samples does not divide by the 2 ranks", 2),
        ("short", ["axis data 2 batch"], "has 4 samples, but one update takes 8", 2),
        ("hopeless", ["axis data 2 batch"], "the loss became nan at step 1", 1),
    ],
)
def test_plans_that_do_not_fit(
    name: str, lines: list[str], wanted: str, status: int, spec: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = plan_file(tmp_path, "shardwise plan 1", *lines)
    assert main(["train", f"{spec}:{name}", "--plan", plan, "--steps", "2"]) == status
    assert wanted in capfd.readouterr().err


def test_plan_is_written_and_read_back(spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "plan.txt"
    page = tmp_path / "why.html"
    assert main(["plan", f"{spec}:fine", "--ranks", "2", "--out", str(out), "--html", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert Plan.parse(out.read_text()) == Plan.parse(found["text"]) == Plan.parse(json.dumps(found["plan"]))
    told = found["explanation"]
    assert escape(found["text"]) in page.read_text() and page.read_text().count("<figure>") == 2
    assert Plan.parse(told["best"]["plan"]) == Plan.parse(found["text"]) and told["best"]["fits"]
    assert all(other["seconds"] >= told["best"]["seconds"] for other in told["others"])
    assert [known["name"].split(",")[0] for known in told["known"]] == [
        "data parallel", "sharded data parallel (ZeRO-3", "tensor 2"
    ]  # fmt: skip
    assert not list(out.parent.glob(".*")), "nothing is left beside it"


def test_plan_for_machines_that_are_not_here(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{spec}:fine", "--cluster", "2x2xh100-sxm", "--fix", "pipeline=2"]) == 0
    said = capsys.readouterr().out
    assert Plan.parse(said.partition("\n\n")[0]).pipeline == 2
    for part in ("fine on 2x2xh100-sxm (4 devices)", "limited by", "another plan", "data parallel", "twice the memory"):
        assert part in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cluster", "2x8xh100"], "no device is called 'h100'; did you mean h100-sxm?"),
        (["--cluster", "nowhere.toml"], "the machine file nowhere.toml cannot be read"),
        (["--cluster", "2xt4", "--ranks", "2"], "leave out one of them"),
        (["--memory", "-1"], "must be a number of gigabytes above 0, but is '-1'"),
        (["--fix", "tensor"], "must be AXIS=N, such as tensor=1, but is 'tensor'"),
        (["--fix", "rows=2"], "axis 'rows' cannot be fixed at 2; axes are pipeline, data, expert, context, tensor"),
        (["--cluster", "2xt4", "--memory", "1e-6"], "more than the limit of 1.00 kB; "),
        (["--cluster", "3xt4", "--fix", "data=3"], "nothing splits fine on 3xt4 (3 devices) with 8 samples"),
    ],
)
def test_plans_that_cannot_be_made(
    spec: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", f"{spec}:fine", *options]) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and not told.out


def test_plan_that_cannot_be_written(spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["plan", f"{spec}:fine", "--ranks", "2", "--out", str(tmp_path / "file" / "plan.txt")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_asking_for_the_environment_leaves_gloo_usable() -> None:
    code = "from shardwise.cli import main; main(['env']); import torch.distributed as d; d.ProcessGroupGloo.{}"
    code = code.format("create_device(hostname='127.0.0.1')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gloo"] is True and found["cores"] >= 1 and found["torch"]
    assert main(["env"]) == 0
    assert "torch" in capsys.readouterr().out


def test_help_names_every_command() -> None:
    told = subprocess.run([sys.executable, "-m", "shardwise.cli", "--help"], capture_output=True, text=True, timeout=60)
    assert told.returncode == 0
    assert all(name in told.stdout for name in ("demo", "train", "predict", "generate", "plan", "verify", "env"))


@pytest.mark.slow
def test_train_saves_weights_and_prints_json(spec: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    weights = tmp_path / "weights.pt"
    assert main(["train", f"{spec}:fine", "--ranks", "2", "--steps", "4", "--save", str(weights), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert len(found["losses"]) == 4 and found["ranks"] == 2
    state = torch.load(weights, weights_only=True)
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "0.weight": (32, 16), "0.bias": (32,), "2.weight": (4, 32), "2.bias": (4,)
    }  # fmt: skip
