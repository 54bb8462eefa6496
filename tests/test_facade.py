"""The façade: its names are pinned, each is there, and importing it is quick."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import shardwise

NAMES = {
    "Cluster", "Job", "Plan", "PlanAxis", "RunError", "ShardwiseError", "UserError", "capture", "discover", "generate",
    "load_spec", "map", "parallelize", "plan", "predict", "report", "rule", "strategies", "train", "verify",
}  # fmt: skip


def test_names_are_pinned() -> None:
    assert set(shardwise.__all__) == NAMES
    assert len(NAMES) <= 20
    assert dir(shardwise) == sorted(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_is_there_and_says_what_it_is(name: str) -> None:
    found = getattr(shardwise, name)
    assert callable(found)
    assert found.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        shardwise.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["plan", "report"])
def test_packages_of_the_same_name_do_not_replace_functions(name: str) -> None:
    import_module(f"shardwise.{name}")
    import_module({"plan": "shardwise.plan.plan", "report": "shardwise.report.terminal"}[name])
    assert callable(getattr(shardwise, name))


def test_import_is_quick() -> None:
    code = "import sys, shardwise; sys.exit(any(n in sys.modules for n in ('torch', 'numpy', 'cloudpickle')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
