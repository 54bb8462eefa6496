"""Jobs and SPECs: what is refused and how it is said, and how batches are taken apart."""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from shardwise.errors import JobError, SpecError, UserError
from shardwise.graph.capture import caller, mean_loss
from shardwise.job import Job, batch_size, batch_tensors, load_spec, map_batch, slice_batch

Pair = namedtuple("Pair", "x y")


class Rows(Dataset[Tensor]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), 1.0])


class Flow(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.tensor([float(n), 1.0]) for n in range(5))


def job(**changes: Any) -> Job:
    return Job(**{"model": lambda: nn.Linear(2, 1), "data": Rows(10), "global_batch": 4, **changes})


# --- fields -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": nn.Linear(2, 1)}, "model must be a function that builds the module, but is Linear; write"),
        ({"global_batch": 0}, "global_batch must be a whole number of at least 1, but is 0"),
        ({"global_batch": 2.0}, "global_batch must be a whole number of at least 1, but is 2.0"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, but is 'fp8'"),
        ({"clip_norm": 0.0}, "clip_norm must be positive or None, but is 0.0"),
        ({"clip_norm": float("nan")}, "clip_norm must be positive or None, but is nan"),
    ],
)
def test_a_field_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=re.escape(message)) as error:
        job(**changes)
    assert error.value.exit_status == 2


def test_a_model_must_be_a_module_with_parameters() -> None:
    with pytest.raises(JobError, match=r"model\(\) must return an nn.Module, but returned int"):
        job(model=lambda: 3).build()
    with pytest.raises(JobError, match="ReLU has no parameters, so there is nothing to train or to split"):
        job(model=nn.ReLU).build()


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    one = job().build().weight
    torch.manual_seed(6)
    before = torch.random.get_rng_state()
    assert torch.equal(job().build().weight, one)
    assert torch.equal(torch.random.get_rng_state(), before), "building leaves the user's generator alone"
    assert not torch.equal(job(seed=1).build().weight, one)


def test_building_on_meta_allocates_nothing() -> None:
    module = job(model=lambda: nn.Linear(1 << 20, 1 << 20)).build("meta")
    assert module.weight.is_meta and module.weight.shape == (1 << 20, 1 << 20)


def test_samples_beyond_the_end_name_the_numbers() -> None:
    with pytest.raises(JobError, match=r"has 10 samples, but sample 11 is needed \(global_batch is 4\); give"):
        job().batch(range(8, 12))
    with pytest.raises(JobError, match="gave 5 samples, but 6 are needed"):
        job(data=Flow()).batch(range(6))
    with pytest.raises(JobError, match="has 0 samples, but sample 3 is needed"):
        job(data=Rows(0)).batch(range(4))
    assert job(data=Flow()).batch(range(2))[:, 0].tolist() == [0.0, 1.0]
    assert job().batch([3, 1])[:, 0].tolist() == [3.0, 1.0]
    assert job().samples() == 10 and job(data=Flow()).samples() is None


def test_a_collate_function_makes_the_batch() -> None:
    assert job(collate=lambda rows: {"x": torch.stack(rows)}).batch(range(3))["x"].shape == (3, 2)


def test_titles() -> None:
    assert (job().title(), job(name="mine").title(), job(model=layer).title()) == ("model", "mine", "layer")


def layer() -> nn.Module:
    return nn.Linear(2, 1)


# --- batches ----------------------------------------------------------------------------------------------------------

X, Y = torch.arange(6.0).view(3, 2), torch.tensor([1, 2, 3])


@pytest.mark.parametrize("batch", [{"x": X, "y": Y}, (X, Y), [X, Y], Pair(X, Y), {"a": (X, {"y": Y})}])
def test_batches_of_every_structure_are_cut_and_kept(batch: Any) -> None:
    assert [t.shape for t in batch_tensors(batch)] == [(3, 2), (3,)]
    assert batch_size(batch) == 3
    part = slice_batch(batch, 1, 3)
    assert type(part) is type(batch)
    assert torch.equal(batch_tensors(part)[1], Y[1:])
    doubled = batch_tensors(map_batch(batch, lambda t: t * 2))
    assert torch.equal(doubled[0], 2 * X) and torch.equal(doubled[1], 2 * Y)


def test_a_batch_needs_one_number_of_samples() -> None:
    with pytest.raises(JobError, match=r"the samples as its first dim, but the first dims are \[2, 3\]"):
        batch_size((X, Y[:2]))
    with pytest.raises(JobError, match=r"the first dims are \[\]"):
        batch_size({"name": "none"})
    assert batch_size((X, torch.tensor(3.0))) == 3
    assert slice_batch((X, torch.tensor(3.0)), 0, 1)[1] == 3.0


# --- calling and losses -----------------------------------------------------------------------------------------------


class Takes(nn.Module):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return x if scale is None else x * scale


class TakesAll(nn.Module):
    def forward(self, **given: Tensor) -> list[str]:
        return sorted(given)


def test_a_dict_goes_in_by_name_less_what_forward_does_not_take() -> None:
    assert torch.equal(caller(Takes())({"x": X, "labels": Y}), X)
    assert torch.equal(caller(Takes())({"x": X, "scale": torch.tensor(2.0)}), 2 * X)
    assert caller(TakesAll())({"x": X, "labels": Y}) == ["labels", "x"]
    assert torch.equal(caller(Takes())((X, Y)), X)
    assert torch.equal(caller(Takes())(X), X)


class Output(dict[str, Tensor]):
    """As transformers' outputs are: a dict whose values are attributes too."""


def loss_of(loss: Any, output: Any) -> Tensor:
    found, _ = mean_loss(loss, output, None)
    return found


def test_a_loss_is_a_mean_or_a_sum_and_a_count() -> None:
    three = torch.tensor(3.0)
    assert loss_of(None, Output(loss=three)) == 3.0
    assert loss_of(None, three) == 3.0
    assert loss_of(lambda output, batch: output[None], three).shape == ()
    assert loss_of(lambda output, batch: (output, torch.tensor(2)), three) == 1.5
    assert loss_of(lambda output, batch: (output, 0), three) == 3.0, "where no item counts the sum is what it is"
    assert mean_loss(lambda output, batch: (output, torch.tensor(2)), three, None)[1] == 2


@pytest.mark.parametrize(
    ("loss", "output", "message"),
    [
        (None, X, "loss is None, but the model's output (Tensor) has no .loss; give Job(loss=...), or"),
        (lambda output, batch: output, X, "loss must be a scalar tensor or (sum, count), but is a tensor of 2"),
        (lambda output, batch: "low", X, "loss must be a scalar tensor or (sum, count), but is str"),
    ],
)
def test_what_is_no_loss_is_refused(loss: Any, output: Any, message: str) -> None:
    with pytest.raises(JobError, match=re.escape(message)):
        mean_loss(loss, output, None)


# --- SPEC -------------------------------------------------------------------------------------------------------------

SOURCE = """
import torch
from neighbour import WIDTH
from shardwise import Job

def good():
    return Job(model=lambda: torch.nn.Linear(WIDTH, 1), data=[torch.zeros(WIDTH)])

def named():
    return good().with_(name="mine")

def number():
    return 3

def broken():
    raise ValueError("no such file")
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 2\n")
    path = tmp_path / "jobs.py"
    path.write_text(SOURCE)
    return path


def test_a_spec_names_a_function_of_a_file_or_a_module(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_spec(f"{spec}:good").name == "good"
    assert load_spec(f"{spec}:named").name == "mine"
    monkeypatch.chdir(spec.parent)
    assert load_spec("jobs:good").name == "good"
    assert load_spec("tests.zoo.plain:unet").name == "unet"


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("", "SPEC must be file.py:function or package.module:function, but is "),
        (":", "SPEC must be file.py:function"),
        (":missing", "has no function 'missing'; it has: good, named, number, broken"),
        (":number", "must return a shardwise.Job, but returned int"),
        (":broken", "failed: ValueError: no such file"),
    ],
)
def test_a_bad_spec_is_said_plainly(spec: Path, suffix: str, message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)) as error:
        load_spec(f"{spec}{suffix}")
    assert error.value.exit_status == 2 and isinstance(error.value, UserError)


def test_a_spec_that_does_not_import_names_the_reason(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"there is no file .*none\.py; SPEC is file\.py:function"):
        load_spec(f"{tmp_path}/none.py:good")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    with pytest.raises(SpecError, match=r"wrong\.py does not import: SyntaxError"):
        load_spec(f"{tmp_path}/wrong.py:f")
    with pytest.raises(SpecError, match=r"module 'no\.such\.thing' does not import: ModuleNotFoundError"):
        load_spec("no.such.thing:f")


def test_what_a_spec_draws_is_the_same_wherever_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "drawn.py").write_text(
        "import random, torch, numpy as np\n"
        "from torch.utils.data import TensorDataset\n"
        "from shardwise import Job\n"
        "def job():\n"
        "    data = TensorDataset(torch.randn(4), torch.tensor([random.random(), *np.random.rand(3)]))\n"
        "    return Job(model=lambda: torch.nn.Linear(1, 1), data=data, global_batch=2)\n"
    )
    before = torch.get_rng_state()
    first = load_spec(f"{tmp_path}/drawn.py:job")
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    again = load_spec(f"{tmp_path}/drawn.py:job")
    for a, b in zip(first.data.tensors, again.data.tensors, strict=True):  # type: ignore[attr-defined]
        assert torch.equal(a, b)
