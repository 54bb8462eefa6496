"""Rows of tables of published runs as models, clusters and plans, and what the plans cost.

Each row's model is built from transformers' configuration classes without its weights and captured. Nothing is fitted
here; what the tables do not say of a framework and its papers do is written where it is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch.utils.data import Dataset

from benchmarks.published.score import EIGHT
from shardwise.cost.estimate import Estimate
from shardwise.cost.pricer import Pricer
from shardwise.cost.profile import PROFILES, Besides, Profile
from shardwise.graph.blocks import blocks
from shardwise.graph.graph import Graph, Op
from shardwise.graph.rules import Value
from shardwise.job import Job
from shardwise.machine.cluster import Cluster
from shardwise.machine.device import Device, device, known_devices
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
    dropout: float = 0.1


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
    if shape.family != "gpt":
        family = shape.family.title()
        sizes, model = getattr(t, f"{family}Config"), getattr(t, f"{family}ForCausalLM")
        config = sizes(
            hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, intermediate_size=shape.ffn, max_position_embeddings=shape.length,
            tie_word_embeddings=shape.tied, **common,
        )  # fmt: skip
        return model(config).to(torch.bfloat16)
    config = t.GPT2Config(
        n_embd=shape.hidden, n_layer=shape.layers, n_head=shape.heads, n_inner=shape.ffn, n_positions=shape.length,
        tie_word_embeddings=True, resid_pdrop=shape.dropout, embd_pdrop=shape.dropout, attn_pdrop=shape.dropout,
        **common,
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
    if shape.family != "gpt":
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


HEADS = {"bloom": 32}
"""Heads where a table names none: of its models 14,400 wide the source's own scripts have 32."""


def shape_of(row: Mapping[str, str]) -> Shape:
    """The model of a row.

    Raises:
        ValueError: it is none of the kinds that are built here.
    """
    name = row["model"]
    if number(row, "ep") or re.search(r"mixtral|moe|grok", name, re.I):
        raise ValueError("experts")
    hidden = int(number(row, "hidden"))
    layers = int(number(row, "layers")) or (int(number(row, "params_B") * 1e9 / (12 * hidden**2)) if hidden else 0)
    if not hidden or not layers:
        raise ValueError("no sizes of the model")
    gated = re.search(r"llama|internlm|mistral", name, re.I) is not None
    family = "llama" if gated else "nemotron" if "nemotron" in name.lower() else "gpt"
    heads = int(number(row, "heads")) or HEADS.get(row["table"]) or max(1, hidden // 128)
    kv_heads, ffn = int(number(row, "kv_heads")) or heads, int(number(row, "ffn")) or 4 * hidden
    padded = re.search(r"\((\d+)", row.get("vocab") or "")
    vocab = int(padded.group(1)) if padded else int(number(row, "vocab")) or 51200
    # A head of its own shows in the number of parameters.
    size, each = number(row, "params_B") * 1e9, (2 + 2 * kv_heads / heads) * hidden**2 + 3 * hidden * ffn
    rest = size - layers * each
    tied = family == "gpt" or (gated and size > 0 and abs(rest - vocab * hidden) < abs(rest - 2 * vocab * hidden))
    length = int(number(row, "seq_len")) or 2048
    # MPT trains without dropout, as its configuration's defaults say.
    dropout = 0.0 if row["table"] == "foundry" else Shape.dropout
    return Shape(family, layers, hidden, heads, kv_heads, ffn, vocab, length, tied, dropout)


def cluster_of(row: Mapping[str, str]) -> str:
    """The cluster of a row, by name."""
    device, net = device_of(row["accelerator"]), (row.get("interconnect") or "").lower()
    ranks = int(number(row, "n_gpus"))
    each = min(ranks, int(number(row, "gpus_per_node", device.node.value)))
    names = (
        ("efa", "aws-efa"),
        ("omni", "omni-path"),
        ("4x100gb/s roce", "roce-50"),
        ("1600gb/s roce", "roce-200"),
        ("800gb/s", "ib-hdr-4"),
        ("400gb/s per node", "roce-50"),
    )
    network = next((f"+{name}" for key, name in names if key in net), "")
    if row["table"] == "torchtitan" and not net:
        # The source does not say; the launch script in its repository is for AWS, whose A100s have EFA.
        network = "+aws-efa-400"
    return f"{math.ceil(ranks / each)}x{each}x{device.name}{network}"


def device_of(accelerator: str) -> Device:
    """The shipped device that an accelerator's name means.

    Raises:
        ValueError: there is none.
    """
    words = set(re.findall(r"[a-z0-9]+", accelerator.lower().replace("a800", "a100")))  # an A100 with fewer links
    parts = {name: name.split("-") for name in known_devices()}
    # Of those of this model that with the most words in common, of these the plainest, of these the largest.
    models = {name: next(p for p in (*those, "") if not p.isalpha()) for name, those in parts.items()}
    shared = {name: len(words & set(parts[name])) for name, model in models.items() if model in words}
    if not shared:
        raise ValueError(f"accelerator {accelerator}")
    return device(max(shared, key=lambda name: (shared[name], -name.count("-"), name)))


FRAMEWORKS = {
    "ultrascale": "nanotron", "bloom": "deepspeed", "torchtitan": "torchtitan", "fms": "torchtitan", "foundry": "fsdp",
    "dgxc": "megatron-core", "bridge": "megatron-core", "internevo": "internevo",
}  # fmt: skip
"""The profile of each table's framework; those that are not named are of Megatron-LM before it had fused attention."""


COMPILED = 1.2
"""How many times as long as their bytes ask for operators take that a compiler has fused, as Megatron-LM's do."""


def profile_of(row: Mapping[str, str]) -> Profile:
    """The framework of a row."""
    if "deepspeed" in (row.get("zero_fsdp") or "").lower():
        return PROFILES["deepspeed"]
    found = PROFILES[FRAMEWORKS.get(row["table"], "megatron")]
    if (row.get("compile") or "").lower() == "yes":
        found = replace(found, fused="all", passes=COMPILED)
    if row["table"] == "fms":
        found = replace(found, send_gradient=2)  # all that is sent is bf16
    # Its optimizer for fp16 has gradients in fp16 too, and no sum of them in fp32.
    return replace(found, gradient=2) if found.name == "deepspeed" and row["precision"] == "fp16" else found


def zero_of(row: Mapping[str, str]) -> int:
    """The ZeRO stage of a row."""
    text = (row.get("zero_fsdp") or "").lower()
    found = re.search(r"zero-(\d)", text)
    if "grad_op" in text:
        return 2
    if "full" in text or "fsdp" in text or "hsdp" in text:
        return 3
    return int(found.group(1)) if found else 1 if "distributed optimizer" in text else 0


def recompute_of(row: Mapping[str, str], shape: Shape, graph: Graph) -> tuple[tuple[str, ...], str]:
    """Patterns of the blocks that are computed again, and what is selective about it.

    What fms and torchtitan call selective computes every second layer again, or of each layer every second product;
    Megatron-LM's is attention's scores.
    """
    text = (row.get("recompute") or "").lower()
    if text.startswith(("full", "always")):
        return layer_patterns(graph), ""
    if not text.startswith("selective"):
        return (), ""
    if row["table"] == "fms" or "layer" in text:
        return tuple(f"model.layers.{i}" for i in range(0, shape.layers, 2)), ""
    return (layer_patterns(graph), "products") if row["table"] == "torchtitan" else ((), "attention")


SCHEDULES = {"1F1B": "1f1b", "1F1B-I": "interleaved", "ZB-1p": "zero-bubble", "ZB-2p": "zero-bubble"}
"""Schedules as tables name them, and as plans do."""


def shards_of(row: Mapping[str, str]) -> int:
    """How many ranks share what ZeRO shards; 0 for all that split the batch."""
    text = (row.get("zero_fsdp") or "").lower()
    found = re.search(r"group=(\d+)", text)
    # Hybrid sharding is within a node.
    return int(found.group(1)) if found else int(number(row, "gpus_per_node", 8)) if "hsdp" in text else 0


def spread_of(row: Mapping[str, str]) -> int:
    """Over how many times as many ranks as split the batch ZeRO shards: torchtitan's and Megatron Core's do over a
    context axis too.
    """
    both = zero_of(row) and row["table"] in ("torchtitan", "dgxc", "bridge")
    return max(1, int(number(row, "cp", 1))) if both else 1


def ahead_of(row: Mapping[str, str]) -> int:
    """How many times as many micro-batches as ranks a zero-bubble schedule holds, which its name says."""
    found = re.search(r"schedule ZB-(\d)p", row.get("notes") or "")
    return int(found.group(1)) if found else 1


def runs(row: Mapping[str, str]) -> bool:
    """Whether the row's framework takes its plan: nanotron asserts micro-batches for all stages but one."""
    return row["table"] != "ultrascale" or number(row, "grad_accum", 1) >= number(row, "pp", 1) - 1


def plan_of(row: Mapping[str, str], shape: Shape, graph: Graph) -> Plan:
    """The plan of a row.

    Raises:
        ValueError: it cannot be written as a plan.
    """
    tp, pp, dp, cp = (max(1, int(number(row, key, 1))) for key in ("tp", "pp", "dp", "cp"))
    micro = int(number(row, "micro_batch")) or 1
    micros = int(number(row, "grad_accum")) or max(1, int(number(row, "global_batch")) // (dp * micro))
    axes = []
    if pp > 1:
        axes.append(PlanAxis(PIPELINE, pp))
    if dp > 1:
        axes.append(PlanAxis("data", dp, ("batch",)))
    if cp > 1:
        axes.append(PlanAxis("context", cp, ("sequence",)))
    if tp > 1:
        dims = tensor_dims(shape)
        # Megatron-LM has it on in all its published settings since Korthikanti et al. (2022).
        sequence = (row.get("sequence_parallel") or "").lower().startswith("yes") or row["table"] == "dgxc"
        axes.append(PlanAxis("tensor", tp, (*dims, "sequence") if sequence else dims))
    patterns, _ = recompute_of(row, shape, graph)
    schedule = re.search(r"schedule (\S+?);", row.get("notes") or "")
    if schedule and schedule.group(1) not in SCHEDULES:
        raise ValueError(f"schedule {schedule.group(1)}")
    most = "max" in (row.get("vpp") or "")
    chunks = pp * (math.ceil((shape.layers + 2) / pp) if most else max(1, int(number(row, "vpp", 1))))
    if row["table"] == "ultrascale":
        at = costed_cuts(graph, chunks)
    else:
        # Zero Bubble and Llama's runs leave a layer out of the first and of the last stage, for embedding and head.
        at = cuts(graph, chunks, ends=(shape.layers + 2) % pp == 0 and shape.layers % pp != 0)
    name = SCHEDULES[schedule.group(1)] if schedule else "interleaved" if chunks > pp else "1f1b"
    return Plan(
        tuple(axes), at, micro_batches=micros, schedule=name, zero=zero_of(row) if dp > 1 else 0, recompute=patterns,
    )  # fmt: skip


@cache
def cuts(graph: Graph, stages: int, *, ends: bool = False) -> tuple[str, ...]:
    """The operators at which stages of equally many layers begin.

    Args:
        ends: whether embedding and head count as a layer each.

    Raises:
        ValueError: more stages than layers.
    """
    if stages == 1:
        return ()
    block = max(blocks(graph), key=lambda b: b.count)
    more = 2 * ends
    if block.count + more < stages:
        raise ValueError(f"{block.count} layers make no {stages} stages")
    starts = [round(k * (block.count + more) / stages) - ends for k in range(1, stages)]
    return tuple(graph.ops[block.start + s * block.length].id for s in starts)


@cache
def costed_cuts(graph: Graph, stages: int) -> tuple[str, ...]:
    """The operators at which stages begin as nanotron cuts: it goes on to the next stage behind the unit that reaches
    the stage's share of all weights in layers and head; embedding, norm and loss are units without cost. Its source
    goes on behind what exceeds the share; where a unit just reaches it, times and memory on 8 devices say it does too.

    Raises:
        ValueError: more stages than units.
    """
    block = max(blocks(graph), key=lambda b: b.count)
    behind = block.start + block.count * block.length
    layer = graph.ops[block.start : block.start + block.length]
    each = sum(v.numel().at(1) for v in {v for op in layer for v in learned(graph, op)} if v.ndim == 2)
    head = next((op for op in graph.ops[behind:] if any(v.ndim == 2 for v in learned(graph, op))), None)
    if head is None:
        raise ValueError("no head of two dims behind the layers")
    units = [(0, 0.0), *((block.start + k * block.length, each) for k in range(block.count)), (behind, 0.0)]
    units += [(head.index, learned(graph, head)[0].numel().at(1)), (head.index + 1, 0.0)]
    whole, done, found = sum(cost for _, cost in units), 0.0, [0]
    for (_, cost), (following, _) in pairwise(units):
        done += cost
        if len(found) < stages and done >= whole * len(found) / stages:
            found.append(following)
    if len(found) < stages:
        raise ValueError(f"{block.count} layers make no {stages} stages")
    return tuple(graph.ops[start].id for start in found[1:])


def learned(graph: Graph, op: Op) -> list[Value]:
    """The parameters that an operator reads."""
    names = {v: n for n, v in graph.params.items()}
    return [v for v in op.inputs if v in names]


OTHER = re.compile(r"fp4|int8|mxfp8|fp8-mx", re.I)
"""Precisions that are not priced: of 4 bits, or with a scale for each block."""


def price(row: Mapping[str, str]) -> Estimate:
    """What a row's plan costs.

    Raises:
        ValueError: the row is not one that can be priced; the text says why.
    """
    precision = row.get("precision") or ""
    if OTHER.search(precision) or "lora" in row["config_id"].lower():
        raise ValueError("numbers of 4 bits or scaled by block, or adapters alone are trained")
    shape = shape_of(row)
    graph = graph_of(shape)
    plan = plan_of(row, shape, graph)
    micro = int(number(row, "micro_batch")) or 1
    batch = micro * plan.micro_batches * math.prod(a.size for a in plan.axes if a.dims == ("batch",))
    selective, eight = recompute_of(row, shape, graph)[1], EIGHT.search(precision) is not None
    besides = Besides(selective, shards_of(row), spread_of(row), eight, ahead_of(row), zero_of(row))
    pricer, cluster = pricer_of(shape, profile_of(row)), Cluster.load(cluster_of(row))
    found = pricer.price(plan, cluster, batch, besides=besides)
    if plan.zero == 3 and not found.fits and not (row.get("recompute") or row.get("status")):
        # The source says nothing of recompute, and lists only what ran; fully sharded runs of it recompute.
        return pricer.price(plan.with_(recompute=layer_patterns(graph)), cluster, batch, besides=besides)
    return found
