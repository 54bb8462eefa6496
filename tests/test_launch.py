"""Launching: results, failures, time-outs, no orphans, no listener off the loopback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardwise.engine.launch import Ranks, run_ranks
from shardwise.errors import JobError, LaunchError, RunError
from shardwise.job import load_spec
from shardwise.machine.backend import Backend, cores

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
slow = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CPU = Backend.cpu()


@pytest.fixture(scope="module", autouse=True)
def logs_of_failures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What failures leave goes where pytest cleans up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("logs")))
        yield


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with Ranks(2, backend=CPU) as ranks:
        yield ranks


@pytest.fixture
def pair() -> Iterator[Ranks]:
    """Two ranks to break."""
    with Ranks(2, backend=CPU) as ranks:
        yield ranks
    assert_gone(ranks.pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_gone(pids: list[int], within: float = 5.0) -> None:
    deadline = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [pid for pid in pids if alive(pid)] == []


def assert_eventually(condition: Callable[[], object], within: float = 10.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def listeners(pid: int) -> list[str]:
    """Local addresses (hexadecimal) on which a process listens."""
    inodes = {link[8:-1] for link in map(read_link, Path(f"/proc/{pid}/fd").iterdir()) if link.startswith("socket:[")}
    tables = [Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


def read_link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:  # the descriptor of the listing itself
        return ""


LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def rank_and_sum(scale: float) -> tuple[int, int, float, torch.Tensor]:
    total = torch.full((3,), scale * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), scale, total


def wait_in_collective() -> None:
    dist.all_reduce(torch.ones(1))


def clean_environment(**more: str) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
    kept = {key: value for key, value in os.environ.items() if key not in names and not key.startswith("TORCHELASTIC")}
    return {**kept, "PYTHONPATH": str(ROOT), "SHARDWISE_DEVICE": "cpu", **more}


# --- results ----------------------------------------------------------------------------------------------------------


@slow
def test_results_come_in_rank_order_and_the_group_reduces() -> None:
    results = run_ranks(rank_and_sum, 0.5, ranks=3, backend=CPU)
    assert [result[:3] for result in results] == [(0, 3, 0.5), (1, 3, 0.5), (2, 3, 0.5)]
    assert all(torch.equal(result[3], torch.full((3,), 3.0)) for result in results)


@slow
def test_one_rank() -> None:
    assert run_ranks(rank_and_sum, 2.0, ranks=1, backend=CPU)[0][:2] == (0, 1)


def test_no_ranks_are_refused() -> None:
    with pytest.raises(LaunchError, match="at least 1, but is 0"):
        run_ranks(rank_and_sum, 1.0, ranks=0)


@slow
def test_lambdas_and_closures_travel(pool: Ranks) -> None:
    offset = 7
    assert pool.run(lambda f: f(dist.get_rank()), lambda rank: rank + offset) == [7, 8]


@slow
def test_a_pool_runs_many_functions_in_the_same_processes(pool: Ranks) -> None:
    before = pool.pids
    start = time.monotonic()
    for step in range(20):
        assert [result[3][0].item() for result in pool.run(rank_and_sum, step)] == [3.0 * step] * 2
    assert time.monotonic() - start < 30
    assert pool.run(os.getpid) == before == pool.pids


@slow
def test_a_pool_leaks_neither_sockets_nor_groups(pool: Ranks) -> None:
    def count() -> int:
        dist.new_group([0, 1])
        return len(os.listdir("/proc/self/fd"))

    first = pool.run(count)
    for _ in range(5):
        last = pool.run(count)
    assert last == first


@slow
def test_a_view_is_sent_without_its_storage(pool: Ranks) -> None:
    def view() -> torch.Tensor:
        return torch.arange(1_000_000.0, requires_grad=True)[5:7] * 2

    for result in pool.run(view):
        assert result.tolist() == [10.0, 12.0]
        assert not result.requires_grad
        assert result.untyped_storage().nbytes() == 8


@slow
def test_threads_are_the_cores_shared_out(pool: Ranks) -> None:
    assert pool.threads == max(1, cores() // 2)
    assert (
        pool.run(lambda: (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]))
        == [(pool.threads, str(pool.threads))] * 2
    )
    assert run_ranks(torch.get_num_threads, ranks=1, threads=3, backend=CPU) == [3]


@slow
def test_a_job_from_a_file_travels_with_its_neighbours(pool: Ranks, tmp_path: Path) -> None:
    (tmp_path / "launch_helper_blocks.py").write_text("from torch import nn\nclass Block(nn.Linear): ...\n")
    (tmp_path / "spec.py").write_text(
        "import shardwise.job, launch_helper_blocks as blocks\n"
        "def job():\n    return shardwise.job.Job(model=lambda: blocks.Block(4, 2), data=[1, 2])\n"
    )
    job = load_spec(f"{tmp_path / 'spec.py'}:job")
    assert pool.run(lambda: job.build().weight.shape) == [torch.Size([2, 4])] * 2


@slow
def test_what_rank_0_prints_passes_through_and_all_is_logged(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def speak() -> None:
        print(f"loss of rank {dist.get_rank()}", end="\r")
        os.system("echo from a program")

    run_ranks(speak, ranks=2, log_dir=tmp_path / "logs", backend=CPU)
    assert capsys.readouterr().out == "loss of rank 0\r"
    for rank in range(2):
        log = (tmp_path / "logs" / f"rank{rank}.log").read_text()
        assert f"loss of rank {rank}" in log and "from a program" in log


@slow
def test_what_cannot_be_sent_is_said(pool: Ranks) -> None:
    with pytest.raises(LaunchError, match="cannot be sent to the ranks"):
        pool.run(print, threading.Lock())
    with pytest.raises(RunError, match=r"the result of rank \d, a lock, cannot be sent"):
        pool.run(threading.Lock)
    assert pool.usable


# --- security ---------------------------------------------------------------------------------------------------------


@slow
def test_everything_listens_on_loopback_only(pool: Ranks) -> None:
    def addresses() -> list[str]:
        dist.new_group([0, 1])
        wait_in_collective()
        return listeners(os.getpid())

    for found in pool.run(addresses):
        assert found and set(found) <= LOOPBACK


# --- failures ---------------------------------------------------------------------------------------------------------


@slow
def test_a_rank_that_raises_is_named_with_its_traceback_last(pair: Ranks) -> None:
    def fail_on_1() -> None:
        if dist.get_rank() == 1:
            raise ValueError("odd batch")
        wait_in_collective()

    start = time.monotonic()
    with pytest.raises(RunError, match=r"^rank 1 of 2 failed in .*fail_on_1 with ValueError: odd batch") as caught:
        pair.run(fail_on_1)
    assert time.monotonic() - start < 30
    assert str(caught.value).rstrip().endswith("ValueError: odd batch")
    log_dir = re.search(r"the logs are in (\S+);", str(caught.value))
    assert log_dir and "odd batch" in Path(log_dir[1], "rank1.log").read_text()


@slow
def test_an_error_of_ours_keeps_its_class_and_the_pool(pool: Ranks) -> None:
    def refuse() -> None:
        raise JobError("global_batch is 3, but 2 ranks need a multiple of 2")

    with pytest.raises(JobError, match=r"^global_batch is 3, but 2 ranks need a multiple of 2$") as caught:
        pool.run(refuse)
    assert "in refuse" in str(caught.value.__cause__)
    assert pool.run(dist.get_rank) == [0, 1]


@slow
def test_a_rank_that_fails_while_another_is_busy_breaks_the_pool(pair: Ranks) -> None:
    def fail_on_0() -> None:
        if dist.get_rank() == 0:
            raise JobError("no data")
        time.sleep(100)

    start = time.monotonic()
    with pytest.raises(JobError, match=r"^no data$"):
        pair.run(fail_on_0)
    assert time.monotonic() - start < 30
    assert_gone(pair.pids)
    with pytest.raises(RunError, match=r"cannot run get_rank, for .*fail_on_0 failed on them; start new Ranks"):
        pair.run(dist.get_rank)


@slow
def test_a_rank_that_leaves_a_collective_out_does_not_hang_the_others(pair: Ranks) -> None:
    def only_0() -> None:
        if dist.get_rank() == 0:
            wait_in_collective()

    with pytest.raises(RunError, match=r"(?s)rank 0 of 2 failed.*other ranks returned before: 1"):
        pair.run(only_0)


@slow
@pytest.mark.parametrize(
    ("end", "says"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"was killed by signal 9 \(SIGKILL\)"),
        (lambda: os._exit(7), "exited with code 7"),
    ],
)
def test_a_rank_that_dies_is_named(end: Callable[[], None], says: str) -> None:
    def die() -> None:
        if dist.get_rank() == 1:
            subprocess.Popen(["sleep", "1000"])
            end()
        wait_in_collective()

    with Ranks(2, backend=CPU) as ranks:
        start = time.monotonic()
        with pytest.raises(RunError, match=f"^rank 1 of 2 {says}"):
            ranks.run(die)
        assert time.monotonic() - start < 30
        assert_gone(ranks.pids)
        assert not in_session(ranks.pids)


def in_session(pids: list[int]) -> list[int]:
    """Processes of the sessions that these ranks led."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(int(entry.name)):
            try:
                session = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
            except OSError:
                continue
            found += [int(entry.name)] * (session in pids)
    return found


@slow
def test_a_stopped_rank_meets_the_time_out(pair: Ranks) -> None:
    def stop_1() -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        wait_in_collective()

    pair.run(dist.get_rank)  # started
    start = time.monotonic()
    with pytest.raises(RunError, match=r"(?s)longer than its time-out of 3 s; .*rank 1 of 2.*wait_in_collective"):
        pair.run(stop_1, timeout=3)
    assert time.monotonic() - start < 30
    assert_gone(pair.pids)


@slow
def test_a_collective_times_out_by_itself() -> None:
    def lag() -> None:
        if dist.get_rank() == 1:
            time.sleep(30)
        wait_in_collective()

    start = time.monotonic()
    with pytest.raises(RunError, match=r"(?s)^rank 0 of 2 failed.*\(other ranks stopped while running: 1\).*[Tt]ime"):
        run_ranks(lag, ranks=2, collective_timeout=4.0, backend=CPU)
    assert time.monotonic() - start < 30


@slow
def test_an_idle_rank_that_died_is_noticed(pair: Ranks) -> None:
    os.kill(pair.pids[0], signal.SIGKILL)
    with pytest.raises(RunError, match=r"^rank 0 of 2 was killed"):
        pair.run(wait_in_collective)


# --- the parent -------------------------------------------------------------------------------------------------------

PARENT = """
import signal
import time
from shardwise.engine.launch import Ranks

# A shell that starts this in the background would have it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
with Ranks(2) as ranks:
    def work():
        open(READY + str(time.time_ns()), "w").close()
        time.sleep(1000)
    print(*ranks.pids, flush=True)
    ranks.run(work)
"""


@slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_with_their_parent(number: signal.Signals, tmp_path: Path) -> None:
    logs, ready = tmp_path / "logs", tmp_path / "ready"
    logs.mkdir()
    ready.mkdir()
    code = PARENT.replace("READY", repr(f"{ready}/"))
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=clean_environment(TMPDIR=str(logs)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout and parent.stderr
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert_eventually(lambda: len(list(ready.iterdir())) == 2)
        parent.send_signal(number)
        assert parent.wait(10) == -number
        assert_gone(pids)
        assert number == signal.SIGKILL or "KeyboardInterrupt" in parent.stderr.read()
    assert len(pids) == 2


def held() -> tuple[int, int]:
    """How many descriptors and threads this process has."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@slow
def test_a_pool_outlives_the_thread_that_made_it_and_gives_everything_back() -> None:
    pools: list[Ranks] = []
    before = held()
    maker = threading.Thread(target=lambda: pools.append(Ranks(1, backend=CPU)))
    maker.start()
    maker.join()
    with pools[0] as ranks:
        assert ranks.run(dist.get_rank) == [0]
        log_dir = ranks.log_dir
        assert log_dir.is_dir()
    assert held() == before
    assert not log_dir.exists()
    assert_gone(ranks.pids)
    with pytest.raises(RunError, match="for they were closed"):
        ranks.run(dist.get_rank)


@slow
def test_a_pool_that_lost_a_rank_gives_back_what_it_held_for_an_idle_one() -> None:
    def leave() -> None:
        if dist.get_rank() == 1:
            time.sleep(0.5)  # rank 0 has answered, and nobody is told anything
            os._exit(3)

    before = held()
    with pytest.raises(RunError, match=r"^rank 1 of 2 exited with code 3"), Ranks(2, backend=CPU) as ranks:
        ranks.run(leave)
    assert held() == before


@slow
def test_a_pool_that_is_let_go_ends() -> None:
    ranks = Ranks(1, backend=CPU)
    assert ranks.run(dist.get_rank) == [0]
    pids = ranks.pids
    del ranks
    assert_gone(pids)
