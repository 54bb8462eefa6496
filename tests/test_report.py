"""Reports: units, tables, plots with labelled axes, and a page that needs nothing from elsewhere."""

from __future__ import annotations

import json
import math
import re
from html import escape
from html.parser import HTMLParser

import pytest

from shardwise.engine.train import Result
from shardwise.parallel.mesh import Traffic
from shardwise.plan.plan import Plan, PlanAxis
from shardwise.report.html import page
from shardwise.report.plots import Bar, Series, bars, decades, lines, power, short, ticks
from shardwise.report.terminal import (
    Measured,
    comparison,
    duration,
    percent,
    proof_failures,
    proof_table,
    report,
    size,
    small,
    table,
    times,
)

DATA = Plan(axes=(PlanAxis("data", 2, ("batch",)),))
ONE = Measured("one rank", "one", "", Plan(), 0.2, math.nan, 500, 200, (3.0, 2.0), 2.5)
RUNS = [
    ONE,
    Measured(
        "data, 2 ranks", "data", "The batch is large & cheap to cut", DATA, 0.1, 0.25, 450, 200, (3.0, 2.0 + 1e-7), 2.5,
        (Traffic("all_reduce", "data", 5, 5_830_000),),
    ),
    Measured("hybrid, 2 ranks", "hybrid", "2 ranks cannot be two axes", None),
]  # fmt: skip


# --- numbers and tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (duration(1.5), "1.50 s"),
        (duration(0.0123), "12.3 ms"),
        (duration(0.000456), "456 µs"),
        (duration(3e-9), "3.00 ns"),
        (duration(0), "0 s"),
        (duration(125.0), "125 s"),
        (duration(math.nan), "–"),
        (size(999), "999 B"),
        (size(4_200_000), "4.20 MB"),
        (size(1.5e9), "1.50 GB"),
        (percent(0.125), "12 %"),
        (percent(math.nan), "–"),
        (times(1.854), "1.85×"),
        (small(3.14e-7), "3.1e-07"),
        (small(0.0), "0"),
    ],
)
def test_numbers_have_units(text: str, expected: str) -> None:
    assert text == expected


def test_tables_are_aligned() -> None:
    lines_ = table([["", "a step"], ["one rank", "200 ms"], ["data", "9 ms"]]).splitlines()
    assert lines_[1].startswith("─")
    assert lines_[2].endswith("200 ms")
    assert lines_[3].endswith("  9 ms")
    assert len({len(line) for line in lines_}) == 1


def test_comparison_is_with_the_first_run() -> None:
    rows = comparison(RUNS)
    assert rows[1][:3] == ["one rank", "200 ms", "1"]
    assert rows[2] == ["data, 2 ranks", "100 ms", "2.00×", "25 %", "450 B", "1.0e-07"]
    assert len(rows) == 3  # what does not apply has no figures


def test_a_run_as_json_keeps_its_figures() -> None:
    found = json.loads(json.dumps([run.to_dict(ONE) for run in RUNS]))
    assert found[1]["speedup"] == 2.0
    assert found[1]["traffic"] == [{"kind": "all_reduce", "axis": "data", "count": 5, "bytes": 5_830_000}]
    assert Plan.parse(found[1]["plan"]) == DATA
    assert found[2] == {
        "name": "hybrid, 2 ranks", "strategy": "hybrid", "applicable": False, "reason": "2 ranks cannot be two axes"
    }  # fmt: skip


def result() -> Result:
    traffic = (Traffic("all_reduce", "data", 5, 5_830_000),)
    return Result(
        "net", DATA, (3.0, 2.5, 2.0), (0.9, 0.1, 0.1), 1.2, "tokens", 2048, (500, 400), (200, 200), traffic, "cpu", 1
    )


def test_report_of_a_run_reads_like_a_page() -> None:
    text = report(DATA, result(), {"compute": 0.08, "communication": 0.02})
    assert "3 steps on 2 ranks of 1 thread (cpu), data 2" in text
    assert "3.0000 → 2.0000" in text
    assert "100 ms (median), 20,480 tokens/s" in text
    assert "500 B on the fullest rank, 300 B of it for the job" in text
    assert "predicted    100 ms (compute 80.0 ms, communication 20.0 ms); measured / predicted = 1.00" in text
    assert re.search(r"all_reduce +data +5 +5\.83 MB", text)


def test_a_result_is_json() -> None:
    found = json.loads(result().to_json())
    assert found["losses"] == [3.0, 2.5, 2.0]
    assert found["step_seconds"] == 0.1  # the first step is not counted
    assert found["rate"] == 20480
    assert found["ranks"] == 2
    assert Plan.from_json(json.dumps(found["plan"])) == DATA


def test_proof_table_says_what_failed_and_what_does_not_apply() -> None:
    row = {
        "strategy": "data", "plan": "", "applicable": True, "reason": "", "loss_error": 1e-12, "grad_error": 2e-3,
        "param_error": None, "collectives_announced": [1], "collectives_recorded": [1], "passed": False,
        "unclear": False,
    }  # fmt: skip
    hybrid = {**row, "strategy": "hybrid", "applicable": False, "reason": "2 ranks are one axis"}
    text = proof_table([row, {**row, "strategy": "tensor", "unclear": True}, hybrid])
    assert re.search(r"data +FAILED +1\.0e-12 +2\.0e-03 +– +as announced", text)
    assert re.search(r"tensor +unclear +1\.0e-12", text)
    rows = [{**row, "worst": "head.bias"}, {**row, "strategy": "tensor", "unclear": True, "rounding": 4e-3}, hybrid]
    assert proof_failures(rows).startswith(
        "data (head.bias is off by 2.0e-03): not what one device computes; tensor ca"
    )
    assert "differs from itself by up to 4.0e-03" in proof_failures(rows[1:])
    assert proof_failures([{**row, "grad_error": None}]).startswith("data (the run failed)")
    assert proof_failures([{**row, "collectives_recorded": []}]).startswith("data (sends other collectives than ann")
    assert proof_failures([{**row, "passed": True}, hybrid]) == ""
    assert re.search(r"hybrid +does not apply +2 ranks are one axis", text)


# --- plots ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.31, 5.86), (-3.0, 7.0), (5.0, 5.0), (0.0, 0.0), (1e-9, 3e-9)])
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9
    assert 2 <= len(found) <= 8
    assert len({short(mark) for mark in found}) == len(found)


def test_decades_enclose() -> None:
    assert decades(2e-8, 3e-6) == pytest.approx([1e-8, 1e-7, 1e-6, 1e-5])
    assert len(decades(1e-300, 1.0)) <= 8
    assert power(1e-7) == "10⁻⁷"


def test_lines_that_coincide_are_all_seen() -> None:
    curve = ((1.0, 3.0), (2.0, 2.0))
    svg = lines([Series("a", curve), Series("b", curve)], title="Loss", x_label="step", y_label="nats", nested=True)
    widths = [float(w) for w in re.findall(r'<polyline[^>]*stroke-width="([\d.]+)"', svg)]
    assert widths[0] > widths[1] >= 1.5
    assert ">step</text>" in svg and ">nats</text>" in svg
    assert 'aria-label="Loss"' in svg


def test_a_line_has_the_same_colour_in_every_plot() -> None:
    both = [Series("a", ((1.0, 3.0), (2.0, 2.0))), Series("b", ((1.0, 2.0), (2.0, 3.0)))]

    def colours(svg: str) -> list[str]:
        return re.findall(r'stroke="var\((--c\d)\)" stroke-width="2\.0"', svg)

    second = colours(lines(both, title="t", x_label="x", y_label="y"))[1]
    alone = colours(lines(both[1:], title="t", x_label="x", y_label="y", first_colour=1))
    assert alone == [second, second], "the line and its key"


def test_points_of_zero_are_drawn_on_a_logarithmic_axis() -> None:
    svg = lines([Series("a", ((1, 0.0), (2, 1e-7)))], title="t", x_label="x", y_label="y", log=True)
    assert "nan" not in svg and "inf" not in svg


def test_bars_are_to_scale() -> None:
    svg = bars(
        [Bar("a", (10.0, 30.0), "40 ms"), Bar("b", (20.0, 0.0), "20 ms")], parts=["p", "q"], title="t", x_label="ms"
    )
    widths = [float(w) for w in re.findall(r'<rect[^>]* width="([\d.]+)"', svg)]
    assert widths[1] == pytest.approx(3 * widths[0], rel=0.02)
    assert widths[2] == pytest.approx(2 * widths[0], rel=0.02)
    assert widths[3] == 0


# --- the page ---------------------------------------------------------------------------------------------------------


class Balance(HTMLParser):
    """Notes tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture(scope="module")
def text() -> str:
    return page(
        RUNS, title="A <b>title", about="About & more", chosen=RUNS[1], notes=["A note."],
        sample=("def ", "main(): <script>alert(1)</script>"), facts={"torch": "2"},
    )  # fmt: skip


def test_page_needs_nothing_from_elsewhere(text: str) -> None:
    assert not re.search(r"https?:|//[a-z]|<script|<link|<img|<iframe|@import|url\(|src=", text)


def test_page_is_well_formed(text: str) -> None:
    balance = Balance()
    balance.feed(text)
    assert balance.wrong == [] and balance.open == []


def test_page_shows_what_was_measured(text: str) -> None:
    assert "A &lt;b&gt;title" in text
    for expected in (
        "2.00×",
        "25 %",
        "axis data 2 batch",
        "2 ranks cannot be two axes",
        "The batch is large &amp; cheap",
    ):
        assert expected in text
    assert text.count("<figure>") == 4
    assert "prefers-color-scheme: dark" in text
    for unit in ("milliseconds a step", "megabytes", "nats"):
        assert unit in text


def contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        colour = "".join(c * 2 for c in colour) if len(colour) == 3 else colour
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_from_the_paper_in_light_and_dark(text: str) -> None:
    light, dark = text.split("prefers-color-scheme: dark", 1)
    for scheme in (light, dark.split("}", 1)[0]):
        colours = dict(re.findall(r"--(\w+):#([0-9a-f]{3,6})", scheme))
        assert len([name for name in colours if re.fullmatch(r"c\d", name)]) == 8
        for name, colour in colours.items():
            if re.fullmatch(r"[cp]\d", name):
                assert contrast(colour, colours["paper"]) >= 3, name
        assert contrast(colours["ink"], colours["paper"]) >= 7
        assert contrast(colours["soft"], colours["paper"]) >= 4.5


def test_what_is_written_after_a_bar_is_not_cut_off() -> None:
    note = "533 MB, 288 MB the job's own part of it"
    drawn = bars([Bar("tensor, 2 ranks", (245.0, 288.0), note)], parts=["a", "b"], title="Memory", x_label="MB")
    (at,) = re.findall(rf'<text x="([\d.]+)" y="[\d.]+">{re.escape(escape(note))}', drawn)
    (width,) = re.findall(r'<svg viewBox="0 0 (\d+) [\d.]+" role', drawn)
    assert float(at) + 6.5 * len(note) <= float(width)
