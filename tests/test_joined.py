"""Joining a launch that torchrun or another agent made: its ranks, its addresses, what is refused."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardwise.engine.launch import Place, joined, launched
from shardwise.errors import LaunchError
from shardwise.machine.backend import Backend
from tests.test_launch import LOOPBACK, clean_environment, listeners

pytestmark = [pytest.mark.timeout(60), pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
slow = pytest.mark.slow

CPU = Backend.cpu()

JOIN = """
import os, sys, torch
import torch.distributed as dist
from shardwise.engine.launch import joined, launched
from tests.test_launch import listeners

assert launched()
with joined(collective_timeout=20.0) as place:
    with joined() as again:
        assert again == place, (again, place)
    total = torch.ones(1)
    dist.all_reduce(total)
    dist.new_group([0, 1])
    found = listeners(os.getpid())
    dist.barrier()
    words = [place.rank, place.world, place.local_rank, int(total), torch.get_num_threads(), *found]
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # whole, whatever the other rank prints
assert not dist.is_initialized()
"""


def check_joined(lines: list[str]) -> None:
    assert len(lines) == 2
    for line in lines:
        rank, world, local_rank, total, threads, *found = line.split()
        assert (world, total, threads) == ("2", "2", str(CPU.threads(2)))
        assert rank == local_rank
        assert found and set(found) <= LOOPBACK


@slow
def test_joined_without_an_agent_listens_on_loopback_only() -> None:
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN],
            env=clean_environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    check_joined([process.communicate(timeout=40)[0] for process in processes])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def under_torchrun(script: str, folder: Path, *, timeout: float, **environment: str) -> list[str]:
    """The lines that a script prints on two ranks that torchrun starts."""
    (folder / "run.py").write_text(script)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"),
            *("--nproc-per-node=2", str(folder / "run.py")),
        ],
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@slow
def test_joined_under_torchrun(tmp_path: Path) -> None:
    check_joined(under_torchrun(JOIN, tmp_path, timeout=50))


def test_joined_alone_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert not launched()
    before = torch.get_num_threads()
    with joined(backend=CPU, threads=1) as place:
        assert place == Place(0, 1, 0, CPU)
        assert dist.get_world_size() == torch.get_num_threads() == 1
        assert set(listeners(os.getpid())) <= LOOPBACK
    assert not dist.is_initialized()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("0.0.0.0", "wildcard or public address"),
        ("::", "wildcard or public address"),
        ("", "wildcard or public address"),
        ("8.8.8.8", "SHARDWISE_TRUST_NETWORK=1"),
        ("::ffff:8.8.8.8", "SHARDWISE_TRUST_NETWORK=1"),
        ("10.1.2.3", "set GLOO_SOCKET_IFNAME to one of"),
        ("no.such.host.invalid", "does not resolve"),
    ],
)
def test_networks_that_are_not_trusted_are_refused(address: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": address}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SHARDWISE_TRUST_NETWORK", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(LaunchError, match=re.escape(says)), joined(backend=CPU):
        pass
    assert not dist.is_initialized()


def test_a_rank_outside_its_world_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match="RANK is 2 and WORLD_SIZE is 2"), joined(backend=CPU):
        pass
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(LaunchError, match="RANK must be a whole number, but is 'two'"), joined(backend=CPU):
        pass
