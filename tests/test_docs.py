"""The documentation holds: its Python runs and prints what is shown, its plans parse, its commands and links exist.

`python -m tests.test_docs` runs the pages and writes into them what they print. A page's Python blocks run in order in
one namespace; a `text` block right behind one is what it prints.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest

import benchmarks.predict
import benchmarks.regret
import benchmarks.serve
from benchmarks.arrays import Row, table
from shardwise.cli import _parser
from shardwise.cost.profile import PROFILES
from shardwise.plan.plan import Plan

ROOT = Path(__file__).parent.parent
GENERATED = {"coverage.md", "accuracy.md"}
"""Pages that commands write."""
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PAGES = [p for p in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in p.parts and p.name not in GENERATED]
ALL = [*READMES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
PLAN = re.compile(r"^( *)shardwise plan 1\b.*\n(?:\1\S.*\n)*", re.MULTILINE)
"""A plan within a block, up to the first empty line."""


class Block(NamedTuple):
    """A fenced block of a page: its language, its text, and where the text lies in the page."""

    language: str
    text: str
    start: int
    end: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], m.start(2), m.end(2)) for m in found]


def scripts(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return [block.text for block in blocks(page) if block.language == "python"]


def commands(page: Path) -> Iterator[str]:
    """The commands of a page: each line of a `bash` block, and in a `console` block what follows `$`."""
    for block in blocks(page):
        for line in block.text.splitlines():
            if block.language == "bash" and line.strip():
                yield line.partition(" #")[0].strip()
            elif block.language == "console" and line.startswith("$ "):
                yield line[2:].partition(" #")[0].strip()


def plans(page: Path) -> list[str]:
    """The plans that a page shows."""
    shown = [block.text for block in blocks(page) if block.language == "text"]
    return [found[0] for text in shown for found in PLAN.finditer(text)]


def printed(page: Path) -> Iterator[tuple[Block, Block | None, str]]:
    """Run a page: each Python block, the block that shows what it prints, and what it printed."""
    text, found = page.read_text(encoding="utf-8"), blocks(page)
    names: dict[str, object] = {"__name__": "__main__"}
    for i, block in enumerate(found):
        if block.language != "python":
            continue
        after = found[i + 1] if i + 1 < len(found) else None
        shown = after is not None and text[block.end : after.start].split() == ["```", "```text"]
        line = text.count("\n", 0, block.start)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("\n" * line + block.text, str(page), "exec"), names)
        yield block, after if shown else None, out.getvalue()


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if scripts(p)], ids=name)
def test_python_runs_and_prints_what_the_page_shows(page: Path) -> None:
    for block, shown, found in printed(page):
        assert found == (shown.text if shown else ""), f"after {block.text!r}; `python -m tests.test_docs` rewrites it"


@pytest.mark.parametrize("page", ALL, ids=name)
def test_plans_parse(page: Path) -> None:
    for text in plans(page):
        plan = Plan.parse(text)
        assert Plan.parse(plan.text()) == plan
        assert Plan.parse(plan.to_json()) == plan


def test_there_are_plans_and_pages_that_run() -> None:
    assert sum(len(plans(page)) for page in ALL) >= 8
    assert sum(bool(scripts(page)) for page in PAGES) >= 3


@pytest.mark.parametrize("page", ALL, ids=name)
def test_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands(page):
        words = shlex.split(command)
        while "=" in words[0]:
            words.pop(0)
        if words[0] == "shardwise" and "--help" not in words:
            _parser().parse_args(words[1:])
        elif words[0] == "make":
            assert [w for w in words[1:] if "=" not in w and w not in targets] == [], command
        for word in words:
            path = word.partition(":")[0]
            if path.endswith(".py") and "/" in path:
                assert (ROOT / path).is_file(), command


@pytest.mark.parametrize("page", ALL, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target or Path(path).name in GENERATED:
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name(page)} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads], target


def test_the_readmes_show_the_same_code() -> None:
    english, chinese = (
        [block.text for block in blocks(page) if block.language in ("python", "bash")] for page in READMES
    )
    assert english == chinese


def test_the_figures_of_the_benchmarks_are_those_measured() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "benchmarks" / "results" / "runtime.json").read_text(encoding="utf-8"))
    assert len(rows) >= 18
    for row in rows:
        seconds = f"{row['ours_s'] * 1e3:.1f} | {row['baseline_s'] * 1e3:.1f}"
        shown = f"| {row['workload']} | {row['strategy']} | {seconds} | {row['ratio']:.3f} | "
        assert shown in page, shown
        assert ("missed" in page.partition(shown)[2].partition("\n")[0]) == (row["ratio"] > row["goal"])


def test_the_figures_of_arrays_are_those_measured() -> None:
    page = (ROOT / "docs" / "arrays.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks" / "results" / "arrays.json").read_text(encoding="utf-8"))
    rows = [Row(**row) for row in found["rows"]]
    assert len(rows) >= 30
    assert table(rows) in page


def test_the_figures_of_the_server_are_those_measured() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks" / "results" / "serve.json").read_text(encoding="utf-8"))
    rows = [benchmarks.serve.Row(**row) for row in found["rows"]]
    assert len(rows) >= 2
    assert benchmarks.serve.table(rows) in page


def test_the_figures_of_regret_are_those_measured() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    rows = benchmarks.regret.stored()
    assert len(rows) == 40
    assert benchmarks.regret.tables(rows) in page


def test_the_figures_of_inference_are_those_measured() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks" / "results" / "predict.json").read_text(encoding="utf-8"))
    assert len(found) >= 11
    assert benchmarks.predict.table([benchmarks.predict.Row(**row) for row in found]) in page


def test_the_profiles_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "how-it-prices.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    names = rows[0][1:]
    shown = {(name, row[0]): cell for row in rows[1:] for name, cell in zip(names, row[1:], strict=True)}
    real = {(p.name, f.name): str(getattr(p, f.name)) for p in PROFILES.values() for f in fields(p) if f.name != "name"}
    assert shown == real


def main() -> None:
    """Run every page, and write into it what it prints."""
    import tests.conftest  # noqa: F401  # no prices of this machine, as in the tests

    for page in PAGES:
        if not scripts(page):
            continue
        text, changes = page.read_text(encoding="utf-8"), []
        for block, shown, found in printed(page):
            if shown is not None:
                changes.append((shown, found))
            elif found:
                raise SystemExit(f"{name(page)} has no `text` block behind one that prints: {block.text}")
        for shown, found in reversed(changes):
            text = text[: shown.start] + found + text[shown.end :]
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
