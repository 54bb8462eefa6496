"""Jobs that tests serve, and a client of a served one. Sample values say what a model is to do with them."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise.job import Job

SLEEP, RAISE, ROOT = 0, 1, 2
"""Fields of `x`: seconds to sleep, whether to raise, and what the root is taken of."""


class Obedient(nn.Module):
    """Sleeps, raises, or gives a number that is not finite, as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Any]:
        time.sleep(float(x[:, SLEEP].max().clamp(min=0)))
        if bool((x[:, RAISE] == 1).any()):
            raise ValueError("a sample is told to raise")
        scores = self.layer(x) if scale is None else self.layer(x) * scale[:, None]
        return {"scores": scores, "more": (x[:, ROOT].sqrt(), "text", 3)}


def obedient() -> Job:
    data = [{"x": torch.zeros(4), "scale": torch.tensor(1.0), "label": torch.tensor(0)}]
    return Job(model=Obedient, data=data, global_batch=8)


class Split(nn.Module):
    """Layers that every plan splits; a sample whose first number is 1000 makes the first rank raise."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.one, self.two = nn.Linear(16, 64), nn.Linear(64, 4)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.one(self.table(tokens)).tanh()
        return self.two(hidden), hidden.sum((1, 2))


def split() -> Job:
    tokens = torch.randint(50, (40, 6), generator=torch.Generator().manual_seed(0))
    return Job(model=Split, data=TensorDataset(tokens, tokens), global_batch=8)


def split64() -> Job:
    return split().with_(model=lambda: Split().double())


def scalar() -> Job:
    """Whose output belongs to no sample."""
    job = split()
    return job.with_(model=Mean)


class Eight(Split):
    def forward(self, tokens: Tensor) -> Any:
        return super().forward(tokens.view(8, 6))


def eight() -> Job:
    """Whose model takes eight samples and no other number."""
    return split().with_(model=Eight)


class Mean(Split):
    def forward(self, tokens: Tensor) -> Any:
        return super().forward(tokens)[0].mean()


def writer() -> Job:
    """Which generates, in float64."""
    from tests.zoo import generating

    return generating.buffered().with_(model=lambda: generating.Buffered().double())


def breaks() -> Job:
    """Which is built once, and never again."""
    if os.path.exists("built"):
        raise ValueError("it was built before")
    return Job(model=_Once, data=TensorDataset(torch.zeros(4, 3)), global_batch=2)


class _Once(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        Path("built").touch()
        return super().forward(x)


class Server:
    """`shardwise serve` as a process of its own, and a client of it.

    Args:
        name: of a function here, or a SPEC.
        options: of the command.
        folder: where it runs.

    Attributes:
        before: the lines that it printed before it served.
        first: the line that says what it serves.
    """

    first = ""

    def __init__(self, name: str, *options: str, folder: Path | None = None) -> None:
        spec = name if ":" in name else f"{Path(__file__).resolve()}:{name}"
        root = str(Path(__file__).resolve().parent.parent)
        command = [sys.executable, "-m", "shardwise.cli", "serve", spec, "--port", "0", *options]
        self.process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.before = list(itertools.takewhile(lambda line: not line.startswith("http"), self._lines()))
        found = re.match(r"http://([0-9.]+):([0-9]+) ", self.first)
        if found is None:
            raise RuntimeError(self.process.communicate()[1])
        self.host, self.port = found[1], int(found[2])

    def _lines(self) -> Iterator[str]:
        """What it prints, of which the last so far is `first`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.first = line
            yield line

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """The status, the headers and the body of an answer."""
        line = http.client.HTTPConnection(self.host, self.port, timeout=60)
        with contextlib.closing(line):
            line.request(method, path, body, headers or {})
            answer = line.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()

    def ask(self, inputs: Any, path: str = "/predict", **more: Any) -> tuple[int, Any]:
        status, _, body = self.send("POST", path, json.dumps({"inputs": inputs, **more}))
        return status, json.loads(body)

    def outputs(self, inputs: Any) -> Any:
        status, found = self.ask(inputs)
        assert status == 200, found
        return found["outputs"]

    def health(self) -> tuple[int, Any]:
        status, _, body = self.send("GET", "/healthz")
        return status, json.loads(body)

    def metric(self, name: str) -> float:
        """A number of /metrics; 0 of one that is not there yet."""
        text = self.send("GET", "/metrics")[2].decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    @property
    def ranks(self) -> list[int]:
        """Process ids."""
        found: list[int] = []
        for thread in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += map(int, (thread / "children").read_text().split())
        return sorted(found)

    def end(self, number: int) -> tuple[int, str, str]:
        """Sends a signal; the exit status, and what was printed."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, self.first + out, err
