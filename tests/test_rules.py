"""Every rule of the table: an operator computed by parts, along every letter that its rule gives, is the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.utils.data import Dataset

import shardwise
from shardwise.graph.graph import Graph
from shardwise.graph.rules import RULES, OpContext
from shardwise.job import Job
from tests import algebra
from tests.zoo import ZOO, hf, plain

SAMPLES = 5
Case = tuple[Callable[..., Tensor], tuple[int, ...], tuple[tuple[int, ...], ...]]
"""What is called, with a batch, ids and parameters; the shape of a sample; the shapes of the parameters."""


@dataclass(frozen=True)
class Tensors(Dataset[dict[str, Tensor]]):
    """For each shape `x0`, `x1` ... of it, and `ids0`, `ids1` ... without the last dim and below the first size."""

    shapes: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(index)
        found = {}
        for n, shape in enumerate(self.shapes):
            found[f"x{n}"] = torch.randn(shape, generator=draw)
            found[f"ids{n}"] = torch.randint(0, shape[0], shape[:-1], generator=draw)
        return found


class Apply(nn.Module):
    """A function of the batch, scaled so that it is learned, and of parameters of given shapes."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.function = case[0]
        self.scale = nn.Parameter(torch.ones(()))
        self.weights = nn.ParameterList(torch.randn(shape) for shape in case[2])

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.function(x * self.scale, ids, *self.weights)


class Cases(nn.Module):
    """Functions side by side, each of its own tensors."""

    def __init__(self, *cases: Case) -> None:
        super().__init__()
        self.cases = nn.ModuleList(Apply(case) for case in cases)

    def forward(self, **batch: Tensor) -> Tensor:
        found = [case(batch[f"x{n}"], batch[f"ids{n}"]) for n, case in enumerate(self.cases)]
        return torch.stack([t.to(torch.get_default_dtype()).square().mean() for t in found]).sum()


def job(*cases: Case) -> Job:
    shapes = tuple(shape for _, shape, _ in cases)
    return Job(model=partial(Cases, *cases), data=Tensors(shapes), global_batch=SAMPLES, name="cases")


def positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0], device=x.device)


def written(x: Tensor, values: Tensor) -> Tensor:
    """With other values at two places of its second dim."""
    found = x * 2
    found[:, torch.arange(2, device=x.device)] = values
    return found


CASES: dict[str, Case] = {
    "add": (lambda x, i, w: x + w + 2, (4, 6), ((6,),)),
    "mul": (lambda x, i, w: x * w * 2, (4, 6), ((4, 1),)),
    "div": (lambda x, i, w: x / (w.abs() + 1), (4, 6), ((6,),)),
    "where": (lambda x, i, w: torch.where(x > 0, x, w), (4, 6), ((6,),)),
    "maximum": (lambda x, i, w: torch.maximum(x, w), (4, 6), ((4, 6),)),
    "gelu": (lambda x, i: F.gelu(x), (4, 6), ()),
    "clamp": (lambda x, i: x.clamp(-0.5, 0.5), (4, 6), ()),
    "prelu": (lambda x, i, w: F.prelu(x, w), (4, 6), ((4,),)),
    "glu": (lambda x, i: F.glu(x, -1), (4, 8), ()),
    "glu, middle": (lambda x, i: F.glu(x, 1), (4, 8), ()),
    "linear": (lambda x, i, w, b: F.linear(x, w, b), (4, 6), ((8, 6), (8,))),
    "matmul": (lambda x, i, w: torch.matmul(x.unsqueeze(1), w), (4, 6), ((2, 6, 8),)),
    "matmul, vector": (lambda x, i, w: torch.matmul(x, w), (4, 6), ((6,),)),
    "mm": (lambda x, i, w: torch.mm(x.flatten(0, 1), w), (4, 6), ((6, 8),)),
    "bmm": (lambda x, i: torch.bmm(x, x.transpose(1, 2) + 1), (4, 6), ()),
    "addmm": (lambda x, i, w, b: torch.addmm(b, x.flatten(0, 1), w, beta=0.5), (4, 6), ((6, 8), (8,))),
    "einsum": (lambda x, i, w: torch.einsum("bsw,hwd->bhsd", x, w), (4, 6), ((2, 6, 8),)),
    "einsum, three": (lambda x, i, a, b: torch.einsum("bsw,wh,sh->bh", x, a, b), (4, 6), ((6, 8), (4, 8))),
    "attention": (
        lambda x, i, w: F.scaled_dot_product_attention(*(x @ w).unflatten(-1, (3, 4, 2)).permute(2, 0, 3, 1, 4)),
        (4, 6), ((6, 24),),
    ),
    "attention, causal": (
        lambda x, i, w: F.scaled_dot_product_attention(
            *(x @ w).unflatten(-1, (3, 4, 2)).permute(2, 0, 3, 1, 4), is_causal=True
        ),
        (4, 6), ((6, 24),),
    ),
    "attention, causal, of positions in groups": (
        lambda x, i: F.scaled_dot_product_attention(x, x, x, is_causal=True)
        + x.unflatten(1, (2, 6)).square().sum(2).repeat_interleave(6, 1), (12, 6), (),
    ),
    "attention, grouped": (
        lambda x, i, q, k: F.scaled_dot_product_attention(
            (x @ q).unflatten(-1, (4, 2)).transpose(1, 2), *[(x @ k).unflatten(-1, (2, 2)).transpose(1, 2)] * 2,
            enable_gqa=True,
        ),
        (4, 6), ((6, 8), (6, 4)),
    ),
    "attention, mask": (
        lambda x, i, w, m: F.scaled_dot_product_attention(x, x, x @ w, attn_mask=m), (4, 6), ((6, 8), (4, 4)),
    ),
    "conv1d": (lambda x, i, w, b: F.conv1d(x, w, b, padding=1), (4, 6), ((8, 4, 3), (8,))),
    "conv1d, grouped": (lambda x, i, w, b: F.conv1d(x, w, b, groups=2), (4, 6), ((8, 2, 3), (8,))),
    "conv1d, depthwise": (lambda x, i, w: F.conv1d(x, w, groups=4), (4, 6), ((4, 1, 3),)),
    "conv2d": (lambda x, i, w: F.conv2d(x, w, stride=2), (4, 6, 6), ((8, 4, 3, 3),)),
    "conv3d": (lambda x, i, w: F.conv3d(x, w), (2, 4, 4, 4), ((4, 2, 2, 2, 2),)),
    "conv_transpose1d": (lambda x, i, w, b: F.conv_transpose1d(x, w, b), (4, 6), ((4, 8, 3), (8,))),
    "conv_transpose2d": (lambda x, i, w: F.conv_transpose2d(x, w, stride=2), (4, 3, 3), ((4, 8, 2, 2),)),
    "max_pool2d": (lambda x, i: F.max_pool2d(x, 2), (4, 6, 6), ()),
    "avg_pool1d": (lambda x, i: F.avg_pool1d(x, 2), (4, 6), ()),
    "adaptive_avg_pool2d": (lambda x, i: F.adaptive_avg_pool2d(x, 2), (4, 6, 6), ()),
    "upsample": (lambda x, i: F.interpolate(x, scale_factor=2.0, mode="bilinear"), (4, 3, 3), ()),
    "pixel_shuffle": (lambda x, i: F.pixel_shuffle(x, 2), (8, 3, 3), ()),
    "embedding": (lambda x, i, w: F.embedding(i, w), (4, 6), ((4, 8),)),
    "embedding, padding": (lambda x, i, w: F.embedding(i, w, padding_idx=3), (4, 6), ((4, 8),)),
    "embedding, rows in groups": (
        lambda x, i, w: F.embedding(i, w) + w.view(2, 6, 8).square().sum((0, 1)), (4, 6), ((12, 8),),
    ),
    "embedding_bag": (lambda x, i, w: F.embedding_bag(i, w, mode="mean"), (4, 6), ((4, 8),)),
    "layer_norm": (lambda x, i, w, b: F.layer_norm(x, (6,), w, b), (4, 6), ((6,), (6,))),
    "rms_norm": (lambda x, i, w: F.rms_norm(x, (6,), w), (4, 6), ((6,),)),
    "group_norm": (lambda x, i, w, b: F.group_norm(x, 4, w, b), (8, 6), ((8,), (8,))),
    "instance_norm": (lambda x, i: F.instance_norm(x), (4, 6), ()),
    "polar": (lambda x, i, w: torch.view_as_real(torch.polar(x, x * w)), (4, 6), ((6,),)),
    "complex": (
        lambda x, i, w, v: (torch.view_as_complex((x * w).unflatten(-1, (3, 2))) * torch.complex(v, v)).abs(),
        (4, 6), ((6,), (3,)),
    ),
    "fft": (lambda x, i, w: torch.fft.fft(x * w, dim=1).real + torch.fft.irfft(torch.fft.rfft(x)), (4, 6), ((6,),)),
    "instance_norm, learned": (lambda x, i, w, b: F.instance_norm(x, weight=w, bias=b), (4, 6), ((4,), (4,))),
    "bilinear": (lambda x, i, w, v: F.bilinear(x, x @ v, w), (4, 6), ((8, 6, 4), (6, 4))),
    "softmax": (lambda x, i: x.softmax(1), (4, 6), ()),
    "log_softmax": (lambda x, i: x.log_softmax(-1), (4, 6), ()),
    "logsumexp": (lambda x, i: x.logsumexp(1), (4, 6), ()),
    "sum": (lambda x, i: x.sum(1), (4, 6), ()),
    "sum, several": (lambda x, i: x.sum((0, 2), keepdim=True), (4, 6), ()),
    "mean": (lambda x, i: x.mean(-1), (4, 6), ()),
    "mean, batch": (lambda x, i: x.mean((0, 1)), (4, 6), ()),
    "amax": (lambda x, i: x.amax(1, keepdim=True), (4, 6), ()),
    "max": (lambda x, i: x.max(1).values, (4, 6), ()),
    "argmax": (lambda x, i: x.argmax(-1) * x.sum(-1), (4, 6), ()),
    "var": (lambda x, i: x.var(1), (4, 6), ()),
    "norm": (lambda x, i: torch.linalg.vector_norm(x, dim=1), (4, 6), ()),
    "prod": (lambda x, i: x.prod(1), (4, 6), ()),
    "cumsum": (lambda x, i: x.cumsum(1), (4, 6), ()),
    "flip": (lambda x, i: x.flip(1), (4, 6), ()),
    "roll": (lambda x, i: x.roll(1, 1), (4, 6), ()),
    "sort": (lambda x, i: x.sort(1).values, (4, 6), ()),
    "topk": (lambda x, i: x.topk(2, 1).values, (4, 6), ()),
    "tril": (lambda x, i: x.tril(), (4, 6), ()),
    "view, joins": (lambda x, i: x.view(-1, 24), (4, 6), ()),
    "view, splits": (lambda x, i: x.reshape(x.shape[0], 2, 2, 3, 2).exp(), (4, 6), ()),
    "view, batch": (lambda x, i: x.reshape(-1, 6).view(-1, 4, 3, 2), (4, 6), ()),
    "view, two batches in one": (lambda x, i: x.repeat(2, 1, 1).view(-1, 6) * 2, (4, 6), ()),
    "expand": (lambda x, i: x.unsqueeze(1).expand(-1, 3, -1, -1) * 2, (4, 6), ()),
    "permute": (lambda x, i: x.permute(2, 0, 1) * 2, (4, 6), ()),
    "transpose": (lambda x, i: x.mT * 2, (4, 6), ()),
    "movedim": (lambda x, i: x.movedim(0, -1) * 2, (4, 6), ()),
    "unsqueeze": (lambda x, i: x.unsqueeze(1).squeeze(1).unsqueeze(-1) * 2, (4, 6), ()),
    "slice": (lambda x, i: x[:, :, 3:] * x[:, 1:3, :3].sum(1, keepdim=True), (4, 6), ()),
    "select": (lambda x, i: x[:, 1] * x.select(2, 0).sum(), (4, 6), ()),
    "unbind": (lambda x, i: x.unbind(1)[0] * x.unbind(1)[3], (4, 6), ()),
    "split": (lambda x, i: torch.stack(x.split(3, -1)[::-1], 1), (4, 6), ()),
    "split, unequal": (lambda x, i: x.split([1, 5], -1)[1] * 2, (4, 6), ()),
    "chunk": (lambda x, i, w: (x @ w).chunk(3, -1)[1] * 2, (4, 6), ((6, 24),)),
    "cat": (lambda x, i: torch.cat([x, x * 2], 1), (4, 6), ()),
    "cat, unequal": (lambda x, i: torch.cat([x, x[:, :1]], 1), (4, 6), ()),
    "stack": (lambda x, i: torch.stack([x, x * 2], 1), (4, 6), ()),
    "repeat": (lambda x, i: x.repeat(1, 2, 1), (4, 6), ()),
    "repeat_interleave": (lambda x, i: x.repeat_interleave(2, 1), (4, 6), ()),
    "pad": (lambda x, i: F.pad(x, (0, 1)), (4, 6), ()),
    "pad, a value": (lambda x, i: F.pad(x, (1, 1), value=3.0), (4, 6), ()),
    "unfold": (lambda x, i: x.unfold(1, 2, 2) * 2, (4, 6), ()),
    "index": (lambda x, i, w: w[i], (4, 6), ((4, 8),)),
    "index, rows": (lambda x, i: x[positions(x), i[:, 0]], (4, 6), ()),
    "index_select": (lambda x, i, w: w.index_select(0, i.flatten()), (4, 6), ((4, 8),)),
    "gather": (lambda x, i: x.gather(-1, i.unsqueeze(-1)), (4, 6), ()),
    "scatter": (lambda x, i: x.scatter(-1, i.unsqueeze(-1), 0.5), (4, 6), ()),
    "scatter_add": (lambda x, i: x.scatter_add(1, i.unsqueeze(-1).expand(-1, -1, 6), x * 2), (4, 6), ()),
    "index_add": (lambda x, i: x.index_add(1, i[0, :2], x[:, :2]), (4, 6), ()),
    "index_put": (lambda x, i: written(x, x[:, :2] * 3), (4, 6), ()),
    "index_put, values of all samples": (lambda x, i, w: written(x, w), (4, 6), ((1, 6),)),
    "one_hot": (lambda x, i: F.one_hot(i, 4).to(x.dtype) * x[..., :4], (4, 6), ()),
    "arange": (lambda x, i: x * torch.arange(3, 9, device=x.device), (4, 6), ()),
    "arange, batch": (lambda x, i: x * torch.arange(1, x.shape[0] + 1, device=x.device).view(-1, 1, 1), (4, 6), ()),
    "zeros": (lambda x, i: torch.cat([torch.zeros_like(x), x, x.new_ones(x.shape)], 1), (4, 6), ()),
    "dropout": (lambda x, i: F.dropout(x, 0.5), (4, 6), ()),
    "rand": (lambda x, i: x * torch.rand_like(x) + torch.randn(x.shape[0], 4, 6, device=x.device), (4, 6), ()),
    "mse_loss": (lambda x, i, w: F.mse_loss(x, w.expand_as(x), reduction="sum"), (4, 6), ((4, 6),)),
    "cross_entropy": (lambda x, i: F.cross_entropy(x.flatten(0, 1), i.flatten(), reduction="sum"), (4, 6), ()),
    "cross_entropy, classes in groups": (
        lambda x, i: F.cross_entropy(x.flatten(0, 1), i.flatten(), reduction="sum")
        + x.unflatten(-1, (2, 6)).sum(-1).square().sum(), (4, 12), (),
    ),
    "cross_entropy, weighted": (
        lambda x, i, w: F.cross_entropy(x.transpose(1, 2), i, weight=w.detach().abs(), label_smoothing=0.1),
        (4, 6), ((6,),),
    ),
    "cross_entropy, soft": (lambda x, i, w: F.cross_entropy(x.transpose(1, 2), w.softmax(0).expand(x.shape[0], -1, -1)),
                            (4, 6), ((6, 4),)),
    "nll_loss": (lambda x, i: F.nll_loss(x.log_softmax(-1).transpose(1, 2), i), (4, 6), ()),
    "bce": (lambda x, i: F.binary_cross_entropy_with_logits(x[..., 0], (i > 1).to(x.dtype)), (4, 6), ()),
    "kl_div": (lambda x, i: F.kl_div(x.log_softmax(-1), x.detach().softmax(-1), reduction="batchmean"), (4, 6), ()),
    "weight_norm": (lambda x, i, v, g: x @ torch._weight_norm(v, g, 0).T, (4, 6), ((8, 6), (8, 1))),
    "baddbmm": (lambda x, i: torch.baddbmm(x.mT @ x, x.mT, x, beta=0.5), (4, 6), ()),
    "outer": (lambda x, i, w: torch.outer(x[:, 0, 0], w), (4, 6), ((8,),)),
}  # fmt: skip


TOGETHER = 16
"""Cases captured at once: a capture takes longer than the operators."""


@cache
def captured(group: int) -> algebra.Whole:
    return algebra.Whole(job(*list(CASES.values())[group * TOGETHER : (group + 1) * TOGETHER]), SAMPLES)


def place(name: str) -> tuple[algebra.Whole, str]:
    """Where a case was captured, and the module that it is."""
    group, index = divmod(list(CASES).index(name), TOGETHER)
    return captured(group), f"cases.{index}"


@pytest.mark.parametrize("name", CASES)
def test_an_operator_by_parts_is_the_whole(name: str) -> None:
    whole, module = place(name)
    checked = 0
    for parts in (2, 3):
        for op, letter in algebra.letters(whole.graph, parts, module):
            algebra.check(whole, op, letter, parts)
            checked += 1
    assert checked, "no operator of the case can be split on anything"
    assert whole.graph.unknown() == []


def check_model(make: Callable[[], Job]) -> None:
    whole = algebra.Whole(make(), SAMPLES if make is not hf.clip else make().global_batch)
    for parts in (2, 3):
        for op, letter in algebra.letters(whole.graph, parts):
            algebra.check(whole, op, letter, parts)


@pytest.mark.parametrize("make", [plain.qkv_attention, plain.unet, plain.moe_mlp], ids=lambda make: make.__name__)
def test_every_operator_of_a_model_by_parts_is_the_whole(make: Callable[[], Job]) -> None:
    check_model(make)


@pytest.mark.prove
@pytest.mark.parametrize("name", ZOO)
def test_every_operator_of_every_model_by_parts_is_the_whole(name: str) -> None:
    check_model(ZOO[name])


# --- what a rule says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        ("linear", {"1·batch", "4", "6 summed", "8"}),
        ("softmax", {"1·batch", "6"}),
        ("layer_norm", {"1·batch", "4"}),
        ("conv1d", {"1·batch", "4 summed", "8"}),
        ("conv1d, grouped", {"1·batch", "2"}),
        ("embedding", {"1·batch", "4", "4 summed", "8"}),
        ("cumsum", {"1·batch", "6"}),
        ("attention", {"1·batch", "4", "2"}),
        ("bmm", {"1·batch", "4", "6 summed"}),
        ("instance_norm", {"1·batch", "4"}),
        ("index_put", {"1·batch", "6"}),
        ("index_put, values of all samples", {"1·batch", "6"}),
        ("mse_loss", {"1·batch summed", "4 summed", "6 summed"}),
    ],
)
def test_the_dims_of_an_operator(name: str, dims: set[str]) -> None:
    whole, module = place(name)
    alias = {"attention": "scaled_dot_product_attention"}.get(name, name.partition(",")[0])
    (op,) = [op for op in whole.graph.ops if op.module == module and op.name == f"aten.{alias}"]
    found = {f"{x.dim.size.coefficient}{'·batch' * x.dim.size.power}{' summed' * x.sums}" for x in op.letters}
    assert found == dims


def filled(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Written row by row, as a recurrence is."""
    found = torch.zeros_like(x)
    for t in range(x.shape[1]):
        found[:, t] = x[:, t] * w
    return found


def test_samples_that_are_written_over_are_not_coupled() -> None:
    graph = Graph.of(job((filled, (4, 6), ((6,),))))
    assert all("batch" in {x.dim.name for x in op.letters} for op in graph.ops if any(v.ndim > 1 for v in op.inputs))


def test_an_operator_without_a_rule_runs_whole() -> None:
    graph = Graph.of(job((lambda x, i: torch.linalg.inv(x @ x.mT + torch.eye(4, device=x.device)), (4, 6), ())))
    assert graph.unknown() == ["aten.linalg_inv"]
    (op,) = [op for op in graph.ops if not op.known]
    assert op.letters == ()


# --- a user's rule ----------------------------------------------------------------------------------------------------


@library.custom_op("shardwise_test::shrink", mutates_args=())
def shrink(x: Tensor, by: float) -> Tensor:
    return x.sign() * (x.abs() - by).clamp(min=0)


@shrink.register_fake
def _(x: Tensor, by: float) -> Tensor:
    return torch.empty_like(x)


shrink.register_autograd(
    lambda ctx, grad: (grad * ctx.mask, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "mask", output != 0),
)


def shrunk() -> Job:
    return job((lambda x, i, w: torch.ops.shardwise_test.shrink(x @ w, 0.1) @ w.T, (4, 6), ((6, 8),)))


def test_a_user_registers_a_rule_for_a_custom_operator() -> None:
    assert Graph.of(shrunk()).unknown() == ["shardwise_test.shrink"]

    @shardwise.rule("shardwise_test::shrink")
    def _(c: OpContext) -> None:
        c.elementwise(c.inputs)

    assert "shardwise_test.shrink" in RULES
    whole = algebra.Whole(shrunk(), SAMPLES)
    assert whole.graph.unknown() == []
    (op,) = [op for op in whole.graph.ops if op.name == "shardwise_test.shrink"]
    assert {letter.dim.size.coefficient for letter in op.letters} == {1, 4, 8}
    for found, letter in algebra.letters(whole.graph, 2):
        algebra.check(whole, found, letter, 2)
