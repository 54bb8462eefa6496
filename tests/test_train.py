"""Training: the order of the data, the progress line, the result, and what stops a run."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from shardwise.engine.progress import Progress, Run, counted
from shardwise.engine.train import Result, batches, permutation, run_steps, train
from shardwise.errors import JobError, PlanError, RunError, WeightsError
from shardwise.graph.capture import LossModule
from shardwise.job import Job, batch_tensors, digest
from shardwise.machine.backend import Backend
from shardwise.plan.plan import Plan, PlanAxis

pytestmark = pytest.mark.timeout(120)
slow = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DATA = Plan(axes=(PlanAxis("data", 2, ("batch",)),))


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Sample i is the point (i, 1) with the target i % 3."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([index / 10, 1.0]), torch.tensor(index % 3)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """The same points as a stream."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        points = Points(self.count)
        return (points[i] for i in range(self.count))


class Noisy(Points):
    """The points, moved at random."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        point, target = super().__getitem__(index)
        return point + torch.rand(()) + random.random() + float(np.random.rand()), target


class Alone(Points):
    """The points, moved by what no other process has."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        point, target = super().__getitem__(index)
        return point + os.getpid(), target


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(output, batch[1])


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def job(count: int = 22, batch: int = 4, **changes: Any) -> Job:
    given: dict[str, Any] = {
        "model": model,
        "data": Points(count),
        "loss": loss,
        "optimizer": sgd,
        "global_batch": batch,
    }
    return Job(**{**given, **changes})


def indices(batch: Any) -> list[int]:
    return [round(float(x) * 10) for x in batch[0][:, 0]]


# --- the order of the data --------------------------------------------------------------------------------------------


def test_an_epoch_has_no_sample_twice_and_drops_what_does_not_fill_a_batch() -> None:
    stream = batches(job(count=22, batch=4))
    first, second = ([indices(next(stream)) for _ in range(5)] for _ in range(2))
    for epoch in (first, second):
        seen = list(itertools.chain(*epoch))
        assert len(set(seen)) == len(seen) == 20
    assert first != second


def test_the_order_depends_on_the_seed_and_the_epoch_alone() -> None:
    one, same = batches(job()), batches(job())
    assert [indices(next(one)) for _ in range(12)] == [indices(next(same)) for _ in range(12)]
    assert indices(next(batches(job(seed=1)))) != indices(next(batches(job())))
    assert permutation(100, 3, 0) != permutation(100, 3, 1)
    assert sorted(permutation(100, -3, 7)) == list(range(100))


def test_a_stream_is_read_in_its_order_and_started_again() -> None:
    stream = batches(job(data=Stream(10), batch=4))
    found = [indices(next(stream)) for _ in range(3)]
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]


def test_what_a_dataset_draws_is_the_same_on_every_rank_and_new_in_every_epoch() -> None:
    numbers = job(data=Noisy(4), batch=4, seed=3)
    before = torch.get_rng_state(), random.getstate()
    first, again = ([digest(batch) for batch in itertools.islice(batches(numbers), 6)] for _ in range(2))
    assert first == again and len(set(first)) == 6
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert next(batches(numbers.with_(seed=4)))[0].sum() != next(batches(numbers))[0].sum()


@slow
def test_ranks_that_read_other_samples_are_stopped() -> None:
    with pytest.raises(JobError, match="rank 1 of 2 read another first batch than rank 0"):
        train(job(data=Alone(22)), DATA, steps=1, progress=False)


@pytest.mark.parametrize("data", [Points(3), Stream(3), Points(0), Stream(0)])
def test_too_little_data_is_said_with_both_numbers(data: Dataset[Any]) -> None:
    short = job(data=data)
    with pytest.raises(JobError, match=rf"has {data.count} samples, but one update takes 4") as error:  # type: ignore[attr-defined]
        next(batches(short))
    assert error.value.exit_status == 2


def test_a_dataset_without_a_length_is_refused() -> None:
    class Endless(Dataset[int]):
        def __getitem__(self, index: int) -> int:
            return index

    with pytest.raises(JobError, match="Endless, has no length; give it __len__"):
        next(batches(job(data=Endless())))


def test_mistakes_are_found_before_ranks_start() -> None:
    with pytest.raises(JobError, match="has 3 samples"):
        train(job(count=3), DATA, steps=1)
    with pytest.raises(JobError, match="steps must be at least 1, but is 0"):
        train(job(), DATA, steps=0)
    with pytest.raises(PlanError, match=r"for 2 ranks \(data 2\), but 4 are asked for; ask for 2, or"):
        train(job(), DATA, steps=1, ranks=4)


# --- steps and progress -----------------------------------------------------------------------------------------------


class FakeEngine:
    """An engine whose losses are known."""

    plan = Plan()

    def __init__(self, losses: list[float]) -> None:
        self.losses = iter(losses)

    def step(self, batch: Any) -> float:
        return next(self.losses)


def run(losses: list[float]) -> Run:
    return run_steps(FakeEngine(losses), batches(job()), len(losses), Backend.cpu())  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_with_the_step_the_last_losses_and_a_remedy(bad: float) -> None:
    with pytest.raises(RunError) as error:
        run([4.0, 3.0, 2.5, 90.25, 1e30, 1e35, bad, 1.0])
    message = str(error.value)
    assert f"the loss became {bad} at step 7 (after 3, 2.5, 90.25, 1e+30, 1e+35)" in message
    assert "smaller learning rate" in message and "clip_norm" in message
    with pytest.raises(RunError, match=r"at step 1 \(at once\)"):
        run([bad])


def test_what_a_step_takes_is_counted() -> None:
    ids = torch.zeros(4, 16, dtype=torch.int64)
    assert counted({"mask": torch.ones(4, 16), "ids": ids}) == ("tokens", 64)
    assert counted((torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))) == ("samples", 4)
    assert run([1.0, 0.5]).per_step == 4


def line(losses: list[float]) -> Run:
    return Run(losses, [0.1] * len(losses), elapsed=0.1 * len(losses), unit="tokens", per_step=2048)


def test_progress_is_one_line_rewritten_on_a_terminal() -> None:
    out = io.StringIO()
    progress = Progress(3, terminal=True, out=out, label="data  ")
    for done in range(1, 4):
        progress(line([2.0] * done), 410_000_000)
        time.sleep(0.11)
    assert out.getvalue().count("\n") == 1 and out.getvalue().endswith("\n")
    assert out.getvalue().count("\r") == 3
    assert "data  step 3/3  loss 2.0000  20,480 tokens/s  memory 0.41 GB" in out.getvalue()


def test_progress_elsewhere_is_a_line_now_and_then() -> None:
    out = io.StringIO()
    progress = Progress(50, terminal=False, out=out)
    for done in range(1, 51):
        progress(line([2.0] * done), 410_000_000)
    first, last = out.getvalue().splitlines()
    assert first.startswith("step  1/50") and last.startswith("step 50/50")
    assert "\r" not in out.getvalue() and "\x1b" not in out.getvalue()


def test_nobody_reading_progress_does_not_stop_a_run() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    Progress(1, terminal=False, out=Closed())(line([1.0]), 0)


# --- on ranks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def logs_of_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failures leave goes where pytest cleans up."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def one_device(whole: Job, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and the weights of a plain loop."""
    module = whole.build()
    optimizer = whole.optimizer(module.parameters())
    losses = []
    for batch in itertools.islice(batches(whole), steps):
        found = LossModule(module, whole, batch)(*batch_tensors(batch))
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        losses.append(float(found.detach()))
    return losses, module.state_dict()


@slow
def test_two_ranks_train_as_one_device_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved, logs = tmp_path / "new" / "weights.pt", tmp_path / "logs"
    result = train(job(), DATA, steps=8, log_dir=logs, save=saved)
    losses, weights = one_device(job(), 8)
    assert result.losses == pytest.approx(losses, rel=1e-5)
    found = torch.load(saved, weights_only=True)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in weights.items()}
    assert all(torch.allclose(found[name], weights[name], atol=1e-6) for name in weights)
    assert os.listdir(saved.parent) == ["weights.pt"]
    assert result.ranks == 2 and len(result.peak_memory) == len(result.memory_before) == 2
    assert all(peak >= before > 0 for peak, before in zip(result.peak_memory, result.memory_before, strict=True))
    assert any(entry.kind == "all_reduce" and entry.axis == "data" for entry in result.traffic)
    assert json.loads(result.to_json())["unit"] == "samples"
    assert sorted(path.name for path in logs.iterdir()) == ["rank0.log", "rank1.log"]
    shown = capfd.readouterr().out
    assert re.search(r"^step 8/8  loss \d\.\d{4}  [\d,.]+ samples/s  memory \d\.\d\d GB$", shown, re.MULTILINE)
    assert "step 8/8" in (logs / "rank0.log").read_text()


@slow
def test_no_plan_splits_the_batch(capfd: pytest.CaptureFixture[str]) -> None:
    result = train(job(), steps=2, ranks=2, progress=False)
    assert result.plan == DATA
    assert capfd.readouterr().out == ""


@slow
def test_weights_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match=r"weights cannot be written to .*file/weights\.pt"):
        train(job(), Plan(), steps=1, save=tmp_path / "file" / "weights.pt", progress=False)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("shardwise-")] == ["file"]


def diverging(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=float("inf"))


@slow
def test_a_diverging_run_ends_with_the_message_alone() -> None:
    with pytest.raises(RunError, match=r"the loss became (nan|inf) at step \d \(after ") as error:
        train(job(optimizer=diverging), DATA, steps=20, progress=False)
    assert error.value.exit_status == 1
    assert "\n" not in str(error.value)


@slow
def test_a_batch_that_the_ranks_cannot_share_names_both_numbers() -> None:
    with pytest.raises(PlanError, match=r"batch of 1 samples does not divide by the 2 ranks .*; take 2 samples"):
        train(job(batch=1), DATA, steps=1, progress=False)


class Deadly(Points):
    """Kills rank 1 at its third batch."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read = getattr(self, "read", 0) + 1
        if self.read > 10 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def children() -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            found.add(int(stat.parent.name))
    return found


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_rank_ends_the_run_within_seconds_and_leaves_no_process() -> None:
    before, began = children(), time.monotonic()
    with pytest.raises(RunError, match=r"rank 1 of 2 .*was killed by signal 9"):
        train(job(data=Deadly(40)), DATA, steps=50, progress=False)
    assert time.monotonic() - began < 40
    assert children() <= before


@slow
def test_torchrun_ranks_are_joined() -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    found = subprocess.run(
        [sys.executable, *launch, "examples/torchrun_loop.py"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    losses = [float(value) for value in re.findall(r"^step \d+: loss ([\d.]+)$", found.stdout, re.MULTILINE)]
    assert len(losses) == 20 and losses[-1] < losses[0]
    assert "trained on 2 ranks" in found.stdout


def test_a_result_is_frozen() -> None:
    assert Result.__dataclass_params__.frozen  # type: ignore[attr-defined]
