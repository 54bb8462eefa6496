"""Backend: the one place that knows a CPU with gloo from an accelerator with NCCL."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import re
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from shardwise.errors import LaunchError

DeviceType = Literal["cpu", "cuda"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Numbers of mallopt(3): how much at the top is given back, and how many tensors may be pages of their own."""
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Backend:
    """How the ranks of one machine compute and talk: a device type and a torch.distributed backend."""

    device_type: DeviceType
    dist_backend: str

    @classmethod
    def cpu(cls) -> Backend:
        """Ranks on the CPU, over gloo."""
        return cls("cpu", "gloo")

    @classmethod
    def cuda(cls) -> Backend:
        """One CUDA device a rank, over NCCL; tensors on the CPU still travel over gloo."""
        return cls("cuda", "cpu:gloo,cuda:nccl")

    @classmethod
    def detect(cls, ranks: int = 1) -> Backend:
        """CUDA where this machine has a device for each of `ranks`, else the CPU.

        The environment variable SHARDWISE_DEVICE (`cpu` or `cuda`) decides instead where it is set.

        Raises:
            LaunchError: SHARDWISE_DEVICE is neither, or asks for more CUDA devices than there are.
        """
        wanted = os.environ.get("SHARDWISE_DEVICE", "").strip().lower()
        if wanted not in ("", "cpu", "cuda"):
            raise LaunchError(
                f"SHARDWISE_DEVICE must be cpu or cuda, but is {wanted!r}; unset it to let Shardwise choose"
            )
        if wanted == "cpu":
            return cls.cpu()
        devices = torch.cuda.device_count()
        if devices >= ranks:
            return cls.cuda()
        if wanted == "cuda":
            raise LaunchError(
                f"SHARDWISE_DEVICE is cuda and {ranks} ranks need a CUDA device each, but this machine has {devices}; "
                "ask for fewer ranks or set SHARDWISE_DEVICE=cpu"
            )
        return cls.cpu()

    def device(self, local_rank: int = 0) -> torch.device:
        """The device of a rank, `local_rank` counted on its own machine.

        Raises:
            LaunchError: there is no such device.
        """
        if self.device_type == "cpu":
            return torch.device("cpu")
        devices = torch.cuda.device_count()
        if local_rank >= devices:
            raise LaunchError(
                f"local rank {local_rank} needs CUDA device {local_rank}, but this machine has {devices}; "
                f"start at most {devices} ranks on it or set SHARDWISE_DEVICE=cpu"
            )
        return torch.device("cuda", local_rank)

    def use(self, local_rank: int = 0) -> torch.device:
        """Makes the device of this rank the current one, and returns it; a CPU keeps memory that tensors give back."""
        device = self.device(local_rank)
        if self.device_type == "cuda":
            torch.cuda.set_device(device)
        else:
            _keep_memory()
        return device

    def synchronize(self) -> None:
        """Waits until the current device has done what it was given."""
        if self.device_type == "cuda":
            torch.cuda.synchronize()

    def peak_memory(self) -> int:
        """Bytes at the peak since `reset_peak_memory`: allocated on the CUDA device, or resident in this process."""
        if self.device_type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return _peak_resident()

    def reset_peak_memory(self) -> bool:
        """Starts a new peak; False where the system cannot, so that the peak stays that of the whole process."""
        if self.device_type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return True
        libc = _glibc()
        if libc is not None:
            libc.malloc_trim(0)  # what tensors of an earlier run gave back
        try:
            _CLEAR_REFS.write_text("5")  # proc(5): 5 resets the peak resident set size to the current one
        except OSError:
            return False
        return True

    def total_memory(self) -> int:
        """Bytes that the current CUDA device has, or that this machine lets its processes have together."""
        if self.device_type == "cuda":
            return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit = _read(_CGROUP_MEMORY).strip()
        return min(total, int(limit)) if limit.isdigit() else total

    def threads(self, ranks: int = 1) -> int:
        """Threads for each of `ranks` ranks on this machine: its cores divided by the ranks, at least 1."""
        return max(1, cores() // max(1, ranks))


@functools.cache
def wait_at_exit() -> None:
    """Lets gloo's threads hand back their last tensors before this process ends.

    They need the interpreter for it. A thread that still waits for that when the interpreter ends aborts the process:
    "terminate called without an active exception".
    """
    atexit.register(time.sleep, 0.1)


def cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _peak_resident() -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", _read(_STATUS), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kB, but bytes on macOS


def _keep_memory() -> None:
    """Keep what is freed for the next tensors; to get 33 MB from the system each time takes it 13 ms to make pages."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_MMAP_MAX, 0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
