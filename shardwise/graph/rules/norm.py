"""Normalisations: they keep every dim, and cannot split those they take statistics over."""

from __future__ import annotations

from shardwise.graph.dims import Size
from shardwise.graph.rules.context import OpContext
from shardwise.graph.rules.table import rules


@rules(["layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"])
def layer_norm(c: OpContext) -> None:
    x = c.inputs[0]
    count = len(c.arguments["normalized_shape"])
    for i in range(x.ndim - count):
        for out in c.outputs:
            c.broadcast(x, i, out, i)
    # The normalised positions stay one dim of the model, though this operator needs them whole.
    for back in range(1, count + 1):
        c.tie(x, -back, c.outputs[0], -back)
        c.block(x, -back)


@rules(["group_norm", "native_group_norm"])
def group_norm(c: OpContext) -> None:
    x, out = c.inputs[0], c.outputs[0]
    groups = Size(int(c.arguments.get("num_groups", c.arguments.get("group", 1))))
    c.tie(x, 0, out, 0)
    if len(c.outputs) > 1:
        return
    parts = c.parts(x, 1, groups)
    if not parts:
        return
    c.tie(x, 1, out, 1)
    for name in ("weight", "bias"):
        if w := c.tensor(name):
            c.tie(w, 0, x, 1)
    c.special(x, 1, "group_norm")
    c.only_major(x, 1, groups)


@rules(["instance_norm"])
def instance_norm(c: OpContext) -> None:
    """Every channel of every sample by itself; with statistics that are kept, over all samples."""
    x, out = c.inputs[0], c.out
    if c.tensor("running_mean") is None:
        c.tie(x, 0, out, 0)
    c.tie(x, 1, out, 1)
    for other in c.inputs[1:]:
        c.tie(x, 1, other, 0)
    c.hint(x, 1, "channels")


@rules(["_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training", "batch_norm",
        "_native_batch_norm_legit"])  # fmt: skip
def batch_norm(c: OpContext) -> None:
    x, out = c.inputs[0], c.outputs[0]
    c.tie(x, 1, out, 1)
    for other in [*c.inputs[1:], *c.outputs[1:]]:
        if other.ndim == 1 and other.size(0) == x.size(1):
            c.tie(x, 1, other, 0)
    c.tie(x, 0, out, 0)
    # Of statistics torch has no derivative.
    c.constant.update(o.slot for o in c.outputs[1:])
    training = bool(c.arguments.get("training", c.node_name() != "aten._native_batch_norm_legit_no_training"))
    if training:
        c.special(x, 0, "batch_norm")
    else:
        c.independent.update(o.slot for o in c.outputs[1:])
    c.hint(x, 1, "channels")
