"""Environment: what is installed and what is reachable."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def environment() -> dict[str, Any]:
    """What is installed and what is reachable."""
    import torch
    import torch.distributed as dist

    from shardwise.machine.backend import Backend, cores

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "shardwise": installed("shardwise") or "from source",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": installed("numpy"),
        "cloudpickle": installed("cloudpickle"),
        "safetensors": installed("safetensors"),
        "threadpoolctl": installed("threadpoolctl"),
        "optional": {name: installed(name) for name in ("transformers", "scikit-learn", "pyarrow")},
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
        "memory_bytes": Backend.cpu().total_memory(),
        "devices": devices,
        "chosen": Backend.detect().device_type,
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": dist.is_available() and dist.is_nccl_available(),
        "gloo_tls": _gloo_tls(),
    }


def _gloo_tls() -> bool:
    """Whether gloo can encrypt. torch's wheels are built without it; such a build refuses the transport by name."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return False
    # Gloo keeps the first transport that a process asks for, so that the one to ask is another process.
    probe = "import torch.distributed as d; d.ProcessGroupGloo.create_device(hostname='127.0.0.1')"
    environment = {**os.environ, "GLOO_DEVICE_TRANSPORT": "TCP_TLS"}
    try:
        done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, timeout=60)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def installed(package: str) -> str | None:
    """The version of a package that is installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def text(found: dict[str, Any]) -> str:
    """The same as a table."""
    from shardwise.report.terminal import table

    rows = [["", ""]] + [[name, _said(value)] for name, value in found.items()]
    return "\n".join(table(rows, left=2).splitlines()[2:])


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, int) and value > 1_000_000:
        from shardwise.report.terminal import size

        return size(value)
    return "not installed" if value is None else str(value)
