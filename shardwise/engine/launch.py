"""Launching: runs functions on local ranks, or joins the ranks that torchrun started.

What runs on one machine listens on its loopback only, and no rank outlives its parent. All of launching's use of the
environment is here.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from shardwise.engine.crew import Crew
from shardwise.engine.turn import Turn
from shardwise.engine.worker import Order, Seat, pack
from shardwise.errors import LaunchError, RunError
from shardwise.machine.backend import Backend, wait_at_exit

T = TypeVar("T")

COLLECTIVE_TIMEOUT = 300.0
"""Seconds that a collective waits for the other ranks, unless told otherwise."""

# --- running on local ranks -------------------------------------------------------------------------------------------


def run_ranks(
    target: Callable[..., T],
    *args: Any,
    ranks: int,
    timeout: float | None = None,
    log_dir: Path | None = None,
    threads: int | None = None,
    backend: Backend | None = None,
    collective_timeout: float = COLLECTIVE_TIMEOUT,
) -> list[T]:
    """Runs `target(*args)` on `ranks` fresh local processes that form a process group; the results in rank order.

    Args:
        timeout: seconds for the whole call, or None.
        log_dir: gets `rank0.log`, `rank1.log` ...; None means a temporary directory that is kept only on failure.
        threads: of each rank; None means the cores divided by the ranks.
        collective_timeout: seconds that a collective waits for the other ranks.

    Raises:
        ShardwiseError: of the class and message that the first failing rank raised, if it raised one of ours.
        RunError: a rank raised anything else, died, or ran longer than `timeout`.
        LaunchError: the ranks cannot start.
    """
    with Ranks(ranks, backend=backend, threads=threads, log_dir=log_dir, collective_timeout=collective_timeout) as pool:
        return pool.run(target, *args, timeout=timeout)


class Ranks:
    """Live local ranks that run one function after another, each in a process group of its own.

    Start-up costs a second or two, a function some 20 ms. The arguments are those of `run_ranks`, and `first`: the
    number of rank 0's device, where other ranks have those before it.

        with Ranks(2) as ranks:
            losses = ranks.run(train, job)
    """

    def __init__(
        self,
        ranks: int,
        *,
        backend: Backend | None = None,
        threads: int | None = None,
        log_dir: Path | None = None,
        collective_timeout: float = COLLECTIVE_TIMEOUT,
        first: int = 0,
    ) -> None:
        if ranks < 1:
            raise LaunchError(f"ranks must be at least 1, but is {ranks}")
        self.world = ranks
        self.backend = backend or Backend.detect(ranks)
        self.threads = threads or self.backend.threads(ranks)
        self._crew = Crew(
            self.world, self.backend, self.threads, log_dir, collective_timeout, first, environment=_environment_of
        )
        self._end = weakref.finalize(self, self._crew.end)
        self._lock = threading.Lock()
        self._tasks = 0
        self._unusable = ""

    @property
    def pids(self) -> list[int]:
        """Process ids in rank order."""
        return [rank.pid for rank in self._crew.ranks]

    @property
    def log_dir(self) -> Path:
        """Where each rank's log is."""
        return self._crew.logs.path

    @property
    def usable(self) -> bool:
        """Whether `run` may be called: not closed, and not broken by a failure."""
        return not self._unusable

    def run(self, target: Callable[..., T], *args: Any, timeout: float | None = None) -> list[T]:
        """Runs `target(*args)` on every rank; the results in rank order. `timeout` is in seconds.

        Where every rank raised, the ranks stay usable; any other failure ends them.

        Raises:
            ShardwiseError, RunError: as `run_ranks`; RunError too where the ranks ended earlier.
            LaunchError: the function or its arguments cannot be sent.
        """
        results: list[T] = []
        for _ in self._turn(target, args, timeout, results):
            pass
        return results

    def stream(
        self, target: Callable[..., Iterator[T]], *args: Any, timeout: float | None = None
    ) -> Generator[T, None, None]:
        """Runs the generator `target(*args)` on every rank, and yields what any of them yields as it comes.

        To be closed, where it is not read to its end, before these ranks are.

        Raises:
            ShardwiseError, RunError, LaunchError: as `run`.
        """
        yield from self._turn(target, args, timeout, [])

    def _turn(
        self, target: Callable[..., Any], args: tuple[Any, ...], timeout: float | None, results: list[Any]
    ) -> Iterator[Any]:
        """Yields what generators yield on the ranks, and puts what functions return into `results`."""
        name = getattr(target, "__qualname__", type(target).__name__)
        payload = _payload(name, target, args)
        with self._lock:
            if self._unusable:
                raise RunError(f"these {self.world} ranks cannot run {name}, {self._unusable}; start new Ranks")
            self._tasks += 1
            turn = Turn(self._crew, name, timeout)
            try:
                turn.send(Order("run", self._tasks, tuple(sys.path), tuple(sys.argv)), payload)
                yield from turn.collect()
                error = turn.verdict()
            except BaseException:  # above all KeyboardInterrupt
                self._break_up(f"for {name} was interrupted on them")
                raise
            if error is not None and not turn.intact:
                self._break_up(f"for {name} failed on them")
            self._crew.output.drain()
        if error is not None:
            raise error
        results += turn.results()

    def close(self) -> None:
        """Ends the ranks. They end as well when the object or this process goes away."""
        with self._lock:
            self._unusable = self._unusable or "for they were closed"
            self._end()

    def _break_up(self, why: str) -> None:
        self._unusable = why
        self._crew.stop(gently=False)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _payload(name: str, target: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        return pack((target, args))
    except Exception as error:
        raise LaunchError(
            f"{name} and its arguments cannot be sent to the ranks: {type(error).__name__}: {error}; "
            "open files, locks and generators inside the function instead"
        ) from error


# --- the environment --------------------------------------------------------------------------------------------------

_LAUNCH_VARIABLES = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_NAME",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "GLOO_DEVICE_TRANSPORT",
)


def _environment_of(seat: Seat) -> dict[str, str]:
    """The environment of one local rank: this one, less any other launch, on the loopback interface."""
    return {
        **_own_environment(),
        "RANK": str(seat.rank),
        "WORLD_SIZE": str(seat.world),
        "LOCAL_RANK": str(seat.local_rank),
        "LOCAL_WORLD_SIZE": str(seat.world),
        "OMP_NUM_THREADS": str(seat.threads),
        "MKL_NUM_THREADS": str(seat.threads),
        "SHARDWISE_DEVICE": seat.backend.device_type,
        **_loopback_interface(),
    }


def environment_of_worker() -> dict[str, str]:
    """The environment of a process beside others that is no rank: one thread for each library of kernels."""
    limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**_own_environment(), **dict.fromkeys(limits, "1")}


def _own_environment() -> dict[str, str]:
    launch = (*_LAUNCH_VARIABLES, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {k: v for k, v in os.environ.items() if k not in launch and not k.startswith("TORCHELASTIC_")}


def _loopback_interface() -> dict[str, str]:
    names = {name for _, name in socket.if_nameindex()}
    name = "lo0" if "lo0" in names and "lo" not in names else "lo"
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}


# --- joining another launch -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where this process sits in its process group."""

    rank: int
    world: int
    local_rank: int
    backend: Backend

    @property
    def device(self) -> torch.device:
        return self.backend.device(self.local_rank)


def launched() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


@contextlib.contextmanager
def joined(
    *, backend: Backend | None = None, threads: int | None = None, collective_timeout: float = COLLECTIVE_TIMEOUT
) -> Iterator[Place]:
    """This process' place in the default process group, which is left again at the end if it was joined here.

    A group that exists is taken as it is; else the launch that the environment names (torchrun) is joined; else the
    process becomes a group of one.

    Args:
        threads: of this rank; None means OMP_NUM_THREADS if above 1 (torchrun sets 1), else cores divided by ranks.
        collective_timeout: seconds that a collective waits for the other ranks.

    Raises:
        LaunchError: the environment does not make sense, or names a network that is not trusted.
    """
    if dist.is_initialized():
        yield _place_in_group()
        return
    launch = _Launch.read(os.environ) if launched() else None
    limit = timedelta(seconds=collective_timeout)
    backend = backend or Backend.detect(launch.local_world if launch else 1)
    with _environment(launch.interface(backend, os.environ) if launch else _loopback_interface()):
        place = Place(launch.rank, launch.world, launch.local_rank, backend) if launch else Place(0, 1, 0, backend)
        torch.set_num_threads(threads or _threads_of(backend, launch.local_world if launch else 1))
        backend.use(place.local_rank)
        if launch is None:
            _init(place, limit, dist.HashStore())
        elif launch.agent_store:
            dist.init_process_group(backend.dist_backend, init_method="env://", timeout=limit)
        else:
            _init(place, limit, launch.store(limit))
        wait_at_exit()
        try:
            yield place
        except BaseException:
            if place.world == 1:  # with others, leaving could wait for a collective that never ends
                dist.destroy_process_group()
            raise
        if dist.is_initialized():
            dist.destroy_process_group()


def _init(place: Place, limit: timedelta, store: dist.Store) -> None:
    dist.init_process_group(
        place.backend.dist_backend, store=store, rank=place.rank, world_size=place.world, timeout=limit
    )


def _place_in_group() -> Place:
    rank = dist.get_rank()
    backend = Backend.cuda() if "nccl" in dist.get_backend_config() else Backend.cpu()
    return Place(rank, dist.get_world_size(), _number(os.environ, "LOCAL_RANK", rank), backend)


def _threads_of(backend: Backend, local_world: int) -> int:
    told = _number(os.environ, "OMP_NUM_THREADS", 1)
    return told if told > 1 else backend.threads(local_world)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class _Launch:
    """A launch as the environment describes it."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    host: str
    port: int
    agent_store: bool
    """Whether torchrun's agent, not rank 0, hosts the store."""

    @classmethod
    def read(cls, env: Mapping[str, str]) -> _Launch:
        rank, world = _number(env, "RANK", 0), _number(env, "WORLD_SIZE", 1)
        if not 0 <= rank < world:
            raise LaunchError(f"RANK must be from 0 to WORLD_SIZE - 1, but RANK is {rank} and WORLD_SIZE is {world}")
        return cls(
            rank=rank,
            world=world,
            local_rank=_number(env, "LOCAL_RANK", rank),
            local_world=_number(env, "LOCAL_WORLD_SIZE", world),
            host=env["MASTER_ADDR"],
            port=_number(env, "MASTER_PORT", 29500),
            agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )

    def interface(self, backend: Backend, env: Mapping[str, str]) -> dict[str, str]:
        """The variables that keep this launch on its network.

        Raises:
            LaunchError: its address is a wildcard or public and not trusted, or its interface is not named.
        """
        reach = max((_reach(address) for address in self._addresses()), key=("loopback", "private", "open").index)
        if reach == "loopback":
            return _loopback_interface()
        if reach == "open" and env.get("SHARDWISE_TRUST_NETWORK") != "1":
            raise LaunchError(
                f"MASTER_ADDR is {self.host!r} ({', '.join(self._addresses())}), a wildcard or public address, and "
                "whoever reaches torch.distributed's ports can run code here; give the private address of rank 0's "
                "machine, or set SHARDWISE_TRUST_NETWORK=1 if this network is closed"
            )
        needed = ["GLOO_SOCKET_IFNAME"] + ["NCCL_SOCKET_IFNAME"] * (backend.device_type == "cuda")
        missing = [name for name in needed if not env.get(name)]
        if missing:
            raise LaunchError(
                f"MASTER_ADDR is {self.host!r} ({', '.join(self._addresses())}), not this machine's loopback, and the "
                f"network interface to use is not named; set {' and '.join(missing)} to one of "
                f"{', '.join(name for _, name in socket.if_nameindex())}, or use MASTER_ADDR=127.0.0.1 "
                "(torchrun --local-addr 127.0.0.1) on one machine"
            )
        return {}

    def store(self, limit: timedelta) -> dist.TCPStore:
        """The store of this launch, which rank 0 hosts on MASTER_ADDR alone (torch itself would on every interface)."""
        address = self._addresses()[0]
        if self.rank:
            return dist.TCPStore(address, self.port, self.world, False, limit, wait_for_workers=False)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            listener = socket.create_server((address, self.port), family=family, backlog=1024)
        except OSError as error:
            raise LaunchError(
                f"rank 0 cannot listen on MASTER_ADDR {address}, MASTER_PORT {self.port}: {error.strerror}; "
                "give an address of rank 0's machine and a free port"
            ) from error
        return dist.TCPStore(
            address, self.port, self.world, True, limit, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def _addresses(self) -> list[str]:
        """What MASTER_ADDR resolves to, IPv4 first."""
        if not self.host:
            return ["0.0.0.0"]
        try:
            found = {str(entry[4][0]) for entry in socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)}
        except OSError as error:
            raise LaunchError(f"MASTER_ADDR is {self.host!r}, which does not resolve: {error.strerror}") from error
        return sorted(found, key=lambda address: (":" in address, address))


def _reach(address: str) -> str:
    """From where an address is reached: `loopback`, `private`, or `open`."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_loopback:
        return "loopback"
    return "private" if ip.is_private and not ip.is_unspecified and not ip.is_multicast else "open"


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    value = env.get(name, "")
    try:
        return int(value) if value else default
    except ValueError:
        raise LaunchError(f"{name} must be a whole number, but is {value!r}") from None
