"""Weights in files for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise.job import Job


def trained(job: Job) -> dict[str, Tensor]:
    """Weights that are not those that the job begins with: parameters by their first names, and saved buffers."""
    module = job.with_(seed=job.seed + 1).build()
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.data.add_(0.25)
    kept = module.state_dict()
    first = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: first[name].detach().clone() for name in kept if name in first}


def one_file(job: Job, folder: Path) -> Path:
    """The weights in a file that the reference implementation wrote."""
    save_file(trained(job), folder / "one.safetensors")
    return folder / "one.safetensors"


def several_files(job: Job, folder: Path) -> Path:
    """The weights in three files with an index."""
    weights = trained(job)
    placed: dict[str, str] = {}
    for i in range(3):
        names = sorted(weights)[i::3]
        save_file({name: weights[name] for name in names}, folder / f"model-{i}.safetensors")
        placed |= dict.fromkeys(names, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
        self.head = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def small_job(model: Callable[[], nn.Module] = Small) -> Job:
    rows = TensorDataset(torch.randn(16, 4, generator=torch.Generator().manual_seed(0)))
    return Job(model=model, data=rows, loss=lambda output, batch: output.pow(2).mean(), global_batch=4)
