"""Collect: outputs on their way to rank 0 of a launch, whose machines may share no memory. Only tensors are sent.

Rank 0 computes as the others do while its caller waits, and receives what they have in the order of the chunks. What is
said of a chunk that is on its way (who has it, shapes, dtypes) is in the launch's store, with tensors that are small.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.engine.launch import Place
from shardwise.graph.output import put_together
from shardwise.inference.claims import FOREVER, Claims, await_others, leave, stop, taken
from shardwise.inference.work import Work

_TENSORS = 1 << 12  # more than an output has
_SMALL = 1 << 14  # bytes of an output up to which a message of its own takes longer than what is said of it
_CHUNKS = 1 << 18  # more than are on their way at once; their numbers go round


def agreed_number(place: Place) -> int:
    """A number that all ranks have and no earlier call gave."""
    number = torch.randint(1 << 62, (1,), generator=_fresh()).to(place.device)
    dist.broadcast(number, src=0)
    return int(number)


def _fresh() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


# -- on the other ranks ------------------------------------------------------------------------------------------------


def send_all(work: Work, claims: Claims, store: dist.Store, place: Place) -> None:
    """Computes chunks until there is none left, and sends what this rank hands out."""
    sent: list[tuple[Any, Tensor]] = []
    while True:
        chunk = claims.next()
        found = work.compute(chunk)
        if found is None:
            if claims.leads and chunk >= 0:
                claims.void(chunk)
            break
        if work.gives:
            sent = [(handle, tensor) for handle, tensor in sent if not handle.is_completed()]
            sent += _send(chunk, found[1], store, place)
    for handle, _ in sent:
        handle.wait()
    leave(store, place)


def _send(chunk: int, tensors: list[Tensor], store: dist.Store, place: Place) -> list[tuple[Any, Tensor]]:
    said = [[list(t.shape), str(t.dtype).removeprefix("torch.")] for t in tensors]
    raw = [t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors]
    note = json.dumps([place.rank, said]).encode()
    if sum(t.numel() for t in raw) <= _SMALL:
        # A line break ends what is said where tensors follow.
        note += b"\n" + b"".join(t.cpu().numpy().tobytes() for t in raw)
        store.set(f"note/{chunk}", note)  # type: ignore[arg-type]  # bytes too
        return []
    store.set(f"note/{chunk}", note)  # type: ignore[arg-type]
    return [(dist.isend(t, 0, tag=_tag(chunk, n)), t) for n, t in enumerate(raw) if t.numel()]


def _tag(chunk: int, n: int) -> int:
    return chunk % _CHUNKS * _TENSORS + n


# -- on rank 0 ---------------------------------------------------------------------------------------------------------


def outputs(work: Work, claims: Claims, store: dist.Store, place: Place) -> Iterator[Any]:
    """The outputs of all chunks in their order, computed here or received."""
    ready: dict[int, list[Tensor]] = {}
    form: Any = None
    following = untold = 0
    mine: int | None = claims.claim()
    try:
        while work.chunks.count is None or following < work.chunks.count:
            # The store answers from a process whose ranks all compute: it is asked no more than it has to be.
            if following in ready:
                untold += 1
                if untold == place.world:  # a part of what may be computed ahead
                    taken(store, untold)
                    untold = 0
                tensors = ready.pop(following)
                following += 1
                if form is None:  # of all chunks, and this rank has computed none yet
                    form = work.prediction.form(work.example)
                yield put_together(form, tensors)
                del tensors
            elif following != mine and store.check([f"note/{following}"]):
                received = _receive(following, store, place)
                if received is None:  # another rank saw the end of the data
                    break
                ready[following] = received
            elif mine is not None and mine < following + claims.window:
                claims.tell(mine)
                found = work.compute(mine)
                if found is None:
                    mine = None
                    continue
                form = found[0]
                if work.gives:
                    ready[mine] = [t.cpu() for t in found[1]]
                mine = claims.claim()
            else:
                store.wait([f"note/{following}"], FOREVER)
        if mine is not None:
            claims.tell(-1)
    except GeneratorExit:
        # What the others have sent is received, so that the process group can be used for something else.
        claimed = stop(store)
        if mine is not None:
            claims.tell(-1)
        for chunk in range(following, claimed):
            if chunk not in ready and chunk != mine:
                store.wait([f"note/{chunk}"], FOREVER)
                _receive(chunk, store, place)
        await_others(store, place)
        raise
    await_others(store, place)


def _receive(chunk: int, store: dist.Store, place: Place) -> list[Tensor] | None:
    """The tensors of a chunk, on the CPU; None of one that nobody computes."""
    note, _, following = store.get(f"note/{chunk}").partition(b"\n")
    store.delete_key(f"note/{chunk}")
    if not note:
        return None
    source, said = json.loads(note)
    found = []
    for n, (shape, name) in enumerate(said):
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        size = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.empty(size, dtype=torch.uint8, device=place.device)
        if size and following:
            raw, following = torch.frombuffer(bytearray(following[:size]), dtype=torch.uint8), following[size:]
        elif size:
            dist.recv(raw, source, tag=_tag(chunk, n))
        found.append(raw.view(dtype).view(shape).cpu())
    return found
