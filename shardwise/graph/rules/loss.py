"""Losses, in the form capture leaves them in: a sum over samples, or none; never a mean."""

from __future__ import annotations

from shardwise.graph.rules.context import OpContext
from shardwise.graph.rules.table import rules


@rules(["cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d"])
def cross_entropy(c: OpContext) -> None:
    logits, target = c.inputs[0], c.inputs[1]
    reduction = int(c.arguments.get("reduction", 1))
    classes = 0 if logits.ndim == 1 else 1
    if target.ndim == logits.ndim:
        c.same(logits, target)
        kept = {i: i if i < classes else i - 1 for i in range(logits.ndim) if i != classes}
    else:
        kept = {i: i if i < classes else i - 1 for i in range(logits.ndim) if i != classes}
        for i, j in kept.items():
            c.tie(logits, i, target, j)
        plain = c.tensor("weight") is None and not c.arguments.get("label_smoothing")
        if plain and reduction == 2 and logits.ndim == 2 and c.node_name() == "aten.cross_entropy_loss":
            c.special(logits, classes, "classes")
    for i, j in kept.items():
        if reduction == 0:
            c.tie(logits, i, c.out, j)
        else:
            c.sum_over(logits, i)
    c.hint(logits, classes, "classes")


@rules(["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "kl_div", "soft_margin_loss",
        "binary_cross_entropy_with_logits"])  # fmt: skip
def elementwise_loss(c: OpContext) -> None:
    x, target = c.inputs[0], c.inputs[1]
    if int(c.arguments.get("reduction", 1)) == 0:
        c.elementwise(c.inputs)
        return
    c.same(x, target)
    for other in c.inputs[2:]:
        c.elementwise([other], x)
    for i in range(x.ndim):
        c.sum_over(x, i)
