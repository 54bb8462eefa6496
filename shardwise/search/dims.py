"""Which dims a tensor axis should split: those that lower the price of a step, found one group at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from shardwise.graph.blocks import twins
from shardwise.graph.dims import BATCH, Dim
from shardwise.graph.graph import Graph

SEQUENCE, EXPERTS = "sequence", "experts"
_NUMBER = re.compile(r"(?<=\.)\d+(?=[.#]|$)")


def groups(graph: Graph, parts: int, first: Mapping[Dim, Dim] | None = None) -> list[tuple[str, ...]]:
    """The dims of parameters that `parts` divides, and those of sequences; those that layers have alike are one group.

    Dims are alike that have the same place in copies of one block, or names that differ in numbers alone. A group is a
    list of patterns, such as `heads@layers.*.attention`, where these match no other dim, else of names.

    Args:
        graph: the captured model.
        parts: into how many a dim is to be cut.
        first: the graph's `twins`, where they are known.
    """
    first = first if first is not None else twins(graph)
    fits: dict[str, bool] = {}
    alike: dict[str, dict[str, None]] = {}
    for op in graph.ops:
        if not any(v in graph.learned for v in op.outputs):
            continue
        for letter in op.letters:
            dim = letter.dim
            fits[dim.name] = dim.size != BATCH and dim.size.coefficient % parts == 0
            if fits[dim.name] and (dim.owners or dim.label == SEQUENCE):
                alike.setdefault(_NUMBER.sub("*", first[dim].name), {})[dim.name] = None
    return [_patterns(list(names), fits) for names in alike.values()]


def _patterns(names: Sequence[str], everything: Iterable[str]) -> tuple[str, ...]:
    """The shortest patterns that match these names and no others."""
    by_pattern: dict[str, list[str]] = {}
    for name in names:
        by_pattern.setdefault(_NUMBER.sub("*", name), []).append(name)
    found: list[str] = []
    for pattern, those in by_pattern.items():
        matched = [name for name in everything if fnmatchcase(name, pattern)]
        found += [pattern] if len(those) > 1 and set(matched) <= set(names) else those
    return tuple(found)


def choose_dims(
    candidates: Sequence[tuple[str, ...]], price: Callable[[tuple[str, ...]], Mapping[str, float]]
) -> tuple[str, ...]:
    """The groups that lower the price when they are added in turn, those first that send least for what they save.

    The order matters twice: an operator takes the first dim that it has, and a dim of the residual stream saves as much
    work as heads and feed-forward width together, but sends after every operator. What a later group made a loss is
    taken out again.
    """
    whole = price(())

    def worth(group: tuple[str, ...]) -> float:
        alone = price(group)
        saved = whole["compute"] - alone["compute"]
        sent = alone["communication"] - whole["communication"]
        return saved / sent if sent > 0 else math.inf if saved > 0 else 0.0

    def total(groups: tuple[tuple[str, ...], ...]) -> float:
        return sum(price(tuple(dim for group in groups for dim in group)).values())

    ordered = sorted(candidates, key=lambda g: (all(n.startswith(SEQUENCE) for n in g), -worth(g)))
    chosen: tuple[tuple[str, ...], ...] = ()
    best = sum(whole.values())
    for group in ordered:
        now = total((*chosen, group))
        if now < best:
            chosen, best = (*chosen, group), now
    while chosen:
        fewer = [tuple(g for g in chosen if g is not out) for out in chosen]
        now, cheapest = min((total(groups), groups) for groups in fewer)
        if now >= best:
            break
        chosen, best = cheapest, now
    return tuple(dim for group in chosen for dim in group)
