"""Optimizers on parts of parameters: groups come out as on one device, and couplings are found by a probe."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from shardwise.engine.optimize import build_optimizer, check_elementwise, squared_norm
from shardwise.errors import JobError, PlanError

ELEMENTWISE = ["SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Rprop"]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_optimizers_of_single_entries_may_run_on_parts(name: str) -> None:
    check_elementwise(partial(getattr(torch.optim, name), lr=0.1))


class Unit(torch.optim.Optimizer):
    """Steps of the gradient's direction, the same length for every parameter (as LARS and Muon do)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad / p.grad.norm())


@pytest.mark.parametrize("factory", [Unit, partial(torch.optim.Adafactor, lr=0.1), partial(torch.optim.Muon, lr=0.1)])
def test_optimizers_that_couple_entries_may_not(factory: Any) -> None:
    with pytest.raises(PlanError, match=r"couples the entries of a parameter.*use a plan with data and pipeline axes"):
        check_elementwise(factory)


def test_an_optimizer_that_cannot_be_probed_says_why() -> None:
    def picky(params: Any) -> torch.optim.Optimizer:
        first, *_ = params
        assert first.shape == (3, 3), "three by three alone"
        return torch.optim.SGD([first])

    with pytest.raises(PlanError, match="cannot be probed on a small matrix: AssertionError: three by three alone"):
        check_elementwise(picky)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)


def grouped(params: Any) -> torch.optim.Optimizer:
    listed = list(params)
    return torch.optim.AdamW(
        [
            {"params": [p for p in listed if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in listed if p.ndim <= 1], "weight_decay": 0.0, "lr": 0.5},
        ],
        lr=0.1,
    )


def test_groups_are_made_by_the_shapes_of_whole_parameters() -> None:
    module = Net()
    pieces = {name: [nn.Parameter(torch.zeros(2))] for name, p in module.named_parameters()}
    pieces["second.weight"] = []  # another rank has it
    optimizer, scheduler = build_optimizer(grouped, module, pieces)
    matrices, vectors = optimizer.param_groups
    assert scheduler is None
    assert [id(p) for p in matrices["params"]] == [id(pieces["first.weight"][0])]
    names = ["frozen", "first.bias", "second.bias"]
    assert [id(p) for p in vectors["params"]] == [id(pieces[name][0]) for name in names]
    assert (matrices["weight_decay"], vectors["weight_decay"], vectors["lr"]) == (0.1, 0.0, 0.5)


def test_a_scheduler_drives_the_groups_of_this_rank() -> None:
    def factory(params: Any) -> Any:
        optimizer = torch.optim.SGD(params, lr=1.0)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    module = Net()
    local = {name: [nn.Parameter(torch.ones(2))] for name, _ in module.named_parameters()}
    optimizer, scheduler = build_optimizer(factory, module, local)
    param = local["first.weight"][0]
    for size in (1.0, 0.5, 0.25):
        before = param.detach().clone()
        param.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
        assert torch.allclose(before - param, torch.full((2,), size))


def test_state_made_at_construction_is_that_of_the_parts() -> None:
    module = Net()
    local = {name: [nn.Parameter(torch.ones(2))] for name, _ in module.named_parameters()}
    optimizer, _ = build_optimizer(partial(torch.optim.Adagrad, lr=0.1), module, local)
    assert {p.shape for p in optimizer.state} == {(2,)}
    assert {id(p) for p in optimizer.state} == {id(parts[0]) for parts in local.values()}


@pytest.mark.parametrize("made", [None, 3, "adam"])
def test_what_is_no_optimizer_is_refused(made: Any) -> None:
    with pytest.raises(JobError, match=r"optimizer\(params\) must return a torch Optimizer, but returned"):
        build_optimizer(lambda params: made, Net(), {})


def test_the_norm_counts_each_entry_by_its_share() -> None:
    grads = [(torch.full((4,), 3.0), 0.5), (torch.full((2, 3), 2.0), 1.0)]
    assert float(squared_norm(grads, torch.device("cpu"))) == pytest.approx(0.5 * 4 * 9 + 6 * 4)
    assert float(squared_norm([], torch.device("cpu"))) == 0.0
