"""The server as its clients see it, over HTTP: one live server for all, with two ranks that each are a replica."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils.data import Subset

import shardwise as sw
from shardwise.plan.plan import Plan
from shardwise.report.planned import why
from shardwise.search.space import Options
from tests.served import Server, obedient, split
from tests.test_launch import assert_eventually, assert_gone

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(200),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
BATCH, QUEUE, LIMIT = 8, 64, 1_000_000


class Live:
    """A server, another one where it has ended: tests are in no order where several processes share them."""

    server: Server | None = None

    def __call__(self) -> Server:
        if self.server is None or self.server.process.poll() is not None:
            options = ("--ranks", "2", "--queue", str(QUEUE), "--max-bytes", str(LIMIT), "--wait-ms", "20")
            self.server = Server("obedient", *options)
        return self.server


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    found = Live()
    try:
        yield found
    finally:
        if found.server is not None:
            found.server.end(signal.SIGKILL)


@pytest.fixture
def server(live: Live) -> Server:
    return live()


def x(a: float = 0.0, b: float = 0.0, c: float = 4.0, d: float = 1.0) -> dict[str, list[float]]:
    return {"x": [a, b, c, d]}


def test_the_first_line_says_what_is_served(server: Server) -> None:
    assert "serves obedient: data 2, 2 ranks in 2 replicas, batches of up to 8 samples with x" in server.first
    assert server.host == "127.0.0.1"
    assert server.health() == (200, {"status": "ok", "replicas": 2, "ready": 2})


def test_a_plan_is_chosen_and_weights_are_held_as_asked_for() -> None:
    server = Server("split", "--ranks", "2", "--objective", "memory", "--precision", "int8")
    try:
        plan: Plan = why(split(), 2, Options("memory", purpose="predict"))[0]
        assert plan.ranks == 2 and not plan.data, "a replica on each rank has all weights on both"
        shown = "".join(server.before)
        assert shown.startswith(f"{plan.text()}\n") and plan.explain().partition(" on this ")[2] in shown
        assert f"{plan.title()}, 2 ranks, weights in int8, batches of up to 8 samples" in server.first
        tokens = split().batch(range(8))[0]
        found = server.outputs(tokens.tolist())
    finally:
        server.end(signal.SIGKILL)
    (want,) = sw.predict(split(), Subset(split().data, range(8)), plan, precision="int8")
    plain = split().build()(tokens)
    for number, tensor in enumerate(want):
        got = torch.tensor([one[number] for one in found])
        torch.testing.assert_close(got, tensor, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got, plain[number], rtol=1e-5, atol=1e-5)


def test_outputs_are_the_models_in_its_own_structure(server: Server) -> None:
    model = obedient().build().eval()
    rows = torch.randn(BATCH, 4, generator=torch.Generator().manual_seed(0))
    rows[:, :2] = -rows[:, :2].abs()
    rows[:, 2] = rows[:, 2].abs()
    with torch.no_grad():
        want = model(rows)
    found = server.outputs([{"x": row.tolist()} for row in rows])
    assert [list(one) for one in found] == [["scores", "more"]] * BATCH
    torch.testing.assert_close(torch.tensor([one["scores"] for one in found]), want["scores"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor([one["more"][0] for one in found]), want["more"][0])
    assert found[0]["more"][1:] == ["text", 3]
    assert server.outputs({"x": rows[3].tolist()})["scores"] == pytest.approx(want["scores"][3].tolist(), rel=1e-5)
    # A list of samples may leave out their names, where there is one field.
    assert server.outputs([rows[0].tolist()])[0]["scores"] == pytest.approx(want["scores"][0].tolist(), rel=1e-5)


def test_numbers_that_json_has_not_are_texts(server: Server) -> None:
    assert server.outputs(x(c=-1.0))["more"][0] == "NaN"
    status, headers, body = server.send("POST", "/predict", json.dumps({"inputs": x(c=-1.0)}))
    assert status == 200 and headers["content-type"] == "application/json"
    assert body.count(b"NaN") == body.count(b'"NaN"') == 1


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ("{", 400, {"error": "the body is not JSON: Expecting property name"}),
        (b"\xff\xfe", 400, {"error": "the body is not JSON"}),
        ('{"inputs": {"x": [1, 2, NaN, 4]}}', 400, {"error": "NaN is no number of JSON"}),
        ("[" * 100_000, 400, {"error": "nested too deep"}),
        ("", 400, {"error": "the body is not JSON"}),
        ("[1, 2]", 422, {"error": 'must be an object with "inputs"', "field": "inputs"}),
        ('{"input": 1}', 422, {"error": "it has 'input'", "field": "inputs"}),
        ('{"inputs": []}', 422, {"error": '"inputs" has 0 samples; give at least 1', "given": 0}),
        (json.dumps({"inputs": [x()] * 9}), 422, {"error": "has 9 samples; give at most 8 at a time", "given": 9}),
        ('{"inputs": {"y": 1}}', 422, {"error": "lacks field 'x'", "field": "x", "given": ["y"]}),
        ('{"inputs": {"x": [1, 2, 3, 4], "z": 1}}', 422, {"error": "unknown field 'z'", "field": "z"}),
        ('{"inputs": {"x": [1, 2]}}', 422, {"error": "shape (2,), but", "field": "x", "expected": [4], "given": [2]}),
        ('{"inputs": [{"x": [0, 0, 0, 0]}, {"x": 3}]}', 422, {"error": "sample 1: field 'x'", "given": []}),
        ('{"inputs": {"x": ["a", "b", "c", "d"]}}', 422, {"error": "has texts", "field": "x", "given": "texts"}),
        ('{"inputs": {"x": [[1], [2, 3]]}}', 422, {"error": "lists of unlike lengths", "field": "x"}),
        ('{"inputs": {"x": [0, 0, 0, 1e39]}}', 422, {"error": "too large for torch.float32", "field": "x"}),
        ('{"inputs": {"x": null}}', 422, {"error": "values that are not numbers", "field": "x"}),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_one_message(server: Server, body: Any, status: int, told: dict[str, Any]) -> None:
    found, _, answer = server.send("POST", "/predict", body)
    said = json.loads(answer)
    assert found == status, said
    assert told.pop("error") in said["error"] and "\n" not in said["error"]
    assert {key: said[key] for key in told} == told


def test_other_paths_are_told_which_there_are(server: Server) -> None:
    for method, path, status in (("GET", "/predict", 405), ("POST", "/", 404)):
        found, _, body = server.send(method, path, "{}")
        assert found == status and "there is POST /predict" in json.loads(body)["error"]


def peak(process: int) -> int:
    """Bytes resident at the peak."""
    with open(f"/proc/{process}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


@pytest.mark.parametrize("length", ["told", "untold"])
def test_100_megabytes_are_refused_and_not_kept(server: Server, length: str) -> None:
    before = peak(server.process.pid)
    body = iter([bytes(1 << 20)] * 100)
    headers = {"Content-Length": str(100 << 20)} if length == "told" else {}  # http.client then sends chunks
    status, _, answer = server.send("POST", "/predict", body, headers)
    assert status == 413 and "may have 1,000,000" in json.loads(answer)["error"]
    assert peak(server.process.pid) - before < 30e6


def test_clients_that_leave_hurt_nobody(server: Server) -> None:
    gone = 'shardwise_requests_total{status="499"}'
    before, computed = server.metric(gone), server.metric("shardwise_samples_total")
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection((server.host, server.port)) as line:  # in the middle of the body
        line.sendall(head % 1000 + b'{"inputs"')
    body = json.dumps({"inputs": [x(a=0.3)] * BATCH}).encode()
    lines = [socket.create_connection((server.host, server.port)) for _ in range(6)]
    for line in lines:  # while they are computed, and while they wait
        line.sendall(head % len(body) + body)
    time.sleep(0.1)
    for line in lines:
        line.close()
    assert server.outputs(x())["more"][0] == 2.0
    assert_eventually(lambda: server.metric(gone) == before + 7)
    assert server.metric("shardwise_waiting_samples") == 0
    assert server.metric("shardwise_samples_total") <= computed + 4 * BATCH + 1, "what nobody waits for is not computed"


def test_requests_at_a_time_are_gathered(server: Server) -> None:
    batches = "shardwise_batch_samples_count"
    before = server.metric(batches)
    with ThreadPoolExecutor(52) as clients:
        # Both replicas are at work on a batch, and have one more, while the others come, however slowly they do.
        slow = [clients.submit(server.outputs, [x(a=1.0)] * BATCH) for _ in range(4)]
        time.sleep(0.2)
        found = list(clients.map(server.outputs, [x(c=float(i * i)) for i in range(48)]))
        assert all(len(one.result()) == BATCH for one in slow)
    assert [one["more"][0] for one in found] == list(range(48)), "each has its own"
    left = 4  # of the clients of another test that have gone
    assert server.metric(batches) - before <= left + 4 + 2 * 48 / BATCH


def test_a_field_may_be_left_out_and_some_have_it(server: Server) -> None:
    # Not both of them are computed at once, which would not make a batch.
    assert server.ask([x(), {**x(), "scale": 1.0}])[0] == 422


def test_a_sample_that_the_model_fails_on_fails_alone(server: Server) -> None:
    with ThreadPoolExecutor(12) as clients:
        found = list(clients.map(server.ask, [x(b=1.0 if i == 5 else 0.0, c=float(i * i)) for i in range(12)]))
    assert found[5] == (500, {"error": "the model failed on it: ValueError: a sample is told to raise"})
    assert [one["outputs"]["more"][0] for status, one in found if status == 200] == [i for i in range(12) if i != 5]
    assert server.health()[1]["status"] == "ok"


def test_beyond_the_queue_there_is_503(server: Server) -> None:
    def ask(_: int) -> tuple[int, dict[str, str], bytes]:
        return server.send("POST", "/predict", json.dumps({"inputs": [x(a=0.4)] * BATCH}))

    with ThreadPoolExecutor(20) as clients:
        found = list(clients.map(ask, range(20)))
    refused = [(headers, json.loads(body)["error"]) for status, headers, body in found if status == 503]
    # Each of two replicas computes one and has one more; so many wait.
    assert [status for status, _, _ in found].count(200) == 4 + QUEUE // BATCH
    assert len(refused) == 20 - 4 - QUEUE // BATCH
    assert all(headers["retry-after"] == "1" for headers, _ in refused)
    assert refused[0][1] == "64 samples are waiting, and no more than 64 may; send it again later"


def test_a_killed_rank_is_started_again(server: Server) -> None:
    with ThreadPoolExecutor(4) as clients:
        slow = [clients.submit(server.ask, [x(a=1.0)] * BATCH) for _ in range(2)]
        time.sleep(0.4)
        before, restarts = server.ranks, server.metric("shardwise_restarts_total")
        os.kill(before[0], signal.SIGKILL)
        found = sorted((asked.result() for asked in slow), key=lambda answer: answer[0])
    assert [status for status, _ in found] == [200, 503], "the other replica answers what it has"
    assert found[1][1]["error"] == "the ranks that computed it ended, and are started again; send it again"
    assert server.outputs(x())["more"][0] == 2.0, "and what comes meanwhile"
    assert server.health() == (200, {"status": "degraded", "replicas": 2, "ready": 1})
    assert_eventually(lambda: server.health()[1]["status"] == "ok", within=60)
    assert server.metric("shardwise_restarts_total") == restarts + 1 and server.metric("shardwise_restart_seconds") > 0
    assert before[1] in server.ranks and before[0] not in server.ranks


@pytest.mark.prove
def test_without_a_rank_there_is_503_until_one_is_back(server: Server) -> None:
    for pid in server.ranks:
        os.kill(pid, signal.SIGKILL)
    assert_eventually(lambda: server.health()[0] == 503)
    status, headers, body = server.send("POST", "/predict", json.dumps({"inputs": x()}))
    assert status == 503 and headers["retry-after"] == "1"
    assert json.loads(body)["error"].startswith("no replica answers now; they are started again")
    assert_eventually(lambda: server.health()[1]["status"] == "ok", within=60)
    assert server.outputs(x())["more"][0] == 2.0


def test_a_stop_under_load_loses_nothing(server: Server) -> None:
    ranks, stopping = server.ranks, threading.Event()
    answered: list[int] = []
    broken: list[str] = []

    def client(number: int) -> None:
        while True:
            with contextlib.closing(http.client.HTTPConnection(server.host, server.port, timeout=30)) as line:
                try:
                    line.request("POST", "/predict", json.dumps({"inputs": x(a=0.1, c=float(number * number))}))
                except ConnectionError:  # it takes no more
                    return
                try:
                    answer = line.getresponse()
                    body = answer.read()
                    assert json.loads(body)["outputs"]["more"][0] == number
                    answered.append(answer.status)
                except (ConnectionError, http.client.HTTPException) as error:
                    if not stopping.is_set():
                        broken.append(repr(error))
                    return

    clients = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in clients:
        thread.start()
    assert_eventually(lambda: len(answered) > 32)
    with ThreadPoolExecutor(1) as one:
        accepted = one.submit(server.outputs, [x(a=1.0)] * BATCH)
        time.sleep(0.3)
        stopping.set()
        status, out, err = server.end(signal.SIGTERM)
        assert len(accepted.result()) == BATCH, "what was let in is answered"
    for thread in clients:
        thread.join()
    assert status == 0 and "stopped after" in out
    assert broken == [] and set(answered) == {200}
    assert_gone(ranks)
    told = [line for line in err.splitlines() if line.strip() and not line.startswith("shardwise: replica")]
    assert told == [], "no trace of clients that left"
