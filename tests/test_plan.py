"""Plans: text and JSON read back, mistakes are said with fact, numbers and remedy, differences are listed."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import PlanError
from shardwise.plan.plan import BATCH_NORM, DROPOUT, SCHEDULES, Plan, PlanAxis

DATA = PlanAxis("data", 2, ("batch",))
PIPE = PlanAxis("pipeline", 2)

NAMES = st.from_regex(r"[a-z][a-z_0-9]{0,8}", fullmatch=True)
DIMS = st.from_regex(r"(batch|sequence|(heads|width|classes)(@[a-z0-9_.]{1,12})?(#[2-9])?\*?)", fullmatch=True)
CUTS = st.from_regex(r"(linear|view|_to_copy)\.[0-9]{1,3}", fullmatch=True)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    names = draw(st.lists(NAMES.filter(lambda n: n not in ("pipeline", "data")), max_size=3, unique=True))
    sizes = st.integers(1, 8)
    axes = [PlanAxis(n, draw(sizes), tuple(draw(st.lists(DIMS, max_size=3)))) for n in names]
    if draw(st.booleans()):
        size = draw(st.integers(2, 8))
        shares = draw(st.lists(st.integers(1, 9), min_size=size, max_size=size) | st.just([]))
        axes.append(PlanAxis("data", size, ("batch",), tuple(shares)))
    stages = draw(st.sampled_from([1, 2, 3]))
    ranks = draw(st.sampled_from([1, 2, 4])) if stages > 1 else 1
    if stages > 1:
        axes.insert(draw(st.integers(0, len(axes))), PlanAxis("pipeline", ranks))
    schedule = draw(st.sampled_from(SCHEDULES))
    halves = schedule == "zero-bubble" and stages * ranks > 1
    sharded = any(a.dims == ("batch",) and a.size > 1 for a in axes)
    recompute = st.lists(st.sampled_from(["*", "blocks.0", "layers.*.mlp"]), max_size=2)
    cuts = draw(st.lists(CUTS, min_size=stages * ranks - 1, max_size=stages * ranks - 1))
    return Plan(
        axes=tuple(axes),
        cuts=tuple(cuts),
        micro_batches=draw(st.integers(1, 64)),
        schedule=schedule,
        zero=draw(st.integers(0, 2 if halves else 3)) if sharded else 0,
        recompute=() if halves else tuple(draw(recompute)),
        precision=draw(st.sampled_from(["fp32", "bf16"])),
        dropout=draw(st.sampled_from(DROPOUT)),
        batch_norm=draw(st.sampled_from(BATCH_NORM)),
        bucket_bytes=draw(st.integers(1, 10**9)),
        model=draw(st.sampled_from(["", "0123456789ab"])),
    )


# --- reading back -----------------------------------------------------------------------------------------------------


@given(plans())
def test_a_plan_reads_back_from_its_text_and_its_json(plan: Plan) -> None:
    assert Plan.parse(plan.text()) == plan
    assert Plan.parse(str(plan)) == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.parse(plan.to_json()) == plan
    assert Plan.parse(Plan.parse(plan.to_json()).text()) == plan
    assert plan.difference(Plan.parse(plan.text())) == []


@given(plans(), plans())
def test_differences_are_none_exactly_where_plans_are_equal(a: Plan, b: Plan) -> None:
    assert (a.difference(b) == []) == (a == b)
    assert len(a.difference(b)) == len(b.difference(a))


def test_the_text_is_a_page_that_a_person_edits() -> None:
    plan = Plan(
        (PIPE, DATA, PlanAxis("tensor", 2, ("heads*", "width@*.mlp"))), ("linear.4",), micro_batches=4, zero=1,
        recompute=("blocks.*",), model="0123456789ab",
    )  # fmt: skip
    page = (
        "shardwise plan 1\n"
        "model 0123456789ab\n"
        "axis pipeline 2\n"
        "axis data 2 batch\n"
        "axis tensor 2 heads* width@*.mlp\n"
        "cut linear.4\n"
        "micro-batches 4\n"
        "zero 1\n"
        "recompute blocks.*\n"
    )
    assert plan.text() == page
    commented = "# mine\n\n" + page.replace("zero 1", "  zero   2   # was 1") + "\n# the end"
    assert Plan.parse(commented) == plan.with_(zero=2)
    assert plan.difference(plan.with_(zero=2)) == ["zero: 1 -> 2"]


def test_a_dim_may_have_a_number_behind_a_hash() -> None:
    plan = Plan((PlanAxis("tensor", 2, ("heads@h.0#2", "width#3")),))
    assert Plan.parse(plan.text()).axes[0].dims == ("heads@h.0#2", "width#3")


def test_what_a_plan_is_made_of() -> None:
    plan = Plan((PIPE, DATA, PlanAxis("tensor", 3, ("heads*",))), ("a.0", "b.0", "c.0"), micro_batches=4, zero=2,
                schedule="interleaved")  # fmt: skip
    assert (plan.ranks, plan.pipeline, plan.stages, plan.data) == (12, 2, 4, ("data",))
    assert plan.title() == "pipeline 2 × data 2 × tensor 3 × ZeRO-2 × 4 micro-batches"
    assert (Plan().ranks, Plan().pipeline, Plan().stages, Plan().data, Plan().title()) == (1, 1, 1, (), "one rank")


def test_differences_name_the_axis_and_both_values() -> None:
    a = Plan((DATA, PlanAxis("tensor", 2, ("heads*",))), micro_batches=2)
    b = Plan((PlanAxis("tensor", 4, ("heads*", "width*")), DATA), schedule="gpipe")
    assert a.difference(b) == [
        "axis tensor: 2 heads* -> 4 heads* width*",
        "order of axes: data tensor -> tensor data",
        "micro_batches: 2 -> 1",
        "schedule: 1f1b -> gpipe",
    ]
    assert Plan((DATA,)).difference(Plan()) == ["axis data: 2 batch -> none"]
    assert Plan().difference(Plan(recompute=("*",))) == ["recompute: none -> *"]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"schedule": "fifo"}, "schedule must be one of gpipe, 1f1b, interleaved, zero-bubble, but is 'fifo'"),
        ({"zero": 4}, "zero must be 0, 1, 2 or 3, but is 4"),
        ({"zero": 1}, "zero 1 shards over an axis that splits the batch, but no axis does"),
        ({"micro_batches": 0}, "micro-batches must be a whole number of at least 1, but is 0"),
        ({"micro_batches": "2"}, "micro-batches must be a whole number of at least 1, but is '2'"),
        ({"bucket_bytes": 0}, "bucket-bytes must be a whole number of at least 1, but is 0"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, but is 'fp8'"),
        ({"dropout": "none"}, "dropout must be one of exact, per-rank, but is 'none'"),
        ({"axes": (PlanAxis("data", 0, ("batch",)),)}, "axis data must have a size of at least 1, but has 0"),
        ({"axes": (DATA, DATA)}, "axis data is there twice; give each axis its own name"),
        ({"axes": (PlanAxis("my axis", 2),)}, "names must be words, but 'my axis' has a space"),
        ({"axes": (PlanAxis("data", 2, ("batch",), (3, 1, 1)),)}, "axis data has 2 ranks and shares 3:1:1; give each"),
        ({"axes": (PlanAxis("data", 2, ("batch",), (3, 0)),)}, "shares 3:0; give each rank a whole number of at l"),
        ({"axes": (PlanAxis("t", 2, ("heads",), (3, 1)),)}, "axis t shares samples out 3:1, but does not split the b"),
        ({"axes": (PIPE,)}, "1 stages, which 2 pipeline ranks do not divide; give 1 cuts, or a multiple of 2"),
        ({"axes": (PIPE,), "cuts": ("a.0", "b.0")}, "2 cuts make 3 stages, which 2 pipeline ranks do not divide"),
        ({"axes": (PIPE, DATA), "cuts": ("a.0",), "zero": 3, "schedule": "zero-bubble"}, "use zero 2, or"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_is_refused(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)) as error:
        Plan(**given_)
    assert error.value.exit_status == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a plan's first line is 'shardwise plan 1', but this one's is ''"),
        ("shardwise plan 2\n", "first line is 'shardwise plan 1', but this one's is 'shardwise plan 2'"),
        ("shardwise plan 1\naxis data two batch\n", "line 2 of the plan needs a whole number, but has 'two'"),
        ("shardwise plan 1\n\nmicro-batches many\n", "line 3 of the plan needs a whole number, but has 'many'"),
        ("shardwise plan 1\naxis data\n", "line 2 of the plan, 'axis data', is not understood; a line starts with"),
        ("shardwise plan 1\nzero\n", "line 2 of the plan, 'zero', is not understood"),
        ("shardwise plan 1\nsplit everything\n", "line 2 of the plan, 'split everything', is not understood"),
        ("shardwise plan 1\nshares data 3 1\n", "line 2 of the plan shares out over axis 'data', but no line before"),
        ("{", "the plan is not JSON"),
        ('{"axis": []}', "a plan has no axis; it has axes, batch_norm"),
        ('{"axes": [{"name": "data"}]}', "an axis must be {name, size, dims}"),
        ('{"axes": 3}', "an axis must be {name, size, dims}"),
        ('{"cuts": "linear.3"}', "cuts must be a list of words, but is 'linear.3'"),
        ('{"zero": "1"}', "zero must be 0, 1, 2 or 3, but is '1'"),
    ],
)
def test_a_text_that_is_no_plan_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        Plan.parse(text)


def test_a_plan_is_a_value() -> None:
    plan = Plan((DATA,), zero=1)
    assert hash(plan) == hash(Plan.parse(plan.text()))
    assert plan.with_(zero=2) != plan and plan.zero == 1
    assert plan == plan.with_(why="mine"), "why a plan was chosen is not what it is"
    assert "why" not in json.loads(plan.with_(why="mine").to_json())
    with pytest.raises(AttributeError):
        plan.zero = 3  # type: ignore[misc]
    assert json.loads(plan.to_json())["axes"] == [{"name": "data", "size": 2, "dims": ["batch"]}]
