"""Plan: how one job is split over ranks. A frozen value that prints as a page, reads back, or is written by hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import groupby
from typing import Any

from shardwise.errors import PlanError

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")
DROPOUT = ("exact", "per-rank")
BATCH_NORM = ("exact", "per-micro-batch")
PIPELINE = "pipeline"


@dataclass(frozen=True)
class PlanAxis:
    """One axis of the device mesh.

    Attributes:
        name: e.g. "data", "tensor", "pipeline".
        size: ranks along it.
        dims: names of the dims it splits, in order of preference; `*` stands for anything. None for the pipeline.
        shares: of an axis that splits the batch, how its ranks share samples out, such as (3, 1); empty for equally.
    """

    name: str
    size: int
    dims: tuple[str, ...] = ()
    shares: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """How one job is split.

    Attributes:
        axes: the mesh, outermost axis first; neighbouring ranks differ in the last axis.
        cuts: names of the operators at which a new pipeline stage begins; a multiple of the pipeline's size, less one.
        micro_batches: into how many the global batch is cut.
        schedule: order of the micro-batches in a pipeline.
        zero: 0 keeps everything whole; over the data axis 1 shards optimizer state, 2 gradients too, 3 parameters too.
        recompute: names of the blocks whose activations are computed again in backward; `*` stands for anything.
        precision: "fp32" or "bf16".
        dropout: "exact" masks do not depend on the plan; "per-rank" masks are cheaper and do.
        batch_norm: "exact" statistics are of the global batch; "per-micro-batch" ones are not.
        bucket_bytes: gradients are reduced in buckets of about this size.
        model: fingerprint of the captured graph that the plan is for; empty for any.
        why: what the planner says of it; empty for one that was written by hand or read.
    """

    axes: tuple[PlanAxis, ...] = ()
    cuts: tuple[str, ...] = ()
    micro_batches: int = 1
    schedule: str = "1f1b"
    zero: int = 0
    recompute: tuple[str, ...] = ()
    precision: str = "fp32"
    dropout: str = "exact"
    batch_norm: str = "exact"
    bucket_bytes: int = 25_000_000
    model: str = ""
    why: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        self._one_of("schedule", SCHEDULES)
        self._one_of("dropout", DROPOUT)
        self._one_of("batch_norm", BATCH_NORM)
        self._one_of("precision", ("fp32", "bf16"))
        if self.zero not in (0, 1, 2, 3):
            raise PlanError(f"zero must be 0, 1, 2 or 3, but is {self.zero!r}")
        for name, number in (("micro-batches", self.micro_batches), ("bucket-bytes", self.bucket_bytes)):
            if not isinstance(number, int) or number < 1:
                raise PlanError(f"{name} must be a whole number of at least 1, but is {number!r}")
        for word in (*(w for axis in self.axes for w in (axis.name, *axis.dims)), *self.cuts, *self.recompute):
            if not word or word != "".join(word.split()) or word.startswith("#"):
                raise PlanError(f"names must be words, but {word!r} has a space or is empty or a comment; rename it")
        seen: set[str] = set()
        for axis in self.axes:
            if not isinstance(axis.size, int) or axis.size < 1:
                raise PlanError(f"axis {axis.name} must have a size of at least 1, but has {axis.size!r}")
            if axis.name in seen:
                raise PlanError(f"axis {axis.name} is there twice; give each axis its own name")
            seen.add(axis.name)
            _check_shares(axis)
        stages, ranks = len(self.cuts) + 1, self.pipeline
        if stages % ranks:
            raise PlanError(
                f"{len(self.cuts)} cuts make {stages} stages, which {ranks} pipeline ranks do not divide; "
                f"give {ranks - 1} cuts, or a multiple of {ranks} less one"
            )
        if self.zero == 3 and self.schedule == "zero-bubble" and stages > 1:
            raise PlanError(
                "schedule zero-bubble takes backward in two halves, and zero 3 would gather every parameter for each; "
                "use zero 2, or another schedule"
            )
        if self.recompute and self.schedule == "zero-bubble" and stages > 1:
            raise PlanError(
                "schedule zero-bubble keeps activations from the first half of backward to the second, so recompute "
                "would save nothing; use another schedule, or no recompute"
            )
        if self.zero and not self.data:
            raise PlanError(f"zero {self.zero} shards over an axis that splits the batch, but no axis does")

    def _one_of(self, name: str, allowed: Sequence[str]) -> None:
        if getattr(self, name) not in allowed:
            raise PlanError(f"{name} must be one of {', '.join(allowed)}, but is {getattr(self, name)!r}")

    # -- reading -----------------------------------------------------------------------------------------------------

    @property
    def ranks(self) -> int:
        """Ranks that the plan needs."""
        total = 1
        for axis in self.axes:
            total *= axis.size
        return total

    @property
    def pipeline(self) -> int:
        """Ranks along the pipeline axis; 1 without one."""
        return next((axis.size for axis in self.axes if axis.name == PIPELINE), 1)

    @property
    def stages(self) -> int:
        return len(self.cuts) + 1

    @property
    def data(self) -> tuple[str, ...]:
        """Names of the axes that split the batch and nothing else."""
        return tuple(axis.name for axis in self.axes if axis.dims == ("batch",) and axis.size > 1)

    @property
    def replicas(self) -> int:
        """How many times the model is there: the product of the axes that split the batch and nothing else."""
        return math.prod(axis.size for axis in self.axes if axis.name in self.data)

    def replica(self) -> Plan:
        """How one of its replicas is split: without the axes that split the batch and nothing else."""
        return self.with_(axes=tuple(axis for axis in self.axes if axis.name not in self.data))

    def explain(self) -> str:
        """Why the planner chose this plan: its price, what it was chosen from, and what would change the choice."""
        return self.why or f"{self.title()}: this plan was not made by the planner, so nothing is known of its price"

    def title(self) -> str:
        """A few words: the axes and their sizes, ZeRO stage and micro-batches."""
        parts = [f"{axis.name} {axis.size}{_shared(axis)}" for axis in self.axes if axis.size > 1]
        if self.zero:
            parts.append(f"ZeRO-{self.zero}")
        if self.micro_batches > 1:
            parts.append(f"{self.micro_batches} micro-batches")
        return " × ".join(parts) or "one rank"

    # -- text --------------------------------------------------------------------------------------------------------

    def text(self) -> str:
        """The plan as a page that a person can edit and `Plan.parse` reads."""
        lines = ["shardwise plan 1"]
        if self.model:
            lines.append(f"model {self.model}")
        for axis in self.axes:
            lines.append(" ".join([f"axis {axis.name} {axis.size}", *axis.dims]))
            if axis.shares:
                lines.append(" ".join([f"shares {axis.name}", *map(str, axis.shares)]))
        lines += [f"cut {cut}" for cut in self.cuts]
        defaults = Plan()
        for name, key in _KEYS.items():
            value = getattr(self, key)
            if value != getattr(defaults, key):
                lines.append(f"{name} {' '.join(value) if isinstance(value, tuple) else value}")
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        return self.text()

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read a plan from its text or its JSON.

        Raises:
            PlanError: a line is not of the form that `text` writes; the message names the line.
        """
        if text.lstrip().startswith("{"):
            return cls.from_json(text)
        lines = [(n, _COMMENT.sub("", line).split()) for n, line in enumerate(text.splitlines(), 1)]
        lines = [(n, words) for n, words in lines if words]
        if not lines or lines[0][1] != ["shardwise", "plan", "1"]:
            first = text.strip().partition("\n")[0][:40]
            raise PlanError(
                f"a plan's first line is 'shardwise plan 1', but this one's is {first!r}; "
                "`shardwise plan SPEC --out FILE` writes a plan"
            )
        given: dict[str, Any] = {"axes": [], "cuts": []}
        for n, words in lines[1:]:
            _read_line(n, words, given)
        given["axes"], given["cuts"] = tuple(given["axes"]), tuple(given["cuts"])
        return cls(**given)

    def to_json(self) -> str:
        """The plan as JSON."""
        axes = [{key: value for key, value in asdict(axis).items() if key != "shares" or value} for axis in self.axes]
        return json.dumps(
            {key: value for key, value in asdict(self).items() if key != "why"} | {"axes": axes}, indent=2
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan from JSON.

        Raises:
            PlanError: it is not JSON, or has a key that a plan does not have.
        """
        try:
            data: Mapping[str, Any] = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"the plan is not JSON: {error}") from error
        known = {f.name for f in fields(cls)} - {"why"}
        if not isinstance(data, dict) or set(data) - known:
            strange = ", ".join(sorted(set(data) - known)) if isinstance(data, dict) else type(data).__name__
            raise PlanError(f"a plan has no {strange}; it has {', '.join(sorted(known))}")
        try:
            axes = tuple(
                PlanAxis(a["name"], a["size"], tuple(a.get("dims", ())), tuple(a.get("shares", ())))
                for a in data.get("axes", ())
            )
        except (KeyError, TypeError) as error:
            raise PlanError("an axis must be {name, size, dims}, and may have shares") from error
        lists = {k: data[k] for k in ("cuts", "recompute") if k in data}
        for key, words in lists.items():
            if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
                raise PlanError(f"{key} must be a list of words, but is {words!r}")
        tuples = {k: tuple(words) for k, words in lists.items()}
        return cls(**{**data, **tuples, "axes": axes})

    def difference(self, other: Plan) -> list[str]:
        """What `other` has different, a line each; none where they are equal."""
        found = []
        mine, theirs = {a.name: a for a in self.axes}, {a.name: a for a in other.axes}
        for name in [*mine, *(n for n in theirs if n not in mine)]:
            a, b = mine.get(name), theirs.get(name)
            if a != b:
                found.append(f"axis {name}: {_axis(a)} -> {_axis(b)}")
        if [a.name for a in self.axes] != [a.name for a in other.axes] and set(mine) == set(theirs):
            found.append(f"order of axes: {' '.join(mine)} -> {' '.join(theirs)}")
        for key in ("cuts", *_KEYS.values(), "model"):
            a, b = getattr(self, key), getattr(other, key)
            if a != b:
                found.append(f"{key}: {_value(a)} -> {_value(b)}")
        return found

    def with_(self, **changes: Any) -> Plan:
        """A copy with some fields changed."""
        return replace(self, **changes)


_KEYS = {
    "micro-batches": "micro_batches",
    "schedule": "schedule",
    "zero": "zero",
    "recompute": "recompute",
    "precision": "precision",
    "dropout": "dropout",
    "batch-norm": "batch_norm",
    "bucket-bytes": "bucket_bytes",
}
_NUMBERS = {"micro-batches", "zero", "bucket-bytes"}
_COMMENT = re.compile(r"(^|\s)#.*")  # a dim's name may have a # inside


def _read_line(n: int, words: list[str], given: dict[str, Any]) -> None:
    key, rest = words[0], words[1:]
    if key == "axis" and len(rest) >= 2:
        given["axes"].append(PlanAxis(rest[0], _whole(n, rest[1]), tuple(rest[2:])))
    elif key == "shares" and len(rest) >= 2:
        named = [i for i, axis in enumerate(given["axes"]) if axis.name == rest[0]]
        if not named:
            raise PlanError(f"line {n} of the plan shares out over axis {rest[0]!r}, but no line before has this axis")
        shares = tuple(_whole(n, word) for word in rest[1:])
        given["axes"][named[0]] = replace(given["axes"][named[0]], shares=shares)
    elif key == "cut" and len(rest) == 1:
        given["cuts"].append(rest[0])
    elif key == "model" and len(rest) == 1:
        given["model"] = rest[0]
    elif key == "recompute":
        given["recompute"] = tuple(rest)
    elif key in _KEYS and len(rest) == 1:
        given[_KEYS[key]] = _whole(n, rest[0]) if key in _NUMBERS else rest[0]
    else:
        known = ", ".join(["axis", "shares", "cut", "model", *_KEYS])
        raise PlanError(f"line {n} of the plan, {' '.join(words)!r}, is not understood; a line starts with {known}")


def _whole(n: int, word: str) -> int:
    if not word.isdecimal():
        raise PlanError(f"line {n} of the plan needs a whole number, but has {word!r}")
    return int(word)


def _axis(axis: PlanAxis | None) -> str:
    if axis is None:
        return "none"
    return " ".join([str(axis.size), *axis.dims, *(["shared", ":".join(map(str, axis.shares))] if axis.shares else [])])


def _shared(axis: PlanAxis) -> str:
    """An axis's shares, such as ` (4×3, 4×1)` for four ranks with three each and four with one."""
    runs = [(share, len(list(members))) for share, members in groupby(axis.shares)]
    said = ", ".join(f"{count}×{share}" if count > 1 else str(share) for share, count in runs)
    return f" ({said})" if said else ""


def _check_shares(axis: PlanAxis) -> None:
    if not axis.shares:
        return
    said = ":".join(map(str, axis.shares))
    if len(axis.shares) != axis.size or not all(isinstance(share, int) and share > 0 for share in axis.shares):
        raise PlanError(
            f"axis {axis.name} has {axis.size} ranks and shares {said}; give each rank a whole number of at least 1"
        )
    if "batch" not in axis.dims:
        raise PlanError(f"axis {axis.name} shares samples out {said}, but does not split the batch; leave shares out")


def _value(value: Any) -> str:
    return (" ".join(value) or "none") if isinstance(value, tuple) else str(value)
