"""The examples, and the README's code, run as a reader would run them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.graph.graph import Graph
from shardwise.graph.rules import table
from shardwise.job import load_spec
from shardwise.plan.plan import Plan
from tests.test_docs import READMES, ROOT, scripts

pytestmark = pytest.mark.slow

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")
_LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def run(*words: str, where: Path = ROOT, timeout: float = 120, **environment: str) -> str:
    """What a Python command prints; it has to succeed."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCH}
    kept |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SHARDWISE_DEVICE": "cpu", **environment}
    done = subprocess.run(
        [sys.executable, *words], cwd=where, env=kept, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def shardwise(*words: str, **more: Any) -> Any:
    """What a command answers with --json."""
    return json.loads(run("-m", "shardwise.cli", *words, "--json", **more))


def losses(printed: str) -> list[str]:
    return re.findall(r"^step \d+: loss (\S+)$", printed, re.MULTILINE)


def test_a_loop_of_ones_own_gives_the_same_losses_on_one_rank_and_on_two() -> None:
    example = "examples/torchrun_loop.py"
    alone = run(example, "6")
    together = run(*TORCHRUN, example, "6")
    assert len(losses(alone)) == 6
    assert losses(alone) == losses(together)
    assert float(losses(alone)[-1]) < float(losses(alone)[0])
    assert "trained on 1 ranks as one rank" in alone
    assert re.search(r"\d+ tensors, trained on 2 ranks as (data|tensor|pipeline) 2", together)


@pytest.mark.prove
def test_the_language_model_is_planned_and_trained_on_a_text_of_ones_own(tmp_path: Path) -> None:
    text, plan = tmp_path / "text.txt", tmp_path / "plan.txt"
    text.write_text("to be or not to be, that is the question. " * 40)
    spec = "examples/byte_lm.py:job"
    chosen = shardwise("plan", spec, "--ranks", "2", "--out", str(plan), TEXT=str(text))
    assert Plan.parse(plan.read_text()) == Plan.from_json(json.dumps(chosen["plan"]))
    found = shardwise("train", spec, "--plan", str(plan), "--steps", "8", TEXT=str(text))
    assert found["ranks"] == 2
    assert len(found["losses"]) == 8
    assert found["losses"][-1] < found["losses"][0] - 0.5


@pytest.mark.prove
def test_the_writer_writes_what_the_language_model_says(tmp_path: Path) -> None:
    weights, plan = tmp_path / "weights.safetensors", tmp_path / "plan.txt"
    shardwise("train", "examples/byte_lm.py:job", "--ranks", "2", "--steps", "20", "--save", str(weights))
    prompts = [list(b"Beautiful is "), list(b"Now")]
    (tmp_path / "in.jsonl").write_text("".join(f"{prompt}\n" for prompt in prompts))
    plan.write_text("shardwise plan 1\naxis tensor 2 heads* width*\n")
    given = ["--input", str(tmp_path / "in.jsonl"), "--tokens", "16", "--plan", str(plan)]
    found = shardwise("generate", "examples/writer.py:job", *given, WEIGHTS=str(weights))

    model = load_spec(f"{ROOT}/examples/byte_lm.py:job").with_(weights=weights).build().eval()
    for prompt, row in zip(prompts, found["rows"], strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(16):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert row == ids[len(prompt) :]


@pytest.mark.prove
def test_a_custom_operator_is_split_by_its_rule_and_right_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = ROOT / "examples" / "custom_op.py"
    name = "example.squared_relu"
    graph = Graph.of(load_spec(f"{example}:job"))
    assert graph.unknown() == []
    split = {letter.dim.label for op in graph.ops if op.name == name for letter in op.letters}
    assert split == {"batch", "width"}

    rows = shardwise("verify", f"{example}:job", "--ranks", "2", "--steps", "1", "--strategies", "data,tensor")
    assert [(row["strategy"], row["passed"]) for row in rows] == [("data", True), ("tensor", True)]

    code = example.read_text()
    without = tmp_path / "without_rule.py"
    without.write_text(re.sub(r"^@sw\.rule.*?\n\n", "", code, flags=re.MULTILINE | re.DOTALL))
    assert "sw.rule(" not in without.read_text()
    monkeypatch.delitem(table._RULES, name)
    assert Graph.of(load_spec(f"{without}:job")).unknown() == [name]
    rows = shardwise("verify", f"{without}:job", "--ranks", "2", "--steps", "1", "--strategies", "data")
    assert [row["passed"] for row in rows] == [True]
    assert any(sent["kind"] == "all_gather" for sent in rows[0]["collectives_recorded"])


def test_the_code_of_the_readme_runs(tmp_path: Path) -> None:
    quickstart, loop = scripts(READMES[0])
    (tmp_path / "quickstart.py").write_text(quickstart)
    (tmp_path / "loop.py").write_text(loop)

    printed = run("quickstart.py", where=tmp_path)
    assert "100 steps on 2 ranks" in printed
    for strategy in ("data", "sharded", "tensor", "pipeline"):
        assert f"\n{strategy} passed " in printed

    printed = run(*TORCHRUN, "loop.py", where=tmp_path)
    assert re.search(r"^loss \d\.\d{4}, 4 tensors, \w+ 2", printed, re.MULTILINE)
