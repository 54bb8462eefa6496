"""Parts of the server by themselves: how requests are read and gathered, how outputs become JSON, what is refused."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.cli import main
from shardwise.errors import JobError
from shardwise.graph.output import taken_apart
from shardwise.job import Job
from shardwise.serving.intake import Intake
from shardwise.serving.outputs import by_sample, columns, outline
from shardwise.serving.request import Answer, Refused, Request
from shardwise.serving.waiting import Waiting
from tests import served


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        return self.layer(x)


def job(sample: Any, **changes: Any) -> Job:
    return Job(model=Model, data=[sample], global_batch=4, **changes)


def read(intake: Intake, inputs: Any) -> list[Any]:
    return intake.read(json.dumps({"inputs": inputs}).encode()).request.rows


SAMPLE = {"x": torch.zeros(3), "mask": torch.tensor([True] * 3), "label": torch.tensor(1), "note": "unread"}


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_request_has_what_the_model_needs_unless_told_otherwise() -> None:
    own = Intake(job(SAMPLE), None, whole=False, most=4)
    assert own.names == ("x",)
    (row,) = read(own, {"x": [1, 2, 3]})
    assert list(row) == ["x"] and row["x"].dtype == torch.float32 and row["x"].tolist() == [1, 2, 3]
    both = Intake(job(SAMPLE), ["x", "mask"], whole=False, most=4)
    assert list(read(both, {"x": [1, 2, 3]})[0]) == ["x"]
    assert read(both, {"x": [1, 2, 3], "mask": [True, False, True]})[0]["mask"].tolist() == [True, False, True]
    with pytest.raises(Refused, match=r"lacks field 'mask'; a sample has 'x', 'mask'"):
        read(Intake(job(SAMPLE), ["x", "mask"], whole=True, most=4), {"x": [1, 2, 3]})
    with pytest.raises(JobError, match=r"no field 'note' that the model takes; they have 'x', 'mask', 'label'"):
        Intake(job(SAMPLE), ["note"], whole=False, most=4)


def test_samples_of_a_tuple_are_their_first_element() -> None:
    intake = Intake(job((torch.zeros(3), 1)), None, whole=False, most=4)
    assert [row[0].tolist() for row in read(intake, [[1, 2, 3], {"input": [4, 5, 6]}])] == [[1, 2, 3], [4, 5, 6]]
    assert intake.batch(read(intake, [[1, 2, 3]]))[0].shape == (1, 3)


@pytest.mark.parametrize(
    ("dtype", "given", "told"),
    [
        (torch.int64, 0.5, "holds torch.float64, but the job's own samples hold torch.int64"),
        (torch.uint8, 300, "holds 300 to 300, but the job's own samples hold torch.uint8; give numbers in its range"),
        (torch.int64, 2**63, "holds 9223372036854775808 to .*; give numbers in its range"),
        (torch.int64, "1" * 5000, "not JSON"),
        (torch.float16, 1e6, "too large for torch.float16"),
        (torch.bool, 1, "holds torch.int64, but the job's own samples hold torch.bool"),
    ],
)
def test_numbers_keep_their_values_or_are_refused(dtype: torch.dtype, given: Any, told: str) -> None:
    intake = Intake(job(torch.zeros(1, dtype=dtype)), None, whole=False, most=4)
    body = f'{{"inputs": {{"input": [{given}]}}}}'
    with pytest.raises(Refused, match=told):
        intake.read(body.encode())


def test_the_jobs_own_collate_sees_each_request_first() -> None:
    def lengths(rows: list[Any]) -> dict[str, Tensor]:
        return {"x": torch.stack([torch.full((len(row["text"]),), 1.0) for row in rows])}

    texts = job({"text": "abc"}, collate=lengths)
    intake = Intake(texts, None, whole=False, most=4)
    assert intake.batch(read(intake, {"text": "hello"}))["x"].shape == (1, 5)
    with pytest.raises(Refused, match=r"the job's collate does not take it: TypeError"):
        read(intake, {"text": 3})
    with pytest.raises(Refused, match=r"shape \[\(5,\)\] of it, but the model was captured with \[\(3,\)\]"):
        read(Intake(texts, None, whole=True, most=4), {"text": "hello"})
    labelled = job((torch.zeros(3), 1), collate=lambda rows: torch.stack([x + y for x, y in rows]))
    with pytest.raises(JobError, match=r"does not take samples with 'input' alone .* --fields"):
        Intake(labelled, None, whole=False, most=4)
    assert read(Intake(labelled, ["0", "1"], whole=False, most=4), {"0": [1, 2, 3], "1": 4})


def test_a_job_without_samples_is_refused() -> None:
    with pytest.raises(JobError, match="nobody knows what a sample looks like"):
        Intake(job(None).with_(data=[]), None, whole=False, most=4)


# --- gathering --------------------------------------------------------------------------------------------------------


def request(samples: int = 1, kind: str = "x", **changes: Any) -> Request:
    return Request([kind] * samples, (kind,), **changes)


def taken(waiting: Waiting, busy: int = 0, together: int = 1) -> list[int]:
    found = waiting.take(lambda: busy, together, lambda: False)
    assert found is not None
    return [len(one.rows) for one in found]


def test_a_batch_is_full_or_has_waited() -> None:
    waiting = Waiting(most=4, seconds=0.2, limit=100)
    for samples in (1, 2, 1, 3, 2):
        waiting.put(request(samples))
    began = time.monotonic()
    assert taken(waiting) == [1, 2, 1], "full"
    assert taken(waiting) == [3], "no room for the next, and requests are not divided"
    assert time.monotonic() - began < 0.1
    assert taken(waiting) == [2]
    assert time.monotonic() - began > 0.15, "the last one waited for others"
    assert waiting.samples == 0


def test_unlike_requests_are_not_computed_together() -> None:
    waiting = Waiting(most=4, seconds=0.0, limit=100)
    for kind in "aab":
        waiting.put(request(kind=kind))
    waiting.put_back([request(), request()], alone=True)
    assert [taken(waiting) for _ in range(4)] == [[1], [1], [1, 1], [1]]


def test_who_is_busy_is_given_only_a_full_batch() -> None:
    waiting = Waiting(most=2, seconds=0.0, limit=100)
    waiting.put(request())
    threading.Timer(0.2, lambda: waiting.put(request())).start()
    began = time.monotonic()
    assert taken(waiting, busy=1) == [1, 1]
    assert time.monotonic() - began > 0.1


def test_a_full_batch_goes_to_who_is_idle() -> None:
    waiting = Waiting(most=2, seconds=60.0, limit=100)
    found: list[str] = []

    def gather(name: str, busy: int) -> None:
        if waiting.take(lambda: busy, 1, lambda: False) is not None:
            found.append(name)

    threads = [threading.Thread(target=gather, args=pair, daemon=True) for pair in (("busy", 1), ("idle", 0))]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    waiting.put(request(2))
    threads[1].join(10)
    assert found == ["idle"]
    waiting.put(request(2))
    threads[0].join(10)
    assert found == ["idle", "busy"]


def test_who_gathers_ends_when_told() -> None:
    waiting = Waiting(most=2, seconds=60.0, limit=2)
    ended: list[bool] = []

    def end() -> None:
        ended.append(True)
        waiting.close()

    threading.Timer(0.1, end).start()
    assert waiting.take(lambda: 0, 1, lambda: bool(ended)) is None
    waiting.put(request())
    assert taken(waiting) == [1], "at the end nothing waits for others"
    waiting.put(request(3))  # more than ever may wait, but nothing does
    with pytest.raises(Refused, match="3 samples are waiting, and no more than 2 may"):
        waiting.put(request())
    waiting.drop(request())
    assert [len(one.rows) for one in waiting.drain()] == [3] and waiting.samples == 0


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_outputs_as_json() -> None:
    output = {
        "last": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, float("-inf")]]),  # samples last
        "nested": (torch.tensor([1j, 2 + 1j, 0]), [torch.tensor([True, False, True])]),
        "half": torch.ones(3, 1, dtype=torch.bfloat16),
        3: [None, "text", float("inf"), 2j],
    }
    form, tensors = taken_apart(output)
    answer = Answer(outline(form), columns(tensors, (1, 0, 0, 0)), 1, 3)
    told = {"half": [1.0], "3": [None, "text", "Infinity", [0.0, 2.0]]}
    assert json.loads(json.dumps(by_sample(answer), allow_nan=False)) == [
        {"last": [2.0, 5.0], "nested": [[2.0, 1.0], [False]], **told},
        {"last": [3.0, "-Infinity"], "nested": [[0.0, 0.0], [True]], **told},
    ]


# --- the command ------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *options: str, name: str = "split") -> str:
    assert main(["serve", f"{Path(served.__file__)}:{name}", *options]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


def test_bad_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "--port: must be a port from 0 to 65535, but is 'x'" in refused(capsys, "--port", "x")
    assert "--wait-ms: must be milliseconds from 0 to 60000, but is '-1'" in refused(capsys, "--wait-ms", "-1")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"no listening on 127.0.0.1, port {port}: Address already in use" in refused(capsys, "--port", port)
    assert "no listening on nowhere.invalid" in refused(capsys, "--host", "nowhere.invalid")
    (tmp_path / "plan").write_text("shardwise plan 1\naxis data 2 batch\n")
    told = refused(capsys, "--port", "0", "--plan", str(tmp_path / "plan"), "--ranks", "3")
    assert "the plan is for 2 ranks" in told
    assert "no field 'tokens' that the model takes; they have '0', '1'" in refused(
        capsys, "--port", "0", "--fields", "tokens", "--ranks", "1"
    )
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    for name in [name for name in sys.modules if name.startswith("shardwise.serving.web")]:
        monkeypatch.delitem(sys.modules, name)
    assert "shardwise serve needs starlette" in refused(capsys, "--port", "0")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert "run it without torchrun" in refused(capsys)
