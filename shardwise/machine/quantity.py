"""Quantity: a number of a machine file, with its unit and where it came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardwise.errors import MachineError

_UNITS = {
    "bytes": {"B": 1.0, "MB": 1e6, "GB": 1e9, "MiB": 2.0**20, "GiB": 2.0**30},
    "bytes a second": {"GB/s": 1e9, "TB/s": 1e12, "MB/s": 1e6, "Gbit/s": 1e9 / 8, "Mbit/s": 1e6 / 8},
    "operations a second": {"GFLOP/s": 1e9, "TFLOP/s": 1e12, "PFLOP/s": 1e15},
    "seconds": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
    "a share": {"": 1.0},
    "a count": {"": 1.0},
}
MEASURES = tuple(_UNITS)


@dataclass(frozen=True)
class Quantity:
    """A number of a machine file.

    Attributes:
        value: in bytes, bytes a second, operations a second, seconds, or 1.
        source: where it came from: a datasheet, a published measurement, a fit, a measurement made here.
    """

    value: float
    source: str

    @classmethod
    def read(cls, entry: Any, measure: str, where: str) -> Quantity:
        """Read `{ value = 3.35, unit = "TB/s", source = "..." }`.

        Args:
            entry: what the file has.
            measure: one of MEASURES, what it must be a number of.
            where: file and key, for messages.

        Raises:
            MachineError: a key is missing or strange, the number is not above zero, or the unit measures another thing.
        """
        units = _UNITS[measure]
        example = '{ value = 1, unit = "' + next(iter(units)) + '", source = "datasheet" }'
        if not isinstance(entry, Mapping):
            raise MachineError(f"{where} must be like {example}, but is {entry!r}")
        strange = sorted(set(entry) - {"value", "unit", "source"})
        if strange or "value" not in entry or "source" not in entry:
            lacks = [key for key in ("value", "source") if key not in entry]
            fact = f"lacks {' and '.join(lacks)}" if lacks else f"has a strange key {strange[0]!r}"
            raise MachineError(f"{where} {fact}; write it like {example}")
        value, unit, source = entry["value"], entry.get("unit", ""), entry["source"]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise MachineError(f"{where} must be a number above zero, but is {value!r}")
        if unit not in units:
            known = ", ".join(u or "none" for u in units)
            raise MachineError(f"{where} must be in {measure} (unit {known}), but its unit is {unit or 'missing'!r}")
        if not isinstance(source, str) or not source.strip():
            raise MachineError(f"{where} must name its source, such as a datasheet or a measurement")
        return cls(float(value) * units[unit], source)
