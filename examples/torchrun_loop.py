"""Keep your own training loop: each rank runs this file. With one rank, `python examples/torchrun_loop.py` will do.

torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2 examples/torchrun_loop.py [STEPS]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import shardwise as sw
from shardwise.engine.launch import joined

sys.path.insert(0, str(Path(__file__).parent))
from byte_lm import job

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 20


def main() -> None:
    whole = job()
    with joined() as place:  # the process group: torchrun's, or this process alone
        engine = sw.parallelize(whole, sw.plan(whole, place.world))
        # The loader gives global batches, the same on every rank; `feed` takes this rank's share of each.
        order = torch.Generator().manual_seed(whole.seed)
        loader = DataLoader(whole.data, batch_size=whole.global_batch, shuffle=True, drop_last=True, generator=order)
        for step, batch in enumerate(engine.feed(loader), 1):
            loss = engine.step(batch)  # forward, backward, gradient sync, clipping, optimizer
            if place.rank == 0:
                print(f"step {step}: loss {loss:.4f}", flush=True)
            if step == STEPS:
                break
        weights = engine.state_dict()  # your own names and shapes, whole, on every rank
        if place.rank == 0:
            print(f"{len(weights)} tensors, trained on {dist.get_world_size()} ranks as {engine.plan.title()}")


if __name__ == "__main__":
    main()
