"""Sharded data parallel (ZeRO): optimizer state, gradients and parameters cut over the data axes.

Parameters of a bucket lie one after the other in a flat tensor, which is cut into equal parts, one for each data
rank. A rank updates its part and gathers the others'. Stage 1 shards optimizer state; 2 also gives up a bucket's
gradients once they are reduced; 3 also gives up parameters when an operator has used them, and gathers them again for
backward (Rajbhandari et al. 2020).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from shardwise.graph.rewrite import gives_views
from shardwise.parallel.data import Bucket, by_size, take_gradient
from shardwise.parallel.mesh import Axis
from shardwise.parallel.program import attribute_name


@dataclass(eq=False)
class FlatBucket:
    """Parameters in one flat tensor, cut over one axis.

    Attributes:
        names: the parameters, in order.
        shapes: their shapes on this rank (after any other cut).
        starts: where each starts in the flat tensor.
        length: elements of the flat tensor, padded to a multiple of the axis.
        axis: the axis that cuts it.
        also: further axes over which gradients are to be summed.
        shard: this rank's part; a leaf that gradients are taken of.
    """

    names: list[str]
    shapes: list[torch.Size]
    starts: list[int]
    length: int
    axis: Axis
    also: tuple[Axis, ...]
    shard: nn.Parameter
    full: Tensor | None = None
    pieces: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def part(self) -> int:
        return self.length // self.axis.size

    def span(self, index: int) -> tuple[int, int]:
        """Where parameter `index` lies within this rank's part."""
        low = self.axis.rank * self.part
        start = self.starts[index]
        stop = start + self.shapes[index].numel()
        return max(start, low) - low, max(min(stop, low + self.part) - low, 0)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters within a flat tensor."""
        return [flat[a : a + s.numel()].view(s) for a, s in zip(self.starts, self.shapes, strict=True)]

    def give(self, grad: Tensor | None) -> None:
        """Hand each piece its part of this rank's part of the gradient."""
        for i, name in enumerate(self.names):
            low, high = self.span(i)
            if high > low:
                self.pieces[name].grad = None if grad is None else grad[low:high]

    def gather(self) -> Tensor:
        """The flat tensor of all ranks' parts."""
        if self.full is None:
            own = self.shard.detach()
            full = own.new_empty(self.length)
            self.axis.record("all_gather", own.numel() * own.element_size())
            dist.all_gather(list(full.chunk(self.axis.size)), own, group=self.axis.group)
            self.full = full
        return self.full

    def reduce(self, flat: Tensor) -> Tensor:
        """This rank's part of a sum over the axis."""
        return self.reducing(flat).wait()

    def reducing(self, flat: Tensor) -> Reducing:
        """Start to sum over the axis."""
        self.axis.record("reduce_scatter", flat.numel() * flat.element_size())
        out = flat.new_empty(self.part)
        parts = list(flat.chunk(self.axis.size))
        return Reducing(self, dist.reduce_scatter(out, parts, group=self.axis.group, async_op=True), out)


@dataclass(frozen=True, eq=False)
class Reducing:
    """A sum that is under way."""

    bucket: FlatBucket
    work: Any
    out: Tensor

    def wait(self) -> Tensor:
        """This rank's part of the sum, also over the further axes."""
        self.work.wait()
        for axis in self.bucket.also:
            axis.record("all_reduce", self.out.numel() * self.out.element_size())
            dist.all_reduce(self.out, group=axis.group)
        return self.out


class ScatteredBucket(Bucket):
    """Gradients of which each rank gets its part of the sum (reduce-scatter): ZeRO 1 and 2.

    Args:
        flat_bucket: the parameters in parts.
        params: the whole parameters, in its order.
        frees: gives up whole gradients when they are summed, and makes room for them anew in each step (ZeRO-2).
    """

    def __init__(self, flat_bucket: FlatBucket, params: list[nn.Parameter], *, frees: bool) -> None:
        super().__init__(params)
        self.flat_bucket, self.frees = flat_bucket, frees
        self.views: list[Tensor] | None = None
        self._sum: Reducing | None = None

    def collect(self, i: int) -> None:
        if self.views is None:
            self.flat = self.flat_bucket.shard.new_zeros(self.flat_bucket.length)
            self.views = self.flat_bucket.views(self.flat)
        take_gradient(self.params[i], self.views[i])

    def send(self) -> None:
        self._sum = self.flat_bucket.reducing(self.flat)

    def wait(self) -> None:
        assert self._sum is not None
        self.flat_bucket.give(self._sum.wait())
        self._sum = None
        for param in self.params:
            param.grad = None
        if self.frees:
            self.views = None
            del self.flat


def make_buckets(
    params: Sequence[tuple[str, nn.Parameter, Axis, tuple[Axis, ...]]],
    groups: Callable[[str], Hashable],
    limit: int,
    first: int | None = None,
    entries: Callable[[str, int, int], Tensor] | None = None,
) -> list[FlatBucket]:
    """Buckets of parameters that are used together, in the order in which backward reaches them.

    Args:
        params: (name, local parameter, axis that cuts it, further axes to sum over), in order of use.
        groups: the block that a parameter belongs to; a bucket holds parameters of one block.
        limit: bytes of a bucket, about.
        first: bytes of the first bucket, where it is to be smaller than the others.
        entries: gives entries of a parameter laid out flat, by name, from one number to another; None takes its own.
    """
    own = {name: param for name, param, _, _ in params}
    taken = entries or (lambda name, low, high: own[name].detach().reshape(-1)[low:high])
    runs: list[tuple[Any, list[tuple[str, nn.Parameter]]]] = []
    for name, param, axis, also in reversed(params):
        key = (groups(name), axis, also, param.dtype)
        if not runs or runs[-1][0] != key:
            runs.append((key, []))
        runs[-1][1].append((name, param))
    found: list[FlatBucket] = []
    for (_, axis, also, _), members in runs:
        sizes = [p.numel() * p.element_size() for _, p in members]
        for chunk in by_size(sizes, limit, limit if found or first is None else first):
            found.append(_bucket([members[i] for i in reversed(chunk)], axis, also, taken))
    return found


def _bucket(
    members: Sequence[tuple[str, nn.Parameter]],
    axis: Axis,
    also: tuple[Axis, ...],
    entries: Callable[[str, int, int], Tensor],
) -> FlatBucket:
    starts, at = [], 0
    for _, param in members:
        starts.append(at)
        at += param.numel()
    length = -(-at // axis.size) * axis.size
    part = length // axis.size
    shard = nn.Parameter(entries(members[0][0], 0, 0).new_zeros(part))
    bucket = FlatBucket([n for n, _ in members], [p.shape for _, p in members], starts, length, axis, also, shard)
    for i, (name, _) in enumerate(members):
        low, high = bucket.span(i)
        if high > low:
            first = axis.rank * part + low - starts[i]
            shard.data[low:high] = entries(name, first, first + high - low)
            bucket.pieces[name] = nn.Parameter(shard.detach()[low:high])
    return bucket


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, bucket: FlatBucket) -> Any:
        ctx.bucket = bucket
        return tuple(bucket.views(bucket.gather()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        bucket = ctx.bucket
        flat = bucket.shard.new_zeros(bucket.length)
        for view, grad in zip(bucket.views(flat), grads, strict=True):
            if grad is not None:
                view.copy_(grad)
        bucket.full = None
        return bucket.reduce(flat), None


def unshard(bucket: FlatBucket) -> tuple[Tensor, ...]:
    """The parameters of a bucket, gathered. Backward: gradients reduced to this rank's part."""
    return _Unshard.apply(bucket.shard, bucket)  # type: ignore[no-any-return,no-untyped-call]


def release(bucket: FlatBucket) -> None:
    """Let go of the gathered parameters; operators that are still to run hold what they need."""
    bucket.full = None


@dataclass(eq=False)
class _Again:
    bucket: FlatBucket
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


class Resharding:
    """While active, what backward needs of a gathered bucket is not kept but gathered again."""

    def __init__(self, buckets: Sequence[FlatBucket]) -> None:
        self.buckets = buckets

    def __enter__(self) -> None:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        for bucket in self.buckets:
            bucket.full = None

    def _pack(self, tensor: Tensor) -> Any:
        pointer = tensor.untyped_storage().data_ptr()
        for bucket in self.buckets:
            if bucket.full is not None and bucket.full.untyped_storage().data_ptr() == pointer:
                stride = tuple(int(n) for n in tensor.stride())
                return _Again(bucket, int(tensor.storage_offset()), tensor.shape, stride)
        return tensor

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _Again):
            return packed.bucket.gather().as_strided(packed.size, packed.stride, packed.offset)
        assert isinstance(packed, Tensor)
        return packed


def gather_in(module: fx.GraphModule, bucket: FlatBucket, wanted: Sequence[str], attribute: str) -> bool:
    """Make a program gather a bucket for some of its parameters; whether it uses any of them."""
    graph = module.graph
    names = {attribute_name(n): i for i, n in enumerate(bucket.names) if n in wanted}
    uses = [n for n in graph.nodes if n.op == "get_attr" and n.target in names]
    if not uses:
        return False
    setattr(module, attribute, bucket)
    users = _readers(uses)
    with graph.inserting_before(uses[0]):
        holder = graph.get_attr(attribute)
        gathered = graph.call_function(unshard, (holder,))
        gathered.meta["bucket"] = bucket
        items = {i: graph.call_function(operator.getitem, (gathered, i)) for i in {names[n.target] for n in uses}}
    for node in uses:
        node.replace_all_uses_with(items[names[node.target]])
        graph.erase_node(node)
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
    last = [n for n in graph.nodes if n in users][-1]
    with graph.inserting_after(last):
        released = graph.call_function(release, (holder,))
    blocks = {user.meta.get("block", "") for user in users}
    if len(blocks) == 1 and "" not in blocks:
        # Recomputed with the block that alone uses it.
        for node in (gathered, *items.values(), released):
            node.meta["block"], node.meta["serves"] = next(iter(blocks)), True
    return True


def _readers(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """What reads the entries of these nodes' tensors, through views of them too."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        for user in todo.pop().users:
            if user not in found:
                found.add(user)
                if user.target is operator.getitem or gives_views(user.target):
                    todo.append(user)
    return found
