"""Two network namespaces joined by a slow link, and a job's ranks in them, one or more in each. Needs root."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_PORT = 29510
_BURST = "64kb"
"""What passes at once after a pause: one packet as the system hands it on. Of more a small message passes whole."""


class NoLink(Exception):
    """There can be no such link here; the message says why."""


def check() -> None:
    """Check that links can be made.

    Raises:
        NoLink: this process is not root, or there is no `ip` or `tc`, or the system forbids namespaces.
    """
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise NoLink(f"{' and '.join(missing)} cannot be found; install iproute2")
    if os.geteuid() != 0:
        raise NoLink("network namespaces need root; run it as root")
    name = f"sw{os.getpid()}t"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        raise NoLink(f"the system forbids network namespaces: {done.stderr.strip()}")
    subprocess.run(["ip", "netns", "delete", name], check=True)


@contextlib.contextmanager
def link(rate: str) -> Iterator[tuple[str, str]]:
    """The names of two namespaces whose only way to each other has this rate, both ways; gone afterwards.

    Args:
        rate: as `tc` has it, such as "100mbit".

    Raises:
        NoLink: as `check` says, or shaping is not possible.
    """
    check()
    names = (f"sw{os.getpid()}a", f"sw{os.getpid()}b")
    # A signal that asks to end must not leave them behind.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", "sw0", "netns", names[0], "type", "veth", "peer", "name", "sw0", "netns", names[1])
        for number, name in enumerate(names, 1):
            inside = ("ip", "netns", "exec", name)
            _run(*inside, "ip", "address", "add", f"10.213.7.{number}/24", "dev", "sw0")
            _run(*inside, "ip", "link", "set", "lo", "up")
            _run(*inside, "ip", "link", "set", "sw0", "up")
            shape = ("root", "tbf", "rate", rate, "burst", _BURST, "latency", "100ms")
            _run(*inside, "tc", "qdisc", "add", "dev", "sw0", *shape)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        signal.signal(signal.SIGTERM, before)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoLink(f"{' '.join(command)}: {done.stderr.strip()}")


def run(names: tuple[str, str], module: str, task: Mapping[str, Any], ranks: int, timeout: float) -> Any:
    """Runs `python -m MODULE TASK` on so many ranks, equally many in each namespace; what rank 0 answers.

    Args:
        module: reads a JSON file, the first argument; rank 0 writes its answer beside it, with the ending `.out`.
        ranks: how many, an even number.

    Raises:
        RuntimeError: a rank failed, or took longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "task.json"
        given.write_text(json.dumps(task))
        processes = []
        try:
            for rank in range(ranks):
                each = ranks // 2
                environment = {
                    **os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank % each),
                    "LOCAL_WORLD_SIZE": str(each), "MASTER_ADDR": "10.213.7.1", "MASTER_PORT": str(_PORT),
                    "GLOO_SOCKET_IFNAME": "sw0", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                    "SHARDWISE_DEVICE": "cpu", "TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "5",
                }  # fmt: skip
                command = ["ip", "netns", "exec", names[rank // each], sys.executable, "-m", module, str(given)]
                processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
            for process in processes:
                if process.wait(timeout):
                    raise RuntimeError(f"a rank of {module} ended with status {process.returncode}")
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{module} took longer than {timeout:g} s") from error
        finally:
            for process in processes:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return json.loads(given.with_suffix(".out").read_text())
