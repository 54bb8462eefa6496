"""Servers that are started for one proof each: plans, ranks that end, models that cannot be served."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import shardwise as sw
from shardwise.engine.launch import Ranks
from shardwise.plan.plan import Plan
from tests import served
from tests.conftest import data, pipeline, tensor
from tests.served import Server
from tests.test_launch import assert_eventually, assert_gone

pytestmark = [
    pytest.mark.prove,
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
PLANS = {
    "data": Plan((data(),)),
    "tensor": Plan((tensor("width*"),)),
    "pipeline": Plan((pipeline(),), cuts=("linear.1",)),
    "pipeline in micro-batches": Plan((pipeline(),), cuts=("linear.1",), micro_batches=3),
    "data and tensor": Plan((data(), tensor("width*"))),
}
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SHORT = ("data", "tensor", "pipeline")


def started(name: str, plan: str, folder: Path, *options: str) -> Server:
    (folder / "plan").write_text(PLANS[plan].text())
    return Server(name, "--plan", str(folder / "plan"), *options)


@pytest.mark.parametrize(
    ("name", "plan"), [(name, plan) for plan in PLANS for name in ("split", "split64") if name[5:] or plan in SHORT]
)
def test_outputs_are_those_of_predict(name: str, plan: str, tmp_path: Path) -> None:
    job: sw.Job = getattr(served, name)()
    want: list[Any] = [torch.cat(parts) for parts in zip(*sw.predict(job, plan=PLANS[plan]), strict=True)]
    server = started(name, plan, tmp_path)
    try:
        requests = [[job.data[i][0].tolist() for i in range(a, b)] for a, b in ((0, 8), (8, 9), (9, 11), (11, 16))]
        requests += [[job.data[i][0].tolist()] for i in range(16, 40)]
        with ThreadPoolExecutor(24) as clients:
            found = [output for outputs in clients.map(server.outputs, requests) for output in outputs]
    finally:
        status, _, err = server.end(signal.SIGTERM)
    assert status == 0 and err == ""
    for number, tensor_ in enumerate(want):
        got = torch.tensor([one[number] for one in found], dtype=tensor_.dtype)
        bound = 1e-9 if name == "split64" else 1e-5
        torch.testing.assert_close(got, tensor_, rtol=bound, atol=bound)


def test_a_split_replica_starts_again(tmp_path: Path) -> None:
    server = started("split", "pipeline", tmp_path)
    try:
        want = server.outputs([[1] * 6])
        before = server.ranks
        # A sample that the first stage raises on, while the other waits for it.
        with ThreadPoolExecutor(4) as clients:
            found = list(clients.map(server.ask, [[[1000 if i == 2 else 1] * 6] for i in range(4)]))
        assert found[2][0] == 500 and "the model failed on it: IndexError" in found[2][1]["error"]
        assert all(answer == (200, {"outputs": want}) for i, answer in enumerate(found) if i != 2 and answer[0] != 503)
        assert_eventually(lambda: server.health()[0] == 200, within=60)
        assert server.outputs([[1] * 6]) == want
        for pid in server.ranks[1:]:
            os.kill(pid, signal.SIGKILL)
        assert_eventually(lambda: server.health()[0] == 503)
        assert_eventually(lambda: server.health()[0] == 200, within=60)
        assert server.outputs([[1] * 6]) == want
        assert_gone(before)
    finally:
        server.end(signal.SIGKILL)


def test_no_rank_outlives_a_killed_server() -> None:
    server = Server("obedient", "--ranks", "2")
    ranks = server.ranks
    assert len(ranks) == 2
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(server.ask, {"x": [1.0, 0.0, 0.0, 0.0]})
        server.process.kill()
        with pytest.raises(ConnectionError):
            asked.result()
    assert_gone(ranks)
    server.end(signal.SIGKILL)


def test_ranks_that_end_again_and_again_end_the_server(tmp_path: Path) -> None:
    server = Server("breaks", "--ranks", "1", folder=tmp_path)
    ranks = server.ranks
    assert server.outputs([[1, 2, 3]])
    os.kill(ranks[0], signal.SIGKILL)
    server.process.wait(timeout=120)
    status, _, err = server.end(signal.SIGTERM)
    assert status == 2 and "it was built before" in err
    assert err.strip().splitlines()[-1].startswith("shardwise: error: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "plan", "told"),
    [
        ("scalar", "data", "every output must have a dim for the samples"),
        ("eight", "data", "does not run on 2 of the job's samples: RuntimeError: shape '[8, 6]' is invalid"),
        ("eight", "tensor", "the model fixes its batch at 8 samples, but a batch has 1; .* splits the batch alone"),
        ("split", "nowhere", "cuts before 'nowhere', but the model has no such operator"),
        ("breaks", "", "it was built before"),
    ],
)
def test_what_cannot_be_served_is_refused(name: str, plan: str, told: str, tmp_path: Path) -> None:
    plans = {**PLANS, "nowhere": Plan((pipeline(),), cuts=("nowhere",))}
    (tmp_path / "built").touch()
    options = ["--ranks", "1"]
    if plan:
        (tmp_path / "plan").write_text(plans[plan].text())
        options = ["--plan", str(tmp_path / "plan")]
    with pytest.raises(RuntimeError, match=told if ".*" in told else re.escape(told)) as refused:
        Server(name, *options, folder=tmp_path)
    assert str(refused.value).count("\n") == 1


def test_a_stop_while_it_starts_leaves_nothing() -> None:
    command = [sys.executable, "-m", "shardwise.cli", "serve", f"{served.__file__}:split", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    found: list[int] = []
    limit = time.monotonic() + 60
    while len(found) < 2 and time.monotonic() < limit:
        found = children(process.pid)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == "\nshardwise: interrupted\n"
    assert_gone(found)


def children(pid: int) -> list[int]:
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (thread / "children").read_text().split())
    return found


@pytest.mark.parametrize(
    ("block", "spec", "options"), [(1, "letters.py:job", ()), (2, "writer.py:job", ("--generate", "64"))]
)
def test_the_page_shows_what_the_example_answers(block: int, spec: str, options: tuple[str, ...]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    shown = page.split("```console\n")[block].partition("```")[0].splitlines()
    server = Server(f"{EXAMPLES}/{spec}", "--ranks", "2", *options)
    try:
        for command, answer in zip(shown[::2], shown[1::2], strict=True):
            path, _, body = command.partition("127.0.0.1:8000")[2].partition(" -d ")
            found = server.send("POST" if body else "GET", path, shlex.split(body)[0] if body else None)[2]
            assert found.decode() == answer
    finally:
        server.end(signal.SIGTERM)


def test_ranks_of_a_second_replica_have_devices_of_their_own() -> None:
    with Ranks(2, threads=1, first=2) as ranks:
        assert ranks.run(_local_rank) == ["2", "3"]


def _local_rank() -> str:
    return os.environ["LOCAL_RANK"]
