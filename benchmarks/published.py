"""Prices the plans of published runs: `python -m benchmarks.published TABLE.csv --out PREDICTED.csv`.

Each row's model is built from transformers' configuration classes without its weights, captured, and priced with the
row's plan on the row's cluster. Nothing is fitted here.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch.utils.data import Dataset

from shardwise.cost.estimate import Estimate
from shardwise.cost.pricer import Pricer
from shardwise.cost.profile import PROFILES, Profile
from shardwise.errors import ShardwiseError
from shardwise.graph.blocks import blocks
from shardwise.graph.graph import Graph, Op
from shardwise.graph.rules import Value
from shardwise.job import Job
from shardwise.machine.cluster import Cluster
from shardwise.plan.plan import PIPELINE, Plan, PlanAxis
from shardwise.search.space import layer_patterns

GIB = 2**30


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Sequences of one length; nothing is learned from them."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return 10**7

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.zeros(self.length, dtype=torch.long)
        return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Shape:
    """A decoder-only language model, as tables describe it."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    length: int
    tied: bool


def job(shape: Shape, batch: int = 8) -> Job:
    """A job of this shape in bf16."""
    return Job(
        model=lambda: _model(shape), data=Tokens(shape.length), optimizer=torch.optim.AdamW, global_batch=batch,
        name=f"{shape.family}-{shape.layers}x{shape.hidden}",
    )  # fmt: skip


def _model(shape: Shape) -> torch.nn.Module:
    import transformers as t
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    # Attention that is causal by itself, as fused attention is, in place of a mask of every pair.
    AttentionInterface.register("causal", _causal)
    AttentionMaskInterface.register("causal", lambda *args, **kwargs: None)
    common: dict[str, Any] = {"vocab_size": shape.vocab, "use_cache": False, "attn_implementation": "causal"}
    if shape.family == "llama":
        config = t.LlamaConfig(
            hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, intermediate_size=shape.ffn, max_position_embeddings=shape.length,
            tie_word_embeddings=shape.tied, **common,
        )  # fmt: skip
        return t.LlamaForCausalLM(config).to(torch.bfloat16)
    config = t.GPT2Config(
        n_embd=shape.hidden, n_layer=shape.layers, n_head=shape.heads, n_inner=shape.ffn, n_positions=shape.length,
        tie_word_embeddings=True, **common,
    )  # fmt: skip
    return t.GPT2LMHeadModel(config).to(torch.bfloat16)


def _causal(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    groups = query.shape[1] != key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=options.get("scaling"), enable_gqa=groups
    )
    return out.transpose(1, 2).contiguous(), None


@cache
def graph_of(shape: Shape) -> Graph:
    """The captured graph of a shape."""
    return Graph.of(job(shape))


def tensor_dims(shape: Shape) -> tuple[str, ...]:
    """The dims that Megatron-LM splits over a tensor axis (Shoeybi et al., 2019), as those frameworks do."""
    if shape.family == "llama":
        heads, width, words = "model.layers.*.self_attn", "model.layers.*.mlp", "model.embed_tokens"
    else:
        heads, width, words = "transformer.h.*.attn", "transformer.h.*.mlp", "transformer.wte"
    own = () if shape.tied else ("classes@lm_head",)
    return (f"vocabulary@{words}", f"heads@{heads}", f"width@{width}", *own)


@cache
def pricer_of(shape: Shape, profile: Profile) -> Pricer:
    """What prices plans of a shape."""
    return Pricer(graph_of(shape), profile)


def number(row: Mapping[str, str], key: str, default: float = 0.0) -> float:
    """A number of a row, or the default."""
    text = (row.get(key) or "").strip()
    found = re.search(r"[\d.]+(?:e[+-]?\d+)?", text)
    return float(found.group()) if found else default


def shape_of(row: Mapping[str, str]) -> Shape:
    """The model of a row."""
    llama = re.search(r"llama|internlm|mistral|mixtral", row["model"], re.I) is not None
    hidden, heads = int(number(row, "hidden")), int(number(row, "heads"))
    heads = heads or max(1, hidden // 128)
    vocab_text = row.get("vocab") or ""
    padded = re.search(r"\((\d+)", vocab_text)
    vocab = int(padded.group(1)) if padded else int(number(row, "vocab", 51200))
    layers = int(number(row, "layers")) or int(number(row, "params_B") * 1e9 / (12 * hidden**2))
    family = "llama" if llama else "gpt"
    size = number(row, "params_B")
    ffn = int(number(row, "ffn")) or 4 * hidden
    # A head of its own shows in the number of parameters.
    each = (2 + 2 * (number(row, "kv_heads", heads) / heads)) * hidden**2 + 3 * hidden * ffn
    tied = family == "gpt" or abs(layers * each + vocab * hidden - size * 1e9) < abs(
        layers * each + 2 * vocab * hidden - size * 1e9
    )
    return Shape(
        family, layers, hidden, heads, int(number(row, "kv_heads", heads)), ffn, vocab,
        int(number(row, "seq_len", 2048)), tied,
    )  # fmt: skip


def cluster_of(row: Mapping[str, str]) -> str:
    """The cluster of a row, by name."""
    text, net = row["accelerator"].lower(), (row.get("interconnect") or "").lower()
    known = {"h100": "h100-sxm", "h200": "h200", "gb200": "gb200", "b200": "b200", "v100": "v100-32gb", "p40": "p40"}
    device = next((name for key, name in sorted(known.items(), key=lambda k: -len(k[0])) if key in text), None)
    if device is None:
        device = "a100-40gb" if "40gb" in text else "a100-80gb"
    ranks = int(number(row, "n_gpus"))
    each = min(ranks, int(number(row, "gpus_per_node", 72 if device == "gb200" else 8)))
    names = (("efa", "aws-efa"), ("omni", "omni-path"), ("4x100gb/s roce", "roce-50"), ("1600gb/s roce", "roce-200"))
    network = next((f"+{name}" for key, name in names if key in net), "")
    return f"{math.ceil(ranks / each)}x{each}x{device}{network}"


def profile_of(row: Mapping[str, str]) -> Profile:
    """The framework of a row."""
    table = row["table"]
    name = {"ultrascale": "nanotron", "torchtitan": "torchtitan", "fms": "fsdp", "foundry": "fsdp"}.get(
        table, "megatron"
    )
    return PROFILES[name]


def zero_of(row: Mapping[str, str]) -> int:
    """The ZeRO stage of a row."""
    text = (row.get("zero_fsdp") or "").lower()
    found = re.search(r"zero-(\d)", text)
    if "full" in text or "fsdp" in text:
        return 3
    if "grad_op" in text:
        return 2
    return int(found.group(1)) if found else 1 if "distributed optimizer" in text else 0


def plan_of(row: Mapping[str, str], shape: Shape, graph: Graph) -> Plan:
    """The plan of a row."""
    tp, pp, dp = (max(1, int(number(row, key, 1))) for key in ("tp", "pp", "dp"))
    chunks = pp * max(1, int(number(row, "vpp", 1)))
    micros = int(number(row, "grad_accum")) or max(
        1, int(number(row, "global_batch")) // (dp * int(number(row, "micro_batch", 1)))
    )
    axes = []
    if pp > 1:
        axes.append(PlanAxis(PIPELINE, pp))
    if dp > 1:
        axes.append(PlanAxis("data", dp, ("batch",)))
    if tp > 1:
        dims = tensor_dims(shape)
        sequence = (row.get("sequence_parallel") or "").lower().startswith("yes")
        axes.append(PlanAxis("tensor", tp, (*dims, "sequence") if sequence else dims))
    recompute = layer_patterns(graph) if (row.get("recompute") or "").lower().startswith(("full", "always")) else ()
    at = costed_cuts(graph, chunks) if row["table"] == "ultrascale" else cuts(graph, chunks)
    return Plan(
        tuple(axes), at, micro_batches=micros, schedule="interleaved" if chunks > pp else "1f1b",
        zero=zero_of(row) if dp > 1 else 0, recompute=recompute,
    )  # fmt: skip


@cache
def cuts(graph: Graph, stages: int) -> tuple[str, ...]:
    """The operators at which stages of equally many layers begin.

    Raises:
        ValueError: more stages than layers.
    """
    if stages == 1:
        return ()
    block = max(blocks(graph), key=lambda b: b.count)
    if block.count < stages:
        raise ValueError(f"{block.count} layers make no {stages} stages")
    starts = [round(k * block.count / stages) for k in range(1, stages)]
    return tuple(graph.ops[block.start + s * block.length].id for s in starts)


@cache
def costed_cuts(graph: Graph, stages: int) -> tuple[str, ...]:
    """The operators at which stages begin as nanotron cuts: it goes on to the next stage behind the unit that exceeds
    the stage's share of all weights in layers and head; embedding, norm and loss are units without cost.

    Raises:
        ValueError: more stages than units.
    """
    block = max(blocks(graph), key=lambda b: b.count)
    behind = block.start + block.count * block.length
    layer = graph.ops[block.start : block.start + block.length]
    each = sum(v.numel().at(1) for v in {v for op in layer for v in learned(graph, op)} if v.ndim == 2)
    head = next(op for op in graph.ops[behind:] if any(v.ndim == 2 for v in learned(graph, op)))
    units = [(0, 0.0), *((block.start + k * block.length, each) for k in range(block.count)), (behind, 0.0)]
    units += [(head.index, learned(graph, head)[0].numel().at(1)), (head.index + 1, 0.0)]
    whole, done, found = sum(cost for _, cost in units), 0.0, [0]
    for (_, cost), (following, _) in pairwise(units):
        done += cost
        if len(found) < stages and done > whole * len(found) / stages:
            found.append(following)
    if len(found) < stages:
        raise ValueError(f"{block.count} layers make no {stages} stages")
    return tuple(graph.ops[start].id for start in found[1:])


def learned(graph: Graph, op: Op) -> list[Value]:
    """The parameters that an operator reads."""
    names = {v: n for n, v in graph.params.items()}
    return [v for v in op.inputs if v in names]


def price(row: Mapping[str, str]) -> Estimate:
    """What a row's plan costs."""
    shape = shape_of(row)
    graph = graph_of(shape)
    plan = plan_of(row, shape, graph)
    micro = int(number(row, "micro_batch")) or 1
    batch = micro * plan.micro_batches * math.prod(a.size for a in plan.axes if a.dims == ("batch",))
    selective = (row.get("recompute") or "").lower().startswith("selective")
    cluster = Cluster.load(cluster_of(row))
    return pricer_of(shape, profile_of(row)).price(plan, cluster, batch, selective=selective)


def main() -> int:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description="Price the plans of published runs.")
    parser.add_argument("table")
    parser.add_argument("--out", required=True)
    parser.add_argument("--terms", action="store_true", help="a column for each item")
    arguments = parser.parse_args()
    with open(arguments.table, newline="") as file:
        rows = list(csv.DictReader(file))
    began, refused = time.monotonic(), {}
    found: list[dict[str, Any]] = []
    for row in rows:
        try:
            cost = price(row)
        except (ShardwiseError, ValueError, KeyError, ZeroDivisionError) as error:
            refused.setdefault(f"{type(error).__name__}: {error}", []).append(row["config_id"])
            continue
        line = {
            "config_id": row["config_id"], "step_time_s": f"{cost.step:.5g}", "peak_mem_GiB": f"{cost.peak / GIB:.4g}",
            "fits": int(cost.fits),
        }  # fmt: skip
        if arguments.terms:
            line |= {k: f"{v:.4g}" for k, v in cost.seconds.items()}
            line |= {f"{k} GiB": f"{v / GIB:.4g}" for k, v in cost.memory.items()}
        found.append(line)
    columns = list(dict.fromkeys(key for line in found for key in line))
    with open(arguments.out, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="0")
        writer.writeheader()
        writer.writerows(found)
    print(f"{len(found)} of {len(rows)} rows priced in {time.monotonic() - began:.0f} s; {arguments.out}")
    for reason, those in refused.items():
        print(f"  {len(those)} not priced ({those[0]} ...): {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
