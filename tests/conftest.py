"""What tests share: pools of live ranks, and the comparison of a plan's run with one device's."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, settings

from shardwise.errors import PlanError
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.parallel.mesh import Traffic
from shardwise.plan.plan import Plan, PlanAxis
from tests.long import is_long
from tests.pool import Pool

settings.register_profile(
    "shardwise", derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate], print_blob=False,
)  # fmt: skip
settings.load_profile("shardwise")
# What was measured of the machine that the tests run on is not to change what they find.
_OWN = f"shardwise-tests-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}-"
if _OWN not in os.environ.get("XDG_CACHE_HOME", ""):  # ranks have that of the process that started them
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix=_OWN)
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

_GRAPHS: dict[bytes, Graph] = {}
"""Graphs of the jobs that were compared in this process."""
Mutation = Callable[[pytest.MonkeyPatch], None]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the long proofs, before those are left out that were not asked for."""
    for item in items:
        if is_long(item.nodeid):
            item.add_marker(pytest.mark.prove)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """`pool(n)` gives n live ranks, the same ones as long as they are usable."""
    with Pool() as live:
        yield live


def data(size: int = 2) -> PlanAxis:
    """An axis that splits the batch."""
    return PlanAxis("data", size, ("batch",))


def tensor(*dims: str, size: int = 2) -> PlanAxis:
    """An axis that splits dims of the weights; without names those of a transformer."""
    return PlanAxis("tensor", size, dims or ("heads*", "width@*.*", "vocab*", "channels*", "classes*"))


def pipeline(size: int = 2) -> PlanAxis:
    """An axis of stages."""
    return PlanAxis("pipeline", size)


def cuts(job: Job, stages: int) -> tuple[str, ...]:
    """Cuts that part a model's operators into about equal stages."""
    graph = Graph.of(job)
    # In another dtype a model has other casts.
    learned = [op.id for op in graph.ops if op.name != "aten._to_copy" and any(v in graph.learned for v in op.outputs)]
    return tuple(learned[len(learned) * k // stages] for k in range(1, stages))


class Errors(NamedTuple):
    """The largest relative differences from one device, and where collectives were not those announced."""

    loss: float
    grad: float
    norm: float
    param: float
    where: str = ""
    traffic: str = ""

    @property
    def worst(self) -> float:
        return max(self[:4])


def compare(
    job: Job, plan: Plan, steps: int = 2, sizes: Sequence[int] = (), mutation: Mutation | None = None
) -> Errors:
    """How far a plan's run is from one device's, in float64; to be called on every rank of the plan.

    `sizes` are those of the batches; `mutation` puts a bug into the library while the plan runs.
    """
    from shardwise.engine.engine import GraphEngine, parallelize
    from shardwise.measure.reference import run_reference
    from shardwise.measure.traffic import Collectives

    warnings.simplefilter("ignore")
    torch.manual_seed(1234 + (dist.get_rank() if dist.is_initialized() else 0))
    sizes = sizes or [job.global_batch] * steps
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    batches = [job.batch(range(a, a + n)) for a, n in zip(starts, sizes, strict=True)]
    losses, grads, norms, traffic = [], [], [], ""
    with pytest.MonkeyPatch.context() as patch:
        if mutation is not None:
            mutation(patch)
        # Capturing takes longer than the run. A mutation may be of what captures.
        key = hashlib.sha256(cloudpickle.dumps(job)).digest() if mutation is None else b""
        engine = parallelize(job, plan, dtype=torch.float64, graph=_GRAPHS.get(key))
        if key and isinstance(engine, GraphEngine):
            _GRAPHS[key] = engine.graph
        engine.measures_norm = True
        for batch, size in zip(batches, sizes, strict=True):
            seen, updating = Collectives(), Collectives()
            with seen:
                losses.append(engine.forward_backward(batch))
            grads.append(engine.gradients())
            with updating:
                engine.update()
            norms.append(engine.grad_norm)
            traffic = traffic or _unlike(engine.announced(size), [*seen.take(), *updating.take()])
        state = engine.state_dict()
    with torch.random.fork_rng():
        reference = run_reference(job, batches, torch.float64, job.optimizer)
    where = ""
    worst = {"grad": 0.0, "param": 0.0}
    for found, expected, norm in zip(grads, reference.grads, reference.norms, strict=True):
        for name, want in expected.items():
            error = apart(found[name], want, 1e-6 * norm)
            if error > worst["grad"]:
                worst["grad"], where = error, name
    for name, want in reference.params.items():
        worst["param"] = max(worst["param"], apart(state[name], want, 1e-6))
    return Errors(
        max(_apart(a, b) for a, b in zip(losses, reference.losses, strict=True)),
        worst["grad"],
        max(_apart(a or 0.0, b) for a, b in zip(norms, reference.norms, strict=True)),
        worst["param"],
        where,
        traffic,
    )


def _unlike(announced: Sequence[Traffic], recorded: Sequence[Traffic]) -> str:
    """What was sent and not announced, or announced and not sent."""
    totals: dict[tuple[str, str], list[int]] = {}
    for sign, listed in ((1, announced), (-1, recorded)):
        for kind, axis, count, size in listed:
            total = totals.setdefault((kind, axis), [0, 0])
            total[0] += sign * count
            total[1] += sign * size
    wrong = {key: total for key, total in totals.items() if total != [0, 0]}
    return f"announced less recorded (count, bytes): {wrong}" if wrong else ""


def apart(found: torch.Tensor, want: torch.Tensor, least: float) -> float:
    """Relative difference of two tensors; a tensor that is not finite is infinitely far away."""
    error = float((found - want).norm() / max(float(want.norm()), least))
    return error if error == error else float("inf")


def _apart(found: float, want: float) -> float:
    error = abs(found - want) / max(abs(want), 1e-12)
    return error if error == error else float("inf")


def outcome(job: Job, plan: Plan, *rest: Any) -> Errors | str:
    """As `compare`, or the message of the PlanError that the plan was refused with."""
    try:
        return compare(job, plan, *rest)
    except PlanError as error:
        return str(error)
