"""Collect: outputs on their way to rank 0 of a launch, whose machines may share no memory. Only tensors are sent.

Rank 0 computes as the others do while its caller waits, and receives what they have in the order of the chunks. What is
said of a chunk that is on its way (who has it, shapes, dtypes) is in the launch's store, with tensors that are small.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.engine.launch import Place
from shardwise.graph.output import put_together
from shardwise.inference.claims import Claims, Queue, StoreQueue, await_others, leave, shared_store
from shardwise.inference.local_queue import LocalQueue
from shardwise.inference.work import Work
from shardwise.machine import slots

_TENSORS = 1 << 12  # more than an output has
_SMALL = 1 << 14  # bytes of an output up to which a message of its own takes longer than what is said of it
_CHUNKS = 1 << 18  # more than are on their way at once; their numbers go round


def agreed_number(place: Place) -> int:
    """A number that all ranks have and no earlier call gave."""
    return _of_all([_number()], place)[0][0]


@contextmanager
def agreed_queue(place: Place, window: int) -> Iterator[tuple[Queue, dist.Store]]:
    """A queue of chunks that all ranks have, and a store that only this prediction uses.

    Where all ranks are on one machine the queue is in its memory.

    Args:
        place: of this rank.
        window: chunks that may be computed ahead; each rank may hold one more.
    """
    here, none = _whereabouts(), LocalQueue(0, -1)
    mine = LocalQueue.new(window + place.world) if here and place.rank == 0 else none
    try:
        of_all = _of_all([_number(), mine.process, mine.descriptor, here], place)
        number, process, descriptor, there = of_all[0]
        store = shared_store(f"predict-{number}")
        if not there or any(each[-1] != there for each in of_all):
            yield StoreQueue(store, told=place.world), store  # which is a part of what may be computed ahead
            return
        with closing(LocalQueue(process, descriptor, window + place.world).opened(store)) as queue:
            yield queue, store
    finally:
        if mine is not none:
            mine.close()


def _of_all(numbers: list[int], place: Place) -> list[list[int]]:
    """Numbers of every rank."""
    mine = torch.tensor(numbers, device=place.device)
    found = [torch.empty_like(mine) for _ in range(place.world)]
    dist.all_gather(found, mine)
    return [each.tolist() for each in found]


def _number() -> int:
    generator = torch.Generator()
    generator.seed()
    return int(torch.randint(1 << 62, (1,), generator=generator))


def _whereabouts() -> int:
    """What processes have in common that may open each other's memory; 0 where this one shares none."""
    shares = slots.place()
    if not shares:
        return 0
    here = f"{shares} {os.stat('/proc/self/ns/pid').st_ino} {os.getuid()}"
    return int.from_bytes(hashlib.sha256(here.encode()).digest()[:7], "big") + 1


# -- on the other ranks ------------------------------------------------------------------------------------------------


def send_all(work: Work, claims: Claims, queue: Queue, store: dist.Store, place: Place) -> None:
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
            sent += _send(chunk, found[1], queue, place)
    for handle, _ in sent:
        handle.wait()
    leave(store, place)


def _send(chunk: int, tensors: list[Tensor], queue: Queue, place: Place) -> list[tuple[Any, Tensor]]:
    said = [[list(t.shape), str(t.dtype).removeprefix("torch.")] for t in tensors]
    raw = [t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors]
    note = json.dumps([place.rank, said]).encode()
    if sum(t.numel() for t in raw) <= _SMALL:
        # A line break ends what is said where tensors follow.
        note += b"\n" + b"".join(t.cpu().numpy().tobytes() for t in raw)
        queue.note(chunk, note)
        return []
    queue.note(chunk, note)
    return [(dist.isend(t, 0, tag=_tag(chunk, n)), t) for n, t in enumerate(raw) if t.numel()]


def _tag(chunk: int, n: int) -> int:
    return chunk % _CHUNKS * _TENSORS + n


# -- on rank 0 ---------------------------------------------------------------------------------------------------------


def outputs(work: Work, claims: Claims, queue: Queue, store: dist.Store, place: Place) -> Iterator[Any]:
    """The outputs of all chunks in their order, computed here or received."""
    ready: dict[int, list[Tensor]] = {}
    form: Any = None
    following = 0
    mine: int | None = queue.claim()
    try:
        while work.chunks.count is None or following < work.chunks.count:
            # A store answers from a process whose ranks all compute: it is asked no more than it has to be.
            if following in ready:
                queue.take()
                tensors = ready.pop(following)
                following += 1
                if form is None:  # of all chunks, and this rank has computed none yet
                    form = work.prediction.form(work.example)
                yield put_together(form, tensors)
                del tensors
            elif mine is not None and _is_next(mine, following, claims, queue):
                claims.tell(mine)
                found = work.compute(mine)
                if found is None:
                    mine = None
                    continue
                form = found[0]
                if work.gives:
                    ready[mine] = [t.cpu() for t in found[1]]
                mine = queue.claim()
            else:
                received = _receive(following, queue, place)
                if received is None:  # another rank saw the end of the data
                    break
                ready[following] = received
        if mine is not None:
            claims.tell(-1)
    except GeneratorExit:
        # What the others have sent is received, so that the process group can be used for something else.
        claimed = queue.stop()
        if mine is not None:
            claims.tell(-1)
        for chunk in range(following, claimed):
            if chunk not in ready and chunk != mine:
                _receive(chunk, queue, place)
        await_others(store, place)
        raise
    await_others(store, place)


def _is_next(mine: int, following: int, claims: Claims, queue: Queue) -> bool:
    """Whether a chunk is to be computed before the one that follows is received."""
    return mine == following or (mine < following + claims.window and not queue.noted(following))


def _receive(chunk: int, queue: Queue, place: Place) -> list[Tensor] | None:
    """The tensors of a chunk, on the CPU, when they have come; None of one that nobody computes."""
    note, _, following = queue.read(chunk).partition(b"\n")
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
