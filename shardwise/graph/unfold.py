"""Capture of a deep model by a few of its layers: the others are copies, and that they are is checked.

Exporting takes a time for each layer, and a model of a hundred layers has a few kinds of them. So all but a few of the
layers that look alike are left out, the rest is exported, and its last layer is written again for each that was left
out. What looks alike need not act alike: the whole model and the short one are both run without data, and what they
run, operator by operator with all that each reads, has to differ by just these copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from shardwise.graph import random
from shardwise.graph.captured import Captured

_LONGEST = 8  # layers of a pattern, such as five with local attention and one with global
_KEPT = 3  # times that a pattern is exported: the first and the last may have other neighbours
_WORTH = 4  # layers; for fewer the check is not worth its time
_SMALL = 64  # elements of a constant that are compared


@dataclass(frozen=True)
class Stack:
    """Children of a container that look alike, or that a pattern repeats in.

    Attributes:
        container: what holds them.
        path: its name in the model.
        keys: the children's names, in order.
        period: after so many children one like the first comes.
    """

    container: nn.Module
    path: str
    keys: tuple[str, ...]
    period: int

    @property
    def kept(self) -> tuple[str, ...]:
        """The children that a short model has."""
        return self.keys[: _KEPT * self.period]

    @property
    def left_out(self) -> tuple[str, ...]:
        """The children that it goes without."""
        return self.keys[_KEPT * self.period :]

    @property
    def copies(self) -> int:
        """How many times the pattern is left out."""
        return len(self.left_out) // self.period

    @property
    def left_out_paths(self) -> tuple[str, ...]:
        """What the names of their weights begin with."""
        return tuple(f"{self.path}.{key}." for key in self.left_out)

    def twin(self, name: str) -> str:
        """A weight of a child that is left out, in the last child that is kept and has its place in the pattern."""
        child, _, rest = name.removeprefix(f"{self.path}.").partition(".")
        place = self.left_out.index(child) % self.period
        return f"{self.path}.{self.kept[place - self.period]}.{rest}"

    @contextmanager
    def short(self) -> Iterator[None]:
        """The model is short as long as this lasts."""
        held, gone = self.container._modules, set(self.left_out)
        self.container._modules = {key: child for key, child in held.items() if key not in gone}
        try:
            yield
        finally:
            self.container._modules = held


def deepest(model: nn.Module) -> Stack | None:
    """The stack that leaves most out; None where none is worth while."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    found = [stack for path, container in lists for stack in _stacks(container, path)]
    best = max(found, key=lambda s: len(s.left_out), default=None)
    return best if best is not None and len(best.left_out) >= _WORTH else None


def _stacks(container: nn.Module, path: str) -> Iterator[Stack]:
    keys = list(container._modules)
    looks = [_look(child) for child in container._modules.values()]
    for period in range(1, _LONGEST + 1):
        start = 0
        for i in range(period, len(looks) + 1):
            if i == len(looks) or looks[i] != looks[i - period]:
                if i - start > _KEPT * period:
                    yield Stack(container, path, tuple(keys[start : i - (i - start) % period]), period)
                start = i - period + 1


def _look(module: nn.Module | None) -> tuple[Any, ...]:
    """What can be seen of a module: its class, the shapes of its tensors and its plain attributes, less numbers."""
    if module is None:
        return ()
    tensors = [
        (name, tuple(t.shape), t.dtype, t.requires_grad)
        for held in (module._parameters, module._buffers)
        for name, t in held.items()
        if t is not None
    ]
    plain = [(name, value) for name, value in vars(module).items() if isinstance(value, str | bool)]
    return (type(module), *tensors, *plain, *((name, _look(child)) for name, child in module._modules.items()))


# -- what a model runs -----------------------------------------------------------------------------------------------


class Made(NamedTuple):
    """A tensor that an operator makes: result number `out` of event number `event`."""

    event: int
    out: int = 0


class Weight(NamedTuple):
    """A parameter or a buffer."""

    name: str


class Module(NamedTuple):
    """A module by its path."""

    name: str


class Event(NamedTuple):
    """One operator that is run.

    Attributes:
        what: all of it but what it reads: its kind, its literals, the shapes of its results.
        reads: its tensors, each Made, a Weight, or a word for another; then, of a graph, the modules that it is in.
    """

    what: Any
    reads: tuple[Any, ...]


class _Recorder(TorchDispatchMode):
    def __init__(self, known: Mapping[int, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self._known = dict(known)
        self._alive: list[Any] = []  # an id is not given again while its tensor lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        if not results:  # asks for a device or a size
            return out
        given, form = tree_flatten((args, kwargs or {}))
        reads = tuple(self._known.get(id(x), str(tuple(x.shape))) for x in given if isinstance(x, Tensor))
        literals = tuple(repr(x) for x in given if not isinstance(x, Tensor | torch.Generator))
        shapes = tuple((tuple(x.shape), x.dtype) for x in results)
        for place, x in enumerate(results):
            self._known[id(x)] = Made(len(self.events), place)
        self._alive.append((given, results))
        self.events.append(Event((func, form, literals, shapes), reads))
        return out

    def note_output(self, results: Sequence[Tensor]) -> None:
        """The last event is what the model returns, which may be something of every layer."""
        self.events.append(Event("output", tuple(self._known.get(id(x), str(tuple(x.shape))) for x in results)))


def run(module: nn.Module, model: nn.Module, tensors: Sequence[Tensor], state: Sequence[str] = ()) -> list[Event]:
    """What a module runs when it is called; `model` is the part of it whose weights go by their names.

    So does its state, which is the last of the tensors and, made anew, of the results.
    """
    known: dict[int, Any] = {id(x): f"input {i}" for i, x in enumerate(tensors)}
    known |= {id(x): Weight(name) for name, x in zip(state, tensors[len(tensors) - len(state) :], strict=True)}
    known |= {id(x): Weight(name) for named in (model.named_parameters(), model.named_buffers()) for name, x in named}
    recorder = _Recorder(known)
    with torch.no_grad(), recorder:
        results = module(*tensors)
    found = [x for x in tree_flatten(results)[0] if isinstance(x, Tensor)]
    recorder.note_output(found[: len(found) - len(state)])
    return recorder.events


# -- copies of a layer -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unfolded:
    """What a short model runs, with its last layer (or pattern) written again for each that is left out.

    Attributes:
        events: all of it.
        at: number of the first new event.
        length: events of one copy.
        copies: how many there are.
    """

    events: list[Event]
    at: int
    length: int
    copies: int

    @property
    def behind(self) -> int:
        """Number of the first event behind the copies."""
        return self.at + self.length * self.copies


def unfolded(events: Sequence[Event], stack: Stack) -> Unfolded | None:
    """Write the last layer again for each that is left out; None where the last two are not alike."""
    length = _length(events, stack)
    if length is None:
        return None
    alike = [i >= length and _alike(events[i - length], events[i], length) for i in range(len(events))]
    at = next((i for i in range(len(events), length, -1) if all(alike[i - length : i])), None)
    if at is None:
        return None
    new = list(events[:at])
    for times in range(1, stack.copies + 1):
        for i in range(at - length, at):
            pairs = zip(events[i - length].reads, events[i].reads, strict=True)
            new.append(Event(events[i].what, tuple(_further(a, b, times) for a, b in pairs)))
    more = stack.copies * length

    def moved(read: Any) -> Any:
        return Made(read.event + more, read.out) if isinstance(read, Made) and read.event >= at - length else read

    new += [Event(event.what, tuple(moved(read) for read in event.reads)) for event in events[at:]]
    return Unfolded(new, at, length, stack.copies)


def _length(events: Sequence[Event], stack: Stack) -> int | None:
    """Events from where a layer's weight is read to where the next layer's is; None where weights do not agree."""
    first: dict[str, int] = {}
    for i, event in enumerate(events):
        for read in event.reads:
            if isinstance(read, Weight):
                first.setdefault(read.name, i)
    found = set()
    for before, last in zip(stack.kept[-2 * stack.period :], stack.kept[-stack.period :], strict=False):
        start = f"{stack.path}.{last}."
        for name in [name for name in first if name.startswith(start)]:
            twin = f"{stack.path}.{before}.{name.removeprefix(start)}"
            found.add(first[name] - first.get(twin, first[name]))
    return found.pop() if len(found) == 1 and min(found) > 0 else None


def _alike(a: Event, b: Event, length: int) -> bool:
    def follow(x: Any, y: Any) -> bool:
        if isinstance(x, Made) and isinstance(y, Made):
            return x.out == y.out and y.event - x.event in (0, length)
        named = type(x) is type(y) and isinstance(x, Weight | Module)
        return x == y or (named and _numbered(x.name, y.name) is not None)

    return a.what == b.what and len(a.reads) == len(b.reads) and all(map(follow, a.reads, b.reads))


def _further(a: Any, b: Any, times: int) -> Any:
    """What comes so many times after b, as b comes after a."""
    if isinstance(b, Made):
        return Made(b.event + times * (b.event - a.event), b.out)
    if isinstance(b, Weight | Module):
        return type(b)(_renumbered(a.name, b.name, times))
    return b


def _numbered(a: str, b: str) -> int | None:
    """Which part of two dotted names is a number that differs; None where anything else does."""
    x, y = a.split("."), b.split(".")
    other = [i for i in range(min(len(x), len(y))) if x[i] != y[i]]
    plain = len(x) == len(y) and len(other) == 1 and x[other[0]].isdecimal() and y[other[0]].isdecimal()
    return other[0] if plain else None


def _renumbered(a: str, b: str, times: int) -> str:
    """The dotted name that comes so many times after b, as b comes after a."""
    place = _numbered(a, b)
    if place is None:
        return b
    parts = b.split(".")
    parts[place] = str(int(parts[place]) + times * (int(parts[place]) - int(a.split(".")[place])))
    return ".".join(parts)


# -- the graph -------------------------------------------------------------------------------------------------------


def unfold(short: Captured, stack: Stack, model: nn.Module, state: Sequence[str] = ()) -> Captured | None:
    """Write the layers that were left out into the graph of a short model, in place; None where it cannot be done.

    Args:
        short: the short model, captured.
        stack: what was left out of it.
        model: the whole model.
        state: names of what goes beside its buffers.
    """
    writer = _Writer(short)
    found = unfolded(writer.events, stack)
    if found is None:
        return None
    params, buffers = dict(short.params), dict(short.buffers)
    # A model's own buffers may be its state.
    kept = list(dict.fromkeys([*(name for name, _ in model.named_buffers()), *state]))
    for known, names in ((params, [name for name, _ in model.named_parameters()]), (buffers, kept)):
        writer.add_placeholders(known, names, stack)
    read = {r for event in found.events for r in event.reads if isinstance(r, Weight)}
    if not read <= writer.placeholders.keys():
        return None
    updates = writer.write(found, kept)
    order = [node.name for node in short.graph.nodes if node.op == "placeholder"]
    params, buffers = ({name: known[name] for name in order if name in known} for known in (params, buffers))
    renewed = tuple(name for name in updates if name in state)
    return replace(short, params=params, buffers=buffers, updates=updates, state=renewed)


class _Writer:
    def __init__(self, captured: Captured) -> None:
        self.graph = captured.graph
        self._weights = {**captured.params, **captured.buffers}
        self._constants = captured.constants
        given = [node for node in self.graph.nodes if node.op == "placeholder"]
        # A tied weight has a placeholder by each of its names, of which one is read.
        self.placeholders = {self._word(node): node for node in sorted(given, key=lambda node: bool(node.users))}
        self._output = self.graph.output_node()
        outs: Any = self._output.args[0]
        self._results = outs[: len(outs) - len(captured.updates)]
        # New values of buffers come out in a list at the end. As events they repeat with their layer.
        changed: dict[fx.Node, list[str]] = {}
        for node, name in zip(outs[len(self._results) :], captured.updates, strict=True):
            changed.setdefault(node, []).append(name)
        self._nodes: list[fx.Node | None] = []
        self._number: dict[fx.Node, int] = {}
        self.events: list[Event] = []
        for node in self.graph.nodes:
            if node.op == "call_function":
                self._number[node] = len(self._nodes)
                self.events.append(self._event(node))
                names = changed.pop(node, [])
                self.events += [Event("update", (Made(self._number[node]), Weight(name))) for name in names]
                self._nodes += [node, *(None for _ in names)]
        self.events.append(Event("output", tuple(map(self._read, self._results))))
        if changed:  # the new value of a buffer is no operator's
            self.events = []

    def _word(self, node: fx.Node) -> Any:
        """What a placeholder goes by."""
        if node.name in self._weights:
            return Weight(self._weights[node.name])
        constant = self._constants.get(node.name)
        if constant is None or isinstance(constant, FakeTensor) or constant.numel() > _SMALL:
            return node.name
        return f"{constant.dtype} {constant.tolist()}"

    def _read(self, node: fx.Node) -> Any:
        return Made(self._number[node]) if node in self._number else self._word(node)

    def _event(self, node: fx.Node) -> Event:
        reads: list[Any] = []

        def word(source: fx.Node) -> str:
            reads.append(self._read(source))
            return "tensor"

        given = node.args[:-1] if node.target in random.DRAWS else node.args  # without its number, which is its own
        what = (str(node.target), repr(fx.node.map_arg((given, node.kwargs), word)), _made(node.meta.get("val")))
        return Event(what, (*reads, *(Module(path) for path, *_ in _modules(node).values())))

    def add_placeholders(self, known: dict[str, str], names: Sequence[str], stack: Stack) -> None:
        """Give the weights that are left out placeholders, in the model's order, and add their names to those known."""
        before: fx.Node | None = None
        for name in names:
            node = self.placeholders.get(Weight(name))
            if node is None and name.startswith(stack.left_out_paths):
                twin = self.placeholders.get(Weight(stack.twin(name)))
                if twin is None or before is None:
                    continue
                with self.graph.inserting_after(before):
                    node = self.graph.placeholder(f"{twin.name}__1")
                node.meta = dict(twin.meta)
                known[node.name] = name
                self.placeholders[Weight(name)] = node
            before = node or before

    def write(self, found: Unfolded, buffers: Sequence[str]) -> list[str]:
        """Write the copies; returns which of the model's buffers the graph's last outputs now replace."""
        made, rest = self._nodes[: found.at], self._nodes[found.at :]
        following = next((node for node in rest if node is not None), self._output)

        def source(read: Any) -> fx.Node:
            node = made[read.event] if isinstance(read, Made) else self.placeholders[read]
            assert node is not None
            return node

        def reading(node: fx.Node, event: Event) -> Any:
            reads = iter(event.reads)
            return fx.node.map_arg((node.args, node.kwargs), lambda _: source(next(reads)))

        for i, event in enumerate(found.events[found.at : found.behind]):
            last = found.at - found.length + i % found.length
            old = self._nodes[last]
            if old is None:
                made.append(None)
                continue
            args, kwargs = reading(old, event)
            with self.graph.inserting_before(following):
                # The graph does not know an export's names as taken; two underscores keep new ones apart.
                new = self.graph.create_node("call_function", old.target, args, kwargs, f"{old.name}__1")
            paths = (read.name for read in event.reads if isinstance(read, Module))
            modules = {key: (path, *rest) for path, (key, (_, *rest)) in zip(paths, _modules(old).items(), strict=True)}
            new.meta = {**old.meta, "nn_module_stack": modules}
            made.append(new)
        made += rest
        for node, event in zip(rest, found.events[found.behind : -1], strict=True):
            if node is not None:
                node.args, node.kwargs = reading(node, event)
        changed = {e.reads[1].name: source(e.reads[0]) for e in found.events if e.what == "update"}
        updates = [name for name in buffers if name in changed]
        self._output.args = ((*map(source, found.events[-1].reads), *(changed[name] for name in updates)),)
        for number, node in enumerate(node for node in self.graph.nodes if node.target in random.DRAWS):
            node.args = (*node.args[:-1], number)
        self.graph.lint()
        return updates


def _made(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return str([_made(v) for v in value])
    return f"{[str(s) for s in value.shape]} {value.dtype}" if isinstance(value, Tensor) else str(value)


def _modules(node: fx.Node) -> Mapping[str, Any]:
    """The modules that a node was called in, from the outermost: name to path and class."""
    return node.meta.get("nn_module_stack") or {}
