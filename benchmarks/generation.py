"""Generation: seconds per token of a model split over two ranks by tensor, against one rank with all of it.

    python -m benchmarks.generation [layers]

A model of the shape of SmolLM2-135M with random weights, one prompt, one thread for each rank. The two ways are run in
turn; printed are the medians of all tokens, and the ratio of each round. One rank runs transformers' own module with a
static cache; two run captured steps.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings

import torch
import torch.distributed as dist
from torch import nn

from shardwise.engine.launch import Ranks
from shardwise.inference.limits import Demand
from shardwise.inference.steps import build_steps
from shardwise.job import Job
from shardwise.machine.backend import Backend
from shardwise.parallel.mesh import Mesh
from shardwise.plan.plan import Plan, PlanAxis

PROMPT, TOKENS, ROUNDS = 32, 32, 3
TENSOR = Plan((PlanAxis("tensor", 2, ("heads*", "width@*.*", "vocab*")),))


def model(layers: int) -> nn.Module:
    """The shape has 9 heads, of which keys have 3: two ranks cut the MLPs and the vocabulary, and no heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    built: nn.Module = LlamaForCausalLM(config)
    return built


def seconds(layers: int, plan: Plan) -> list[float]:
    """Of each token behind a prompt, on this rank."""
    warnings.simplefilter("ignore")
    job = Job(model=lambda: model(layers), data=[], global_batch=1)  # type: ignore[arg-type]
    device = Backend.cpu().device(0)
    steps = build_steps(job, plan, Mesh.build(plan.axes), Demand(PROMPT + TOKENS, PROMPT, 49151), device)
    steps.begin(1)
    tokens = torch.arange(PROMPT).unsqueeze(0)
    found, at = [], 0
    for _ in range(TOKENS):
        dist.barrier()
        start = time.perf_counter()
        logits = steps.step(tokens, at)
        at += tokens.shape[1]
        chosen = logits.argmax(-1) if logits is not None else torch.empty(1, dtype=torch.int64)
        tokens = steps.agree(chosen).unsqueeze(1)
        found.append(time.perf_counter() - start)
    return found[1:]  # less the prompt


def main() -> None:
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    with Ranks(1, threads=1) as one, Ranks(2, threads=1) as two:
        alone, split = [], []
        for _ in range(ROUNDS):
            alone.append(statistics.median(one.run(seconds, layers, Plan())[0]))
            split.append(statistics.median(two.run(seconds, layers, TENSOR)[0]))
    ratios = [b / a for a, b in zip(alone, split, strict=True)]
    print(f"1 rank: {1e3 * statistics.median(alone):.1f} ms a token; 2 ranks by tensor: "
          f"{1e3 * statistics.median(split):.1f} ms; ratio {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f} over {ROUNDS} rounds)")  # fmt: skip


if __name__ == "__main__":
    main()
