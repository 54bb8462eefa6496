"""Device: what a rank computes and sends with, in nominal numbers."""

from __future__ import annotations

from dataclasses import dataclass

from shardwise.machine.backend import Backend


@dataclass(frozen=True)
class Device:
    """A device and its links.

    Attributes:
        flops: floating-point operations per second that large operators reach.
        memory: bytes per second to its memory.
        call: seconds that the smallest operator takes.
        link: bytes per second that a rank sends in a collective.
        latency: seconds that the smallest collective takes.
        excess: how many times longer than an ideal ring every collective but an all-reduce takes. Measured on gloo over
            loopback, 2 ranks: a reduce-scatter or an all-gather takes as long as an all-reduce.
    """

    flops: float
    memory: float
    call: float
    link: float
    latency: float
    excess: float = 1.0

    @classmethod
    def of(cls, backend: Backend, precision: str) -> Device:
        """Nominal numbers of a kind of device: one core of a server with its loopback, or a data-centre GPU."""
        if backend.device_type == "cuda":
            flops = 400e12 if precision == "bf16" else 200e12
            return cls(flops, memory=2e12, call=6e-6, link=200e9, latency=30e-6)
        return cls(flops=60e9, memory=8e9, call=8e-6, link=1e9, latency=150e-6, excess=2.0)
