"""Step: one step of a model that has a cache of keys and values, with the cache among what goes in and what comes out.

Where a model keeps its cache is found by what it offers, never by its name: transformers' interface of caches, or
buffers that its forward changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from shardwise.errors import JobError
from shardwise.graph.captured import Captured
from shardwise.graph.no_data import without_data
from shardwise.graph.output import Place

aten = torch.ops.aten
FIRST = 2
"""What goes into a step before its state: tokens [samples, length] and their positions [length]."""


@dataclass(frozen=True)
class StateTensor:
    """A tensor that each step reads and renews.

    Attributes:
        name: of a buffer of the model, or the path of the layer that it is of and a word.
        shape: with `samples` open, the first size stands for any number of samples.
        samples: whether the first dim is that of the samples.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    samples: bool


class Step(nn.Module):
    """A model as one step: tokens, positions and state in; the logits of the next tokens and the new state out.

    Outside of an export the state is written in place.

    Args:
        module: the model.
        state: its cache.
        longest: positions that the cache has; None where the model says it itself.
    """

    def __init__(self, module: nn.Module, state: Sequence[StateTensor], longest: int | None) -> None:
        super().__init__()
        self.module = module
        self.state = tuple(state)
        self.longest = longest

    @property
    def names(self) -> list[str]:
        return [each.name for each in self.state]

    @property
    def fixed(self) -> frozenset[int]:
        """Numbers of the tensors that go in whose first dim is not that of the samples."""
        return frozenset({1, *(FIRST + i for i, each in enumerate(self.state) if not each.samples)})

    def examples(self, samples: int, length: int) -> tuple[Tensor, ...]:
        """Tensors of the shapes that go in."""
        state = [torch.zeros(self._shape(each, samples), dtype=each.dtype) for each in self.state]
        return torch.zeros((samples, length), dtype=torch.int64), torch.arange(length), *state

    def start(self, samples: int) -> list[Tensor]:
        """The state before the first step, for so many samples."""
        return [torch.zeros(self._shape(each, samples), dtype=each.dtype) for each in self.state]

    def _shape(self, each: StateTensor, samples: int) -> tuple[int, ...]:
        return (samples, *each.shape[1:]) if each.samples else each.shape

    def forward(self, tokens: Tensor, positions: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        # An exported graph has no names for changes of what goes in. What is copied here is not in the end.
        own = [each.clone() for each in state] if torch.compiler.is_exporting() else list(state)
        logits, new = self._run(tokens, positions, own)
        return logits[:, -1] if logits.ndim == 3 else logits, *new

    def _run(self, tokens: Tensor, positions: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        raise NotImplementedError


class _BufferStep(Step):
    """A model called with tokens and positions whose cache is in its buffers."""

    def start(self, samples: int) -> list[Tensor]:
        buffers = dict(self.module.named_buffers())
        return [buffers[e.name][: samples if e.samples else None].detach().clone() for e in self.state]

    def _run(self, tokens: Tensor, positions: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        with _in_place_of_buffers(self.module, dict(zip(self.names, state, strict=True))) as owners:
            logits = _logits(self.module(tokens, positions))
            # A buffer may have been written to, or another tensor put in its place.
            new = [_buffer(*owners[n]) if n in owners else s for n, s in zip(self.names, state, strict=True)]
        return logits, new


@contextmanager
def _in_place_of_buffers(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[dict[str, tuple[nn.Module, str]]]:
    """Gives a module other buffers meanwhile; yields who has each. A short model has not all of them."""
    parts = dict(module.named_modules())
    owners = {}
    for name in tensors:
        path, _, last = name.rpartition(".")
        if path in parts and last in parts[path]._buffers:
            owners[name] = parts[path], last
    before = {name: part._buffers[last] for name, (part, last) in owners.items()}
    for name, (part, last) in owners.items():
        part._buffers[last] = tensors[name]
    try:
        yield owners
    finally:
        for name, (part, last) in owners.items():
            part._buffers[last] = before[name]


def _buffer(module: nn.Module, name: str) -> Tensor:
    found = module._buffers[name]
    assert found is not None
    return found


class _CacheStep(Step):
    """A model with transformers' interface: `forward` takes `past_key_values`, a cache with a layer for each of its."""

    def _run(self, tokens: Tensor, positions: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        cache = _cache(self.module, self.longest or 0, positions)
        owned = [layer for layer in cache.layers if hasattr(layer, "positions")]
        for layer, keys, values in zip(owned, state[::2], state[1::2], strict=True):
            layer.fill(keys, values)
        some = {"logits_to_keep": 1} if "logits_to_keep" in _arguments(self.module) else {}
        found = _logits(self.module(input_ids=tokens, past_key_values=cache, use_cache=True, **some))
        return found, [x for layer in owned for x in (layer.keys, layer.values)]


def step_of(module: nn.Module, samples: int, longest: int) -> Step:
    """A model as one step.

    Args:
        module: whole, or without data in its parameters.
        samples: the most that go in at once; a model with buffers has its cache for so many.
        longest: positions that a cache that is made here has.

    Raises:
        JobError: it has no cache, or none that is known here.
    """
    if "past_key_values" in _arguments(module) and hasattr(module, "config"):
        _check_positions(module, longest)
        return _CacheStep(module, _layers(module, samples, longest), longest)
    return _BufferStep(module, _changed(module, samples), None)


# -- buffers -----------------------------------------------------------------------------------------------------------


def _changed(module: nn.Module, samples: int) -> list[StateTensor]:
    """The buffers that a step changes."""
    name = type(module).__name__
    what = (
        f"{name} keeps no cache to generate with: its forward takes no past_key_values (transformers' interface), and "
        "no buffer changes when it is called with tokens [samples, length] and positions [length]"
    )
    takes = [p for p in inspect.signature(module.forward).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    if len(takes) < 2 or not list(module.named_buffers()):
        raise JobError(f"{what}; write its keys and values to buffers, or predict with it")
    try:
        found = _tried(module, samples, larger=False)
    except Exception as error:
        told = next(iter(str(error).splitlines()), "")[:300]
        raise JobError(
            f"{name} does not run on {samples} samples (global_batch) of one token and its position: "
            f"{type(error).__name__}: {told}; a cache in buffers has global_batch samples as its first dim"
        ) from error
    if not found:
        raise JobError(f"{what}; write its keys and values to buffers, or predict with it")
    try:
        several = _tried(module, samples, larger=True)
    except Exception:  # its cache is for so many samples and no others
        several = []
    every = {each.name for each in several if each.samples}
    return [replace(each, samples=each.name in every) for each in found]


def _tried(module: nn.Module, samples: int, *, larger: bool) -> list[StateTensor]:
    """The buffers that change when a model without data is run, with its samples or with one more of them."""
    bare, mode = without_data(module)
    more = samples + larger
    with mode, torch.no_grad():
        buffers = {name: torch.empty_like(b, device="cpu") for name, b in bare.named_buffers()}
        first = {name for name, b in buffers.items() if b.ndim and b.shape[0] == samples}
        used = {name: b.new_empty((more, *b.shape[1:])) if name in first else b for name, b in buffers.items()}
        versions = {name: b._version for name, b in used.items()}
        with _in_place_of_buffers(bare, used) as owners:
            bare(torch.zeros((more, 1), dtype=torch.int64), torch.arange(1))
            after = {name: _buffer(*owner) for name, owner in owners.items()}
    names = [name for name, b in after.items() if b is not used[name] or b._version != versions[name]]
    return [StateTensor(n, tuple(used[n].shape), used[n].dtype, n in first) for n in names]


# -- transformers' interface of caches ---------------------------------------------------------------------------------


def _cache(module: nn.Module, longest: int, positions: Tensor) -> Any:
    """A cache of fixed length whose layers write at `positions`.

    Raises:
        JobError: the model has layers of a kind whose state is not keys and values alone.
    """
    from transformers import cache_utils

    from shardwise.graph.kept_layer import KeptLayer

    model: Any = module
    layers: list[Any] = []
    known = (cache_utils.StaticLayer, cache_utils.StaticSlidingWindowLayer)
    for layer in cache_utils.StaticCache(config=model.config, max_cache_len=longest).layers:
        if isinstance(layer, cache_utils.DummyLayer):
            layers.append(layer)
        elif type(layer) in known:
            layers.append(KeptLayer(longest, positions))
        else:
            raise JobError(
                f"{type(module).__name__} has a cache of {type(layer).__name__}, whose state is more than keys and "
                "values at positions; only StaticLayer and StaticSlidingWindowLayer can be split"
            )
    return cache_utils.Cache(layers=layers)


def _layers(module: nn.Module, samples: int, longest: int) -> list[StateTensor]:
    """The keys and values that a step writes, found by running it without data."""
    bare, mode = without_data(module)
    samples = max(samples, 2)
    with mode, torch.no_grad():
        positions = torch.arange(1)
        cache = _cache(bare, longest, positions)
        bare(input_ids=torch.zeros((samples, 1), dtype=torch.int64), past_key_values=cache, use_cache=True)
    owned = [(i, layer) for i, layer in enumerate(cache.layers) if hasattr(layer, "positions")]
    empty = [i for i, layer in owned if not layer.is_initialized]
    if empty or not owned:
        raise JobError(f"{type(module).__name__} leaves its cache empty, so that there is nothing to generate with")
    path = _path(module, len(cache.layers))
    return [
        StateTensor(f"{path}.{i}.cache_{word}", tuple(t.shape), t.dtype, True)
        for i, layer in owned
        for word, t in (("keys", layer.keys), ("values", layer.values))
    ]


def _path(module: nn.Module, layers: int) -> str:
    """What the layers of a cache are called: as the model's own, where it has a list of as many."""
    lists = (path for path, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers)
    return next(lists, "cache")


def _check_positions(module: nn.Module, longest: int) -> None:
    model: Any = module
    config = model.config.get_text_config(decoder=True)
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and longest > most:
        raise JobError(
            f"the longest prompt and its new tokens are {longest} positions, but {type(module).__name__} has {most} "
            "(max_position_embeddings); give shorter prompts or fewer tokens"
        )


def _arguments(module: nn.Module) -> Sequence[str]:
    return list(inspect.signature(module.forward).parameters)


def _logits(output: Any) -> Tensor:
    """The logits of a model's output: [samples, length, vocabulary] or [samples, vocabulary]."""
    found = output.logits if hasattr(output, "logits") else output
    found = found[0] if isinstance(found, (tuple, list)) else found
    if not isinstance(found, Tensor) or found.ndim not in (2, 3):
        given = f"a tensor of {found.ndim} dims" if isinstance(found, Tensor) else type(found).__name__
        raise JobError(f"a model that generates returns logits [samples, length, vocabulary], but this one {given}")
    return found


# -- captured ----------------------------------------------------------------------------------------------------------


def with_state(captured: Captured, step: Step, samples: int) -> Captured:
    """A captured step whose state goes as buffers that it changes, not as tensors of a batch."""
    nodes = {node.name: node for node in captured.graph.nodes if node.op == "placeholder"}
    given = [nodes[name] for name in captured.inputs]
    output = captured.graph.output_node()
    size = given[0].meta["val"].shape[0]
    for node in given[FIRST:]:
        _without_copies(captured.graph, node)
    outs: Any = output.args[0]
    logits, *new = outs
    buffers = dict(captured.buffers)
    updates, renewed = [], []
    for each, node, value in zip(step.state, given[FIRST:], new, strict=True):
        if value is node:  # of a layer that is left out
            continue
        if each.samples and str(node.meta["val"].shape[0]) != str(size):
            raise JobError(
                f"buffer {each.name} has {samples} (global_batch) as its first size, but not for the samples; "
                "take another global_batch"
            )
        if each.samples:
            _sized_by(captured.graph, node, given[0])
        buffers[node.name] = each.name
        updates.append(each.name)
        renewed.append(value)
    output.args = ((logits, *renewed),)
    for node in given[FIRST:]:
        if not node.users:
            captured.graph.erase_node(node)
            buffers.pop(node.name, None)
    is_open = isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)
    return replace(
        captured,
        buffers=buffers,
        inputs=captured.inputs[:FIRST],
        updates=updates,
        results=("logits",),
        form=Place(0),
        fixed_batch=None if is_open else samples,
        state=tuple(updates),
        batch_symbols=captured.batch_symbols & {str(size)},
    )


def _sized_by(graph: fx.Graph, node: fx.Node, tokens: fx.Node) -> None:
    """The number of samples is that of the tokens, whichever layer's cache it was read from."""
    for user in list(node.users):
        if user.target is aten.sym_size.int and user.args[1] == 0:
            user.replace_input_with(node, tokens)


def _without_copies(graph: fx.Graph, node: fx.Node) -> None:
    """A graph changes nothing in place, so that what it copies of a tensor may be the tensor."""
    for user in list(node.users):
        if user.target is aten.clone.default:
            user.replace_all_uses_with(node)
            graph.erase_node(user)
