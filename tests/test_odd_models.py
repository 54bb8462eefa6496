"""What some models do and most do not: times divided, codebooks looked up, running means read as they are renewed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from shardwise.errors import CaptureError, JobError
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.measure.verify import verify
from shardwise.plan.plan import Plan
from shardwise.search.strategies import strategies
from tests.conftest import Errors, cuts, data, outcome, pipeline, tensor
from tests.pool import Pool
from tests.zoo.data import Vectors
from tests.zoo.plain import class_loss, sgd

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Noisy(Dataset[Any]):
    """Vectors, noise for them, and how far to go to it: a whole number."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(index)
        return {
            "x": torch.randn(16, generator=draw),
            "noise": torch.randn(16, generator=draw),
            "time": torch.randint(0, 100, (), generator=draw),
        }


class Denoiser(nn.Module):
    """Finds the noise; whole numbers divided are floating-point in torch's default dtype, whatever the model's is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        kept = torch.cos(time / 100 * math.pi / 2)[:, None].to(x.dtype)
        found: Tensor = self.second(F.silu(self.first(kept * x + (1 - kept**2).sqrt() * noise)))
        return found


def denoised(found: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(found, batch["noise"])


def denoiser() -> Job:
    return Job(model=Denoiser, data=Noisy(), loss=denoised, optimizer=sgd, global_batch=8)


class Codebook(nn.Module):
    """The nearest of learned vectors in place of each, past which the gradient goes straight (van den Oord, 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(10, 8))
        self.encode, self.decode = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encode(x)
        code = self.codes[torch.cdist(hidden, self.codes).argmin(-1)]
        found: Tensor = self.decode(hidden + (code - hidden).detach()) + (code - hidden.detach()).square().mean()
        return found


class Centred(nn.Module):
    """Subtracts a running mean of its input, this batch's part in it included."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        found: Tensor = self.second(torch.relu(self.first(x - self.mean)))
        return found


class Masked(nn.Module):
    """Writes a value wherever a mask says so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x) * 1
        hidden[hidden.abs() < 0.1] = 0
        found: Tensor = self.second(hidden)
        return found


class Asked(nn.Module):
    """Learned queries over what a sample is cut into; keys and values are parts of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(4, 16))
        self.inputs, self.attention = nn.Linear(4, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.inputs(x.view(-1, 4, 4))
        queries = self.queries.expand(x.shape[0], -1, -1)
        found: Tensor = self.head((queries + self.attention(queries, parts, parts)[0]).flatten(1))
        return found


class Turned(nn.Module):
    """A weight that is kept orthogonal, which is looked at when the model is built."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.utils.parametrizations.orthogonal(nn.Linear(16, 16)), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(x)))
        return found


class Contrasted(nn.Module):
    """Two views of each sample told apart from all others', joined along the samples (Chen et al., 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        seen = torch.cat([self.second(torch.relu(self.first(view))) for view in (x, noise)])
        seen, count = F.normalize(seen, dim=-1), x.shape[0]
        alike = (seen @ seen.T).masked_fill(torch.eye(2 * count, dtype=torch.bool, device=x.device), -1e9)
        wanted = torch.cat([torch.arange(count, 2 * count), torch.arange(count)]).to(x.device)
        return F.cross_entropy(alike, wanted)


def itself(found: Tensor, batch: Any) -> Tensor:
    return found


def contrasted() -> Job:
    return Job(model=Contrasted, data=Noisy(), loss=itself, optimizer=sgd, global_batch=8)


class Words(Dataset[Any]):
    """Short sequences and their class."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return (torch.arange(6) * (index + 3) ** 2 // 5) % 20, torch.tensor(index % 8)


class Decoder(nn.Module):
    """torch's decoder with a mask of its own, which torch looks at for a hint."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.memory = nn.Embedding(20, 16), nn.Parameter(torch.randn(1, 3, 16))
        layer = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.layers, self.head = nn.TransformerDecoder(layer, 2), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(6, 6, dtype=torch.bool, device=x.device).triu(1)
        memory = self.memory.expand(x.shape[0], -1, -1)
        found: Tensor = self.head(self.layers(self.words(x), memory, tgt_mask=mask).mean(1))
        return found


class Counted(nn.Module):
    """An embedding with an option that torch has for it."""

    def __init__(self, **option: Any) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 16, **option), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.words(x).mean(1))
        return found


class Physical(nn.Module):
    """A field and its gradient in space (Raissi et al., 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        value = self.field(x)
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        return value[:, 0] ** 2 + slope.square().sum(1)


def mean_of(found: Tensor, batch: Any) -> Tensor:
    return found.mean()


def of_words(model: Callable[[], nn.Module]) -> Callable[[], Job]:
    return lambda: Job(model=model, data=Words(), loss=class_loss, optimizer=sgd, global_batch=8)


def classifier(model: Callable[[], nn.Module]) -> Callable[[], Job]:
    return lambda: Job(model=model, data=Vectors(classes=8), loss=class_loss, optimizer=sgd, global_batch=8)


MODELS = {
    "denoiser": (denoiser, 4),
    "codebook": (classifier(Codebook), 1),
    "centred": (classifier(Centred), 4),
    "masked": (classifier(Masked), 4),
    "asked": (classifier(Asked), 4),
    "turned": (classifier(Turned), 4),
    "contrasted": (contrasted, 1),
    "decoder": (of_words(Decoder), 4),
    "counted": (of_words(partial(Counted, scale_grad_by_freq=True)), 4),
}
"""Jobs, and the micro-batches that they take: some losses couple the samples."""


@pytest.mark.parametrize("name", MODELS)
def test_every_split_computes_what_one_device_does(name: str, pool: Pool) -> None:
    make, micros = MODELS[name]
    job = make()
    plans = [
        Plan((data(),)),
        Plan((data(),), zero=3, micro_batches=min(micros, 2)),
        Plan((tensor("width*", "classes*"),)),
        Plan((pipeline(),), cuts(job, 2), micro_batches=micros),
    ]
    for plan in plans:
        found = pool(2).run(outcome, job, plan, 2, timeout=60)
        right = all(isinstance(e, Errors) and e.worst < 1e-9 and not e.traffic for e in found)
        assert right, (plan.title(), found)


def test_a_model_that_asks_for_gradients_itself_is_split_by_data_as_it_is(pool: Pool) -> None:
    job = Job(model=Physical, data=Vectors(classes=8), loss=mean_of, optimizer=sgd, global_batch=8)
    with pytest.raises(CaptureError, match="Physical does not capture, for it uses a tensor that torch kept"):
        Graph.of(job)
    rows = verify(job, 2, steps=2, pool=pool)
    assert {row.strategy: row.passed for row in rows if row.applicable} == {"data": True, "sharded": True}, rows


def test_a_model_that_changes_its_weights_when_it_is_called_is_refused() -> None:
    job = of_words(partial(Counted, max_norm=0.5))()
    with pytest.raises(JobError, match=r"Counted changes its parameter words.weight each time that it is called"):
        strategies(job, 2)
    assert Graph.of(of_words(Counted)()).ops
