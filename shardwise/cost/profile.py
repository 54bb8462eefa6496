"""Profile: how a framework runs a plan, where frameworks differ. A handful of numbers each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shardwise.errors import MachineError


@dataclass(frozen=True)
class Profile:
    """How a framework runs a plan.

    Attributes:
        name: what it is called.
        fused: which elementwise operators, norms and casts run as one, and keep for backward only what goes into them:
            "none", those of one "modules", or "all".
        flash: whether attention is one operator that keeps no scores.
        prepared: whether what depends on the batch alone, such as masks, is made beforehand.
        balanced: whether each rank of a context axis has early and late queries, as many keys for each rank.
        passes: how many times as long as their bytes ask for operators bound by memory take.
        loss: the same of those behind the last product; 0 for as long.
        scores: bytes for each score of the last product that a loss in one operator keeps, and nothing else; 0 for what
            the model's own operators keep.
        call: seconds of the host for each operator it starts.
        queue: operators that it is ahead of the device at most.
        late: share of the host's time that keeps it from being ahead: in stretches of large operators it gets ahead of
            the device though it is the slower one on the whole.
        step: seconds that each step of a tensor axis's ring takes besides where it leaves the node.
        step_staged: seconds of the host for each step of such a ring, in a pipeline that leaves its node, where forward
            and backward of micro-batches alternate.
        tick: the same besides, for a micro-batch's forward on a stage of such a pipeline, and for its backward.
        weight: bytes of a weight; 0 for the model's own dtype.
        gradient: bytes of a gradient as it is accumulated.
        accumulate: bytes that adding a micro-batch's gradient of one weight reads and writes.
        beside: bytes of a gradient as backward makes it: once in buckets where the batch is split, and once next to the
            activations of other micro-batches.
        regather: whether of a tensor gathered along a tensor axis the own part is kept, and gathered again behind a
            product of backward (Korthikanti et al., 2022).
        send_gradient: bytes of a gradient as it is sent.
        send_weight: bytes of a sharded weight as it is gathered; 0 for the model's own dtype.
        state: bytes of optimizer state for each weight, a master copy of it included.
        shard: seconds of the host to cut and join a weight for each rank that it is sharded over, where ZeRO shards the
            optimizer's state.
        bucket: gradients in one all-reduce; 0 for all.
        overlap_data: share of the last backward behind which the all-reduce of gradients is hidden.
        overlap_scatter: the same of their reduce-scatter, where ZeRO shards the optimizer's state.
        overlap_gather: share of computing behind which the gathering of sharded or updated weights is hidden.
        broadcasts: whether updated weights are sent by a broadcast of each rank's share, and not by one gather.
        pieces: collectives in which the sharded weights of a layer are gathered.
        fetch: how many times as long as on the wire the bytes of sharded weights, and of their gradients, take.
        overlap_tensor: share of a tensor axis's collectives that is hidden.
        contention: seconds that computing takes longer for each second of collectives behind it, which hold
            processors and memory bandwidth.
        attention: rate of its fused attention over that of the device's description.
        portable: whether its fused attention does without the instructions that earlier devices lack.
        stops: whether computing a block again stops where it keeps nothing more.
        reserve: share by which the allocator keeps more than is in use.
        whole: whether each rank has the whole model, in its own dtype, before it takes its part; with accelerators the
            host has it.
        stepwise: whether memory is followed through backward operator by operator, as autograd makes and frees tensors;
            else the largest tensor is there twice besides all that is kept.
        fragments: share of a micro-batch's activations that it keeps besides where several are in flight.
        fixed: bytes of communication buffers and libraries' workspaces.
        outside: bytes that these take of the device where the framework's own figure of memory leaves them out.
    """

    name: str
    fused: str = "none"
    flash: bool = True
    prepared: bool = False
    balanced: bool = False
    passes: float = 1.0
    loss: float = 0.0
    scores: float = 0.0
    call: float = 0.0
    queue: float = 0.0
    late: float = 1.0
    step: float = 0.0
    step_staged: float = 0.0
    tick: float = 0.0
    weight: int = 0
    gradient: int = 4
    accumulate: float = 12
    beside: int = 0
    regather: bool = False
    send_gradient: int = 4
    send_weight: int = 0
    state: int = 8
    shard: float = 0.0
    bucket: float = 0.0
    overlap_data: float = 0.0
    overlap_scatter: float = 0.0
    overlap_gather: float = 0.0
    broadcasts: bool = False
    pieces: int = 1
    fetch: float = 1.0
    overlap_tensor: float = 0.0
    contention: float = 0.35
    attention: float = 1.0
    portable: bool = True
    stops: bool = False
    reserve: float = 0.05
    whole: bool = False
    stepwise: bool = False
    fragments: float = 0.0
    fixed: float = 0.0
    outside: float = 0.0

    def predicting(self) -> Profile:
        """The same without training: there are no gradients to keep or to add, and no optimizer."""
        return replace(self, state=0, gradient=0, beside=0, accumulate=0.0)


@dataclass(frozen=True)
class Besides:
    """What a framework may do that no plan says, because Shardwise does not do it.

    Attributes:
        selective: "attention": attention alone is computed again, besides the blocks that the plan names; "products":
            of these blocks attention and every second product are kept.
        shards: how many neighbours of the ranks that split the batch share what ZeRO shards; 0 for all.
        spread: over how many times as many ranks as split the batch ZeRO shards: those of a context axis too.
        zero: the stage where the batch is not split, and a context axis alone has the shards.
        fp8: whether products of repeated layers are computed in 8 bits.
        ahead: how many times as many micro-batches as it has ranks a zero-bubble schedule may hold (Qi et al., 2024).
    """

    selective: str = ""
    shards: int = 0
    spread: int = 1
    fp8: bool = False
    ahead: int = 1
    zero: int = 0


NOTHING = Besides()

PROFILES = {
    p.name: p
    for p in (
        Profile("shardwise", overlap_data=0.5, overlap_scatter=0.5, whole=True, stepwise=True),
        Profile(
            "nanotron", fused="modules", prepared=True, passes=3.6, loss=1.5, call=96e-6, queue=450, late=0.65,
            step=21e-6, step_staged=340e-6, tick=6e-3, weight=2, gradient=4, accumulate=10, beside=2, regather=True,
            send_gradient=4, state=12, shard=3e-6, bucket=13.1e6, overlap_data=1.0, reserve=0.02, fragments=0.1,
            outside=7.5e9,
        ),
        Profile(
            "megatron", fused="all", flash=False, prepared=True, passes=1.2, call=6e-6, weight=2, gradient=4,
            accumulate=14.4, send_gradient=4, state=12, reserve=0.06, outside=1e9,
        ),
        Profile(
            "megatron-core", fused="all", prepared=True, passes=2.5, scores=4, call=6e-6, weight=2, gradient=2,
            accumulate=4, regather=True, send_gradient=2, state=12, overlap_data=0.9, overlap_scatter=0.9,
            overlap_gather=0.9, overlap_tensor=0.8, contention=0.2, portable=False, balanced=True, stops=True,
            reserve=0.06, fixed=1e9,
        ),
        Profile(
            "internevo", fused="modules", prepared=True, passes=4.0, call=8e-6, weight=2, gradient=4, accumulate=24,
            send_gradient=2, state=24, overlap_data=0.9, overlap_scatter=0.9, overlap_gather=0.9, broadcasts=True,
            reserve=0.04, fixed=1e9,
        ),
        Profile(
            "deepspeed", fused="all", flash=False, prepared=True, passes=1.2, call=6e-6, weight=2, gradient=6,
            accumulate=14.4, send_gradient=2, state=12, pieces=5, fetch=5.4, reserve=0.16, fixed=7e9,
        ),
        Profile(
            "torchtitan", fused="modules", prepared=True, passes=2.0, call=8e-6, weight=4, gradient=4, send_gradient=4,
            send_weight=2, accumulate=24, state=8, overlap_data=0.9, overlap_scatter=0.9, overlap_gather=0.9,
            balanced=True, stops=True, reserve=0.07, fixed=1e9,
        ),
        Profile(
            "fsdp", fused="modules", prepared=True, passes=2.0, loss=0.18, scores=2, call=8e-6, weight=4, gradient=4,
            send_gradient=4, send_weight=2, accumulate=24, state=8, overlap_data=0.9, overlap_scatter=0.9,
            overlap_gather=0.9, attention=0.6, stops=True, reserve=0.08, fixed=1e9,
        ),
    )
}  # fmt: skip


def profile(name: str) -> Profile:
    """A profile by its name.

    Raises:
        MachineError: there is none of this name.
    """
    if name not in PROFILES:
        raise MachineError(f"no profile is called {name!r}; there are {', '.join(PROFILES)}")
    return PROFILES[name]
