"""`shardwise serve --generate`: the tokens behind prompts over HTTP, compared with one device that keeps no cache."""

from __future__ import annotations

import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.inference.completion import Wanted, complete
from shardwise.inference.limits import Demand
from shardwise.inference.sampling import Sampling
from shardwise.inference.steps import ModuleSteps
from shardwise.plan.plan import Plan
from shardwise.serving.prompts import Prompts
from shardwise.serving.request import Refused
from tests import served
from tests.conftest import pipeline, tensor
from tests.served import Server
from tests.test_generate import cut, one_device
from tests.test_serve_parts import refused

POSITIONS = 40
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9], [5, 4, 3, 2, 1], list(range(60, 30, -1)), [64], [11, 12, 13, 14, 15]]
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "seed": 7},
    {"temperature": 1.0, "seed": 8},
    {"tokens": 3},
    {"tokens": 1},
    {"temperature": 1.5, "seed": 7, "tokens": 9},
]


def expected(way: dict[str, Any], prompt: list[int]) -> list[int]:
    """What one device puts behind a prompt; as many tokens as there is room for, where the request does not say."""
    sampling = Sampling(**{key: value for key, value in way.items() if key != "tokens"})
    return one_device(served.writer(), [prompt], way.get("tokens", POSITIONS - len(prompt) + 1), sampling)[0]


def plans() -> dict[str, Plan]:
    job = served.writer()
    return {"tensor": Plan((tensor(),)), "pipeline": Plan((pipeline(),), cut(job, 2))}


# --- a server ---------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(200)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "plan", [None, pytest.param("tensor", marks=pytest.mark.slow), pytest.param("pipeline", marks=pytest.mark.prove)]
)
def test_tokens_are_those_of_one_device(plan: str | None, tmp_path: Path) -> None:
    """Of requests at a time that want unlike things; and what does not fit hurts nobody beside it."""
    options = ["--ranks", "1"]
    if plan is not None:
        (tmp_path / "plan").write_text(plans()[plan].text())
        options = ["--plan", str(tmp_path / "plan")]
    server = Server("writer", "--generate", str(POSITIONS), "--wait-ms", "1000", *options)
    try:
        assert f"batches of up to 4 prompts of one length, each with its new tokens in up to {POSITIONS} positions" in (
            server.first
        )
        asked = [(way, prompt) for way, prompt in zip(WAYS * 2, PROMPTS + PROMPTS[::-1], strict=True)]
        odd = [({}, [1, 2, 3, 4, 128]), ({}, [127, 3, 2, 1, 1 << 40])]
        with ThreadPoolExecutor(len(asked + odd)) as clients:
            found = list(clients.map(lambda one: server.ask(one[1], "/generate", **one[0]), asked + odd))
        for (way, prompt), (status, answer) in zip(asked, found, strict=False):
            assert (status, answer) == (200, {"outputs": expected(way, prompt)}), (way, prompt)
        for (_, prompt), (status, answer) in zip(odd, found[len(asked) :], strict=True):
            told = f"token {prompt[-1]} is in the prompt, but the model has a vocabulary of 128"
            assert status == 422
            assert answer == {
                "error": told, "field": "inputs", "expected": "tokens from 0 to 127", "given": prompt[-1]
            }  # fmt: skip
        assert server.metric("shardwise_samples_total") == len(asked)
        assert server.metric("shardwise_batch_samples_count") < len(asked), "no two prompts went together"
        assert server.metric("shardwise_restarts_total") == 0
        new = sum(len(answer["outputs"]) for _, answer in found[: len(asked)])
        assert server.metric("shardwise_new_tokens_total") == new
        status, _, body = server.send("POST", "/predict", "{}")
        assert status == 404 and b"there is POST /generate, GET /healthz, GET /metrics" in body
    finally:
        status, _, err = server.end(signal.SIGTERM)
    assert status == 0 and err == ""


# --- its parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("[1, 2", "400 the body is not JSON"),
        ("[1, 2]", '422 the body must be an object with "inputs": a list of tokens; it is a list'),
        ('{"prompt": [1]}', "422 the body must be an object with \"inputs\": a list of tokens; it has 'prompt'"),
        ('{"inputs": []}', "422 the prompt is empty"),
        ('{"inputs": "text"}', "422 the prompt has 'text'; tokens are whole numbers"),
        ('{"inputs": [1, 2.5]}', "422 the prompt is of torch.float32; tokens are whole numbers"),
        ('{"inputs": [[1], [2]]}', "422 the prompt has the shape [2, 1]; give tokens in one dim"),
        ('{"inputs": [1, -2]}', "422 the prompt has token -2; tokens are 0 or more"),
        ('{"inputs": [1, 99999999999999999999]}', "422 the prompt has 99999999999999999999; tokens are whole"),
        ('{"inputs": [1, 2, 3, 4, 5, 6, 7]}', "422 the prompt has 7 tokens, but there are 6 positions"),
        ('{"inputs": [1, 2], "tokens": 6}', "422 2 tokens and 6 new ones have 7 positions, but"),
        ('{"inputs": [1], "tokens": 0}', "422 'tokens' must be a whole number from 1 on"),
        ('{"inputs": [1], "tokens": true}', "422 'tokens' must be a whole number from 1 on"),
        ('{"inputs": [1], "max_tokens": 3}', "422 there is no 'max_tokens'; beside \"inputs\" there are 'tokens'"),
        ('{"inputs": [1], "temperature": 0}', "422 'temperature' must be a number above 0"),
        ('{"inputs": [1], "temperature": 1e999}', "422 'temperature' must be a number above 0"),
        ('{"inputs": [1], "temperature": "hot"}', "422 'temperature' must be a number above 0"),
        ('{"inputs": [1], "top_k": 5}', "422 top_k and top_p say what to draw from, but nothing is drawn without"),
        ('{"inputs": [1], "temperature": 1, "top_p": 2}', "422 top_p must be above 0 and at most 1, but is 2"),
        ('{"inputs": [1], "end": [1, "x"]}', "422 'end' must be a token, or a list of them"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_told_in_one_message(body: str, told: str) -> None:
    with pytest.raises(Refused) as refused:
        Prompts(6, 0).read(body.encode())
    assert f"{refused.value.status} {refused.value.message}".startswith(told)


def test_a_request_is_read() -> None:
    prompts = Prompts(POSITIONS, seed=3)
    asked = prompts.read(b'{"inputs": [4, 5]}').request.rows[0]
    assert asked.prompt.tolist() == [4, 5] and asked.wanted == Wanted(POSITIONS - 1, Sampling(seed=3), ())
    asked = prompts.read(b'{"inputs": [4], "tokens": 40, "temperature": 2, "end": 9, "seed": null}').request.rows[0]
    assert asked.wanted == Wanted(40, Sampling(2, seed=3), (9,))
    assert prompts.read(b'{"inputs": [4], "end": [9, 8]}').request.rows[0].wanted.end == (9, 8)
    assert Prompts(500, 0).read(b'{"inputs": [4]}').request.rows[0].wanted.tokens == 64


def test_each_prompt_of_a_group_gets_what_it_would_get_alone() -> None:
    """Unlike numbers of tokens, ends and draws; in groups that are as large as the cache, and smaller."""
    steps = ModuleSteps(served.writer(), Demand(POSITIONS, 4, 0), torch.device("cpu"), None)
    assert steps.vocabulary() == 128
    prompts = [torch.tensor(prompt) for prompt in (PROMPTS[0], PROMPTS[2], PROMPTS[5])]
    first = one_device(served.writer(), [PROMPTS[0]], 12, Sampling())[0]
    wanted = [Wanted(12, Sampling(), (first[4],)), Wanted(3, Sampling(), ()), Wanted(9, Sampling(1.5, seed=4), ())]
    found = complete(steps, prompts, [0, 0, 5], wanted)
    assert found[0].tolist() == first[: first.index(first[4]) + 1]
    assert found[1].tolist() == one_device(served.writer(), [PROMPTS[2]], 3, Sampling())[0]
    (alone,) = complete(steps, prompts[2:], [5], wanted[2:])
    assert found[2].tolist() == alone.tolist() and len(alone) == 9


def test_bad_commands(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--generate", "8", "--ranks", "1", "--port", "0")
    told = refused(capsys, *given, "--precision", "int8", name="writer")
    assert "--precision is for outputs, and --generate serves tokens; leave one of them out" in told
    assert "--fields is for outputs" in refused(capsys, *given, "--fields", "x", name="writer")
    assert "Split keeps no cache to generate with" in refused(capsys, *given, name="split")
    told = refused(capsys, "--generate", "65", "--ranks", "1", "--port", "0", name="writer")
    assert "are 65 positions, but Buffered has 64" in told
