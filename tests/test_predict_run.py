"""Runs of `sw.predict`: who takes what, what is kept, how a run ends, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import shardwise as sw
from shardwise.errors import JobError, PlanError, RunError
from shardwise.job import Job
from shardwise.plan.plan import Plan
from shardwise.search.strategies import strategies
from tests.conftest import data, pipeline, tensor
from tests.test_launch import assert_gone
from tests.zoo import hf, plain

pytestmark = [pytest.mark.timeout(200), pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
slow = pytest.mark.slow


class Numbered(Dataset[Any]):
    """Sample i is the number i."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index)])


class Stream(IterableDataset[Any]):
    """The numbers from 0 on."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor([float(i)]) for i in range(self.count))


class Who(nn.Module):
    """Gives each sample back, with the process that had it. Rank 1 takes its time; rank 0 may begin after it."""

    def __init__(self, seconds: float = 0.0, fails_at: float = -1.0, log: str = "", begun: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seconds, self.fails_at, self.log, self.begun = seconds, fails_at, log, begun

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if os.environ["RANK"] == "1":
            if self.begun:
                Path(self.begun).touch()
            time.sleep(self.seconds)
        while self.begun and not Path(self.begun).exists():
            time.sleep(0.001)
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{int(x[0])}\n")
        if self.fails_at in x.flatten().tolist():
            raise ValueError(f"sample {self.fails_at:g} cannot be")
        return {"sample": x * self.weight, "pid": torch.full((len(x),), os.getpid()), "text": "same"}  # type: ignore[dict-item]


def numbers(count: int = 45, **changes: Any) -> Job:
    return Job(model=lambda: Who(**changes), data=Numbered(count), global_batch=2)


def samples(outputs: list[Any]) -> list[float]:
    return [x for output in outputs for x in output["sample"].flatten().tolist()]


# --- sharing ----------------------------------------------------------------------------------------------------------


@slow
def test_a_slow_rank_takes_less_and_the_order_holds(tmp_path: Path) -> None:
    outputs = list(sw.predict(numbers(seconds=0.1, begun=str(tmp_path / "begun")), ranks=2, threads=1))
    assert samples(outputs) == [float(i) for i in range(45)]
    assert [len(output["sample"]) for output in outputs] == [2] * 22 + [1]
    assert all(type(output) is dict and output["text"] == "same" for output in outputs)
    taken = sorted(
        sum(int(output["pid"][0]) == pid for output in outputs) for pid in {int(o["pid"][0]) for o in outputs}
    )
    assert len(taken) == 2 and 0 < taken[0] < taken[1] - 4


@slow
@pytest.mark.parametrize("count", [0, 5])
def test_a_stream_is_read_to_its_end(count: int) -> None:
    job = Job(model=Who, data=Stream(3), global_batch=2)
    assert samples(list(sw.predict(job, Stream(count), ranks=2, threads=1))) == [float(i) for i in range(count)]


def test_no_sample_is_no_output() -> None:
    assert list(sw.predict(numbers(0), ranks=2)) == []


@slow
def test_chunks_are_computed_no_further_ahead_than_the_window(tmp_path: Path) -> None:
    log = tmp_path / "log"
    outputs = sw.predict(numbers(200, log=str(log)), ranks=2, threads=1)
    next(outputs)
    time.sleep(1.0)
    done = len(log.read_text().splitlines())
    assert 2 <= done <= 5, "one was taken, and two for each rank may wait"
    assert len(samples(list(outputs))) == 198


# --- ends -------------------------------------------------------------------------------------------------------------


def own_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@slow
def test_an_early_stop_leaves_nothing_behind() -> None:
    list(sw.predict(numbers(4), ranks=2, threads=1))
    before = own_descriptors()
    outputs = sw.predict(numbers(400, seconds=0.02), ranks=2, threads=1)
    pids = {int(next(outputs)["pid"][0]) for _ in range(8)}
    assert len(pids) == 2
    outputs.close()
    assert_gone(sorted(pids))
    assert own_descriptors() <= before


@slow
def test_an_error_of_the_caller_ends_the_ranks() -> None:
    pids = set()

    def consume() -> None:
        for i, output in enumerate(sw.predict(numbers(400, seconds=0.02), ranks=2, threads=1)):
            pids.add(int(output["pid"][0]))
            if i == 8:
                raise KeyError("of the caller")

    with pytest.raises(KeyError):
        consume()
    assert_gone(sorted(pids))


@slow
def test_outputs_outlive_the_run_and_can_be_written_to() -> None:
    first = next(sw.predict(numbers(9), ranks=1, threads=1))
    sample = first["sample"]
    sample += 1.0
    assert sample.flatten().tolist() == [1.0, 2.0]
    assert not sample.is_inference() and sample.device.type == "cpu"
    sample.requires_grad_().sum().backward()


@slow
def test_a_rank_that_fails_is_one_error_with_its_message(tmp_path: Path) -> None:
    found: list[Any] = []
    with pytest.raises(RunError, match=r"rank [01] of 2 failed in _rank with ValueError: sample 30 cannot be"):
        found.extend(sw.predict(numbers(200, fails_at=30.0), ranks=2, threads=1, log_dir=tmp_path))
    assert samples(found) == [float(i) for i in range(len(found) * 2)], "what came before the error is in order"


class Dies(Numbered):
    """Whoever reads sample 6 is killed."""

    def __getitem__(self, index: int) -> Tensor:
        if index == 6:
            os.kill(os.getpid(), 9)
        return super().__getitem__(index)


@slow
def test_a_rank_that_dies_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="was killed by signal 9"):
        list(sw.predict(numbers(), Dies(40), ranks=2, threads=1, log_dir=tmp_path))


@slow
def test_a_rank_that_died_with_outputs_that_nobody_took_is_one_error(tmp_path: Path) -> None:
    outputs = sw.predict(numbers(), Dies(40), ranks=1, threads=1, log_dir=tmp_path)
    assert samples([next(outputs), next(outputs)]) == [0.0, 1.0, 2.0, 3.0]
    time.sleep(2.0)  # by now it has given the next chunk, and died with that after it
    with pytest.raises(RunError, match="was killed by signal 9"):
        list(outputs)


# --- outputs ----------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two tensors."""

    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Answer:
    """An output of a class of its own."""

    scores: Tensor
    pair: Pair
    note: str = "as it was"
    cache: Any = None


class Cache:
    """Neither tensor nor container."""


class Structured(nn.Module):
    """Returns a little of everything: parameters, inputs, sums over the batch, what no sample has a part in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 6)
        self.register_buffer("table", torch.arange(3))
        self.steps = 3

    def forward(self, x: Tensor) -> Answer:
        hidden = self.first(x).relu()
        out = self.second(hidden)
        rest = [x, self.second.bias, hidden.mean(), self.table, (out > 0), {"turned": out.t(), "more": [hidden]}]
        pair = Pair(hidden, out.sum(0))
        return Answer(out, pair, cache=(Cache(), rest, self.steps))


def structured() -> Job:
    rows = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    return Job(model=Structured, data=TensorDataset(rows), global_batch=4)


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=slow) for way in ("tensor", "pipeline")]
    + [pytest.param(way, marks=pytest.mark.prove) for way in ("data", "micro-batches")],
)
def test_the_models_own_structure_comes_back(way: str) -> None:
    job = structured()
    plans = {
        "data": Plan((data(),)),
        "tensor": Plan((tensor("width*"),)),
        "pipeline": Plan((pipeline(),), ("linear.1",)),
        "micro-batches": Plan((tensor("width*"),), micro_batches=3),
    }
    module = job.build().eval()
    rows = job.data.tensors[0]  # type: ignore[attr-defined]
    outputs = list(sw.predict(job, None, plans[way], threads=1))
    assert len(outputs) == 3
    for i, found in enumerate(outputs):
        with torch.no_grad():
            want = module(rows[4 * i : 4 * i + 4])
        assert type(found) is Answer and type(found.pair) is Pair and found.note == "as it was"
        torch.testing.assert_close((found.scores, *found.pair), (want.scores, *want.pair))
        nothing, rest, steps = found.cache
        assert nothing is None and steps == 3
        torch.testing.assert_close(rest, want.cache[1])


@pytest.mark.prove
def test_an_output_of_transformers_keeps_its_class_and_leaves_its_cache_out() -> None:
    import transformers

    job = hf.llama()

    def cached() -> Any:
        model: Any = hf.llama().model()
        model.config.use_cache = True
        return model

    for plan in (Plan((data(),)), Plan((tensor(),))):
        found = next(sw.predict(job.with_(model=cached), None, plan, threads=1))
        assert isinstance(found, transformers.modeling_outputs.CausalLMOutputWithPast)
        assert found.logits.shape == (8, 16, 128) and found.past_key_values is None


@pytest.mark.prove
def test_hidden_states_of_a_deep_model_are_all_there() -> None:
    """A deep model is captured by a few of its layers, but what it returns of the others is not left out."""
    job = hf.llama()

    def deep() -> Any:
        import transformers

        config = transformers.LlamaConfig(**{**hf.LLAMA, "num_hidden_layers": 12, "output_hidden_states": True})
        return transformers.LlamaForCausalLM(config)

    found = next(sw.predict(job.with_(model=deep), None, Plan((tensor(),)), threads=1))
    with torch.no_grad():
        want = job.with_(model=deep).build().eval()(**job.batch(range(8)))
    assert len(found.hidden_states) == 13
    torch.testing.assert_close(tuple(found.hidden_states), tuple(want.hidden_states))


# --- plans and jobs ---------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Does not capture: what it does depends on the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 10 else x


@slow
def test_a_model_that_does_not_capture_is_split_by_data_alone() -> None:
    job = Job(model=Branches, data=Numbered(7), global_batch=2)
    outputs = list(sw.predict(job, ranks=2, threads=1))
    assert torch.cat(outputs)[:6].flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    with pytest.raises(
        PlanError, match=r"tensor 2 splits the model, but Branches does not capture.*by data alone|alone"
    ):
        list(sw.predict(job, None, Plan((tensor("width*"),)), threads=1))


@slow
def test_mistakes_are_told_before_anything_is_computed() -> None:
    with pytest.raises(PlanError, match="the plan is for 2 ranks"):
        list(sw.predict(numbers(), None, Plan((data(),)), ranks=3))
    with pytest.raises(PlanError, match="fixes its batch at 8 samples, but a batch has 5"):
        list(sw.predict(hf.clip(), torch.utils.data.Subset(hf.clip().data, range(13)), Plan((tensor(),)), threads=1))
    with pytest.raises(PlanError, match="no such operator"):
        list(sw.predict(structured(), None, Plan((pipeline(),), ("linear.7",)), threads=1))

    class NoLength(Dataset[Any]):
        def __getitem__(self, index: int) -> Tensor:
            return torch.ones(1)

    with pytest.raises(JobError, match="has no length"):
        list(sw.predict(numbers(), NoLength(), ranks=1))


class Nothing(nn.Module):
    """Returns no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> str:
        return "nothing"


@slow
def test_an_output_without_a_tensor_is_an_error() -> None:
    job = Job(model=Nothing, data=Numbered(7))
    for plan in (Plan((data(),)), Plan((tensor("width*"),))):
        with pytest.raises(JobError, match="str, has no tensor in it"):
            list(sw.predict(job, None, plan, threads=1))


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("tensor", marks=pytest.mark.prove),
        pytest.param("pipeline", marks=slow),
        pytest.param("sharded", marks=pytest.mark.prove),
    ],
)
def test_plans_for_training_predict_as_well(strategy: str) -> None:
    job = plain.qkv_attention()
    plan = next(c.plan for c in strategies(job, 2) if c.strategy == strategy)
    assert plan is not None
    module = job.build().eval()
    for i, found in enumerate(sw.predict(job, None, plan, threads=1)):
        with torch.no_grad():
            torch.testing.assert_close(found, module(job.batch(range(8 * i, 8 * i + 8))["input_ids"]))
