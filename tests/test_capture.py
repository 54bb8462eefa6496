"""Capture: the same graph with weights and without, its normal form, random operators, and what does not capture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from shardwise.errors import CaptureError
from shardwise.graph import functional
from shardwise.graph.graph import Graph
from shardwise.graph.random import dropout_at, normal_at, positions, stream, uniform_at
from shardwise.job import Job, map_batch
from shardwise.measure.reference import run_reference
from shardwise.plan.plan import Plan, PlanAxis
from tests import algebra
from tests.conftest import Errors, outcome
from tests.pool import Pool
from tests.test_rules import job
from tests.zoo import ZOO, hf, plain
from tests.zoo.data import CausalTokens, Vectors
from tests.zoo.plain import class_loss, next_token_loss, sgd

MODELS = [plain.tied_lm, plain.convnet_bn, hf.vit]


def ids(graph: Graph) -> list[str]:
    """Names of a graph's operators, less the casts, of which another dtype has others."""
    return [op.id for op in graph.ops if op.name != "aten._to_copy"]


def captured_alike(whole: Job) -> None:
    without, module = Graph.of(whole), whole.build()
    real = Graph.of(whole, module)
    batch = map_batch(whole.batch(range(2)), lambda t: t.double() if t.is_floating_point() else t)
    exact = Graph.of(whole, module.double(), batch)
    assert without.fingerprint() == real.fingerprint() == exact.fingerprint()
    assert ids(without) == ids(real) == ids(exact)
    assert [d.name for d in without.dims()] == [d.name for d in real.dims()] == [d.name for d in exact.dims()]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_plan_made_without_weights_fits_the_model_that_runs(make: Callable[[], Job]) -> None:
    captured_alike(make())


@pytest.mark.prove
@pytest.mark.parametrize("name", ZOO)
def test_every_model_is_captured_alike(name: str) -> None:
    captured_alike(ZOO[name]())


@pytest.mark.parametrize("make", [hf.llama, plain.qkv_attention, plain.unet], ids=lambda make: make.__name__)
def test_a_graph_is_what_torch_traces_a_second_time(make: Callable[[], Job], monkeypatch: pytest.MonkeyPatch) -> None:
    def operators() -> list[object]:
        found = Graph.of(make()).ops
        return [(op.id, op.name, op.module, [(v.sizes, v.dtype) for v in (*op.inputs, *op.outputs)]) for op in found]

    traced = []
    again = ExportedProgram.run_decompositions
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda *a: traced.append(a) or again(*a))
    written = operators()
    assert not traced
    monkeypatch.setattr(functional, "_is_plain", lambda node: False)
    assert operators() == written and traced


class Typed(nn.Module):
    """A parameter made by its type, which is on the CPU whatever device the model is built on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.FloatTensor(16).fill_(1.0))
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.scale)  # type: ignore[no-any-return]


def test_a_model_that_makes_tensors_on_the_cpu_is_captured_without_its_weights() -> None:
    captured_alike(vectors(Typed))


def test_fingerprints_tell_models_apart() -> None:
    def fingerprint(**changes: Any) -> str:
        model = partial(plain.CausalLM, **{"layers": 1, **changes})
        return Graph.of(Job(model=model, data=CausalTokens(vocab=128), loss=next_token_loss)).fingerprint()

    found = [fingerprint(), fingerprint(width=48), fingerprint(layers=2), fingerprint(tied=True)]
    assert len(set(found)) == 4
    assert fingerprint() == found[0]


def test_the_number_of_samples_stays_open() -> None:
    graph = Graph.of(plain.tied_lm())
    assert graph.captured.fixed_batch is None
    assert graph.batch_dim is not None and graph.batch_dim.name == "batch"
    assert {value.sizes[0].power for value in graph.values[_input(graph)]} == {1}


def _input(graph: Graph) -> Any:
    return next(node for node in graph.values if node.name in graph.captured.inputs)


class Counts(nn.Module):
    """Turns the number of samples into a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(int(x.shape[0]), -1)) / float(torch.tensor(len(x)))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x)
        return found if found.sum() > 0 else -found


def vectors(model: Callable[[], nn.Module]) -> Job:
    return Job(model=model, data=Vectors(classes=8), loss=class_loss, global_batch=8)


def test_control_flow_on_data_does_not_capture_and_the_message_says_what_is_left() -> None:
    with pytest.raises(CaptureError, match="Branches does not capture: ") as error:
        Graph.of(vectors(Branches))
    assert "can still be split by data" in str(error.value) and "\n" not in str(error.value)


# --- normal form ------------------------------------------------------------------------------------------------------


def operators(function: Callable[..., Tensor], shape: tuple[int, ...], *weights: tuple[int, ...]) -> list[str]:
    """What a function becomes, less what the case around it adds."""
    graph = Graph.of(job((function, shape, weights)))
    return [op.name.partition(".")[2] for op in graph.ops if op.module == "cases.0"][1:]


@pytest.mark.parametrize(
    ("function", "weights", "expected"),
    [
        (lambda x, i, w, b: F.linear(x, w, b), ((8, 6), (8,)), ["linear", "add"]),
        (lambda x, i, w, b: F.conv1d(x, w, b), ((8, 4, 3), (8,)), ["conv1d", "view", "add"]),
        (lambda x, i, w, b: torch.addmm(b, x.flatten(0, 1), w), ((6, 8), (8,)), ["view", "mm", "add"]),
        (lambda x, i, w: F.mse_loss(x, w.expand_as(x)), ((4, 6),), ["expand", "broadcast_tensors", "mse_loss", "div"]),
        (lambda x, i: F.cross_entropy(x.mT, i), (), ["transpose", "cross_entropy_loss", "ne", "sum", "div"]),
        (lambda x, i: F.dropout(x, 0.0), (), []),
        (lambda x, i: F.dropout(x, 0.5, training=False), (), []),
        (lambda x, i: F.dropout(x, 0.5), (), ["dropout"]),
        (lambda x, i: x + x.new_zeros(6), (), ["zeros", "add"]),
        (lambda x, i: F.scaled_dot_product_attention(x, x, x), (), ["scaled_dot_product_attention"]),
    ],
)
def test_what_is_a_contraction_or_a_mean_is_written_so_that_it_can_be_split(
    function: Callable[..., Tensor], weights: tuple[tuple[int, ...], ...], expected: list[str]
) -> None:
    assert operators(function, (4, 6), *weights) == expected


@pytest.mark.parametrize(
    ("function", "weights", "expected"),
    [
        (lambda x, i: torch.multiply(x, torch.special.expit(x)), (), ["sigmoid", "mul"]),
        (lambda x, i: torch.subtract(x, torch.negative(x)), (), ["neg", "sub"]),
        (lambda x, i: torch.tile(x, (1, 1, 2)), (), ["repeat"]),
        (lambda x, i: x.clone().copy_(x[:1]), (), ["clone", "slice", "expand"]),
        (lambda x, i, w: torch.inner(x, w), ((8, 6),), ["permute", "view", "permute", "view", "mm", "view"]),
    ],
)
def test_what_no_rule_knows_is_written_with_what_rules_know(
    function: Callable[..., Tensor], weights: tuple[tuple[int, ...], ...], expected: list[str]
) -> None:
    assert operators(function, (4, 6), *weights) == expected


def test_a_recurrent_cell_is_split_like_the_operators_that_it_is_made_of() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(16, 32)
            self.head = nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            h, c = self.cell(x)
            return self.head(self.cell(x, (h, c))[0])  # type: ignore[no-any-return]

    graph = Graph.of(vectors(Cell))
    assert graph.unknown() == []
    gates = [dim for dim in graph.dims() if "cell.weight_ih" in dim.owners and dim.size.coefficient == 32]
    assert gates, "the hidden width inside the four gates is a dim that can be split"


def test_a_normal_form_computes_the_same_loss() -> None:
    """Programs on one device, against the user's own module."""
    for make in (plain.tied_lm, plain.torch_transformer, plain.sum_count_mlp):
        whole = make().with_(clip_norm=None)
        found = algebra.Whole(whole, whole.global_batch)
        (loss,) = (t for v, t in found.values.items() if v is found.graph.results["loss"])
        batch = whole.batch(range(whole.global_batch))
        true = run_reference(whole, [batch], torch.float64, sgd).losses[0]
        assert float(loss) == pytest.approx(true, rel=1e-12)


# --- random operators -------------------------------------------------------------------------------------------------

DRAWN: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor, int], Tensor]]] = {
    "dropout": (lambda x, i: F.dropout(x, 0.3), lambda x, at, key: dropout_at(x, 0.3, at, key)),
    "rand": (
        lambda x, i: x * torch.rand(x.shape[0], 4, 6),
        lambda x, at, key: x * uniform_at(at, key, torch.float64),
    ),
    "rand_like": (lambda x, i: x * torch.rand_like(x), lambda x, at, key: x * uniform_at(at, key, torch.float64)),
    "randn_like": (lambda x, i: x + torch.randn_like(x), lambda x, at, key: x + normal_at(at, key, torch.float64)),
    "normal_": (
        lambda x, i: x + torch.empty_like(x).normal_(1.0, 2.0),
        lambda x, at, key: x + normal_at(at, key, torch.float64) * 2 + 1,
    ),
    "uniform_": (
        lambda x, i: x + torch.empty_like(x).uniform_(-1, 2),
        lambda x, at, key: x + uniform_at(at, key, torch.float64) * 3 - 1,
    ),
    "bernoulli": (
        lambda x, i: x * torch.bernoulli(torch.full_like(x, 0.3)),
        lambda x, at, key: x * (uniform_at(at, key, torch.float64) < 0.3),
    ),
    "exponential_": (
        lambda x, i: x + torch.empty_like(x).exponential_(2.0),
        lambda x, at, key: x - torch.log(1 - uniform_at(at, key, torch.float64)) / 2,
    ),
    "randint": (
        lambda x, i: x + torch.randint(2, 9, x.shape),
        lambda x, at, key: x + torch.floor(uniform_at(at, key, torch.float64) * 7) + 2,
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_random_operators_draw_numbers_of_seed_step_operator_and_position(name: str) -> None:
    function, formula = DRAWN[name]
    whole = job((function, (4, 6), ()))
    batch = whole.batch(range(5))
    true = run_reference(whole.with_(seed=3), [batch] * 2, torch.float64, lambda p: torch.optim.SGD(p, lr=0.0)).losses
    at = positions((5, 4, 6), None, (5, 4, 6), torch.device("cpu"))
    found = [
        float(formula(batch["x0"].double(), at, stream(stream(3, step, 0), 0, 0)).square().mean()) for step in (0, 1)
    ]
    assert true == pytest.approx(found, rel=1e-12)
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x, i: x * torch.multinomial(x[:, :, 0].softmax(-1), 1)[..., None], "aten.multinomial"),
        (lambda x, i: x[:, torch.randperm(4)], "aten.randperm"),
        (lambda x, i: F.rrelu(x, training=True), "aten.rrelu"),
    ],
)
def test_operators_that_draw_inside_are_refused(function: Callable[..., Tensor], name: str) -> None:
    with pytest.raises(CaptureError, match=rf"{name} in cases.0 draws random numbers inside.*write it with torch.rand"):
        Graph.of(job((function, (4, 6), ())))


def test_a_recurrent_layer_with_dropout_inside_is_refused() -> None:
    whole = plain.lstm_tagger()
    layers = nn.LSTM(32, 32, num_layers=2, batch_first=True, dropout=0.1)

    def dropped() -> nn.Module:
        module = plain.Tagger(nn.LSTM)
        module.recurrent = layers if not module.head.weight.is_meta else layers.to("meta")
        return module

    with pytest.raises(CaptureError, match=r"aten.lstm in recurrent draws random numbers inside"):
        Graph.of(whole.with_(model=dropped))


class Squeezed(nn.Module):
    """Drops dims of one without saying which, as models with one score for each sample do."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.head = nn.Linear(16, 1), nn.Linear(1, 8)

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x)
        return self.head(score.squeeze().unsqueeze(1) + score.squeeze(0))  # type: ignore[no-any-return]


def test_a_rank_with_one_sample_still_has_a_dim_of_samples(pool: Pool) -> None:
    whole = Job(model=Squeezed, data=Vectors(classes=8), loss=class_loss, optimizer=sgd, global_batch=4)
    found = pool(4).run(outcome, whole, Plan((PlanAxis("data", 4, ("batch",)),)), 2, timeout=60)
    assert all(isinstance(errors, Errors) and errors.worst < 1e-9 for errors in found), found
