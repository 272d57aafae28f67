"""Units: bytes in decimal steps (1 GB = 10^9 B), time in integer nanoseconds, and how both are written and read."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

from armillary.core.errors import InputError

KB: Final = 10**3
MB: Final = 10**6
GB: Final = 10**9
TB: Final = 10**12
KIB: Final = 2**10
MIB: Final = 2**20
GIB: Final = 2**30
TIB: Final = 2**40

NS: Final = 1
US: Final = 10**3
MS: Final = 10**6
S: Final = 10**9
MINUTE: Final = 60 * S
HOUR: Final = 60 * MINUTE

MAX_BYTES: Final = 2**63 - 1
MAX_DURATION: Final = 2**63 - 1  # ns

_BYTE_UNITS: Final = {
    "": 1, "b": 1,
    "k": KB, "kb": KB, "m": MB, "mb": MB, "g": GB, "gb": GB, "t": TB, "tb": TB, "p": 10**15, "pb": 10**15,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB, "pib": 2**50,
}  # fmt: skip
_BYTES: Final = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([a-z]{0,3})", re.IGNORECASE | re.ASCII)
_TIME_UNITS: Final = {"ns": NS, "us": US, "ms": MS, "s": S, "min": MINUTE, "h": HOUR}
_TIME: Final = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([a-z]{1,3})", re.IGNORECASE | re.ASCII)
_SI: Final = ((10**18, "E"), (10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"), (1, ""))
_COUNT: Final = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))
_SYMBOLS: Final = frozenset({"B", "b", "bit", "FLOP", "OP"})


def parse_bytes(value: str | int) -> int:
    """Bytes from `"2GB"` (decimal), `"512 MiB"` (binary), `"1.5g"`, `"4096"` or an int; a fraction of a byte is rounded to the nearest.

    Raises InputError for anything else, for negative sizes and for those over 2^63 - 1.
    """
    if isinstance(value, bool):
        raise InputError(f"{value!r} is not a size in bytes", "write a number with a unit, such as 2GB or 512 MiB")
    if isinstance(value, int):
        size = value
    else:
        match = _BYTES.fullmatch(value.strip()) if isinstance(value, str) else None
        unit = _BYTE_UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:40] + "..."
            raise InputError(f"{shown} is not a size in bytes", "write a number with a unit, such as 2GB or 512 MiB")
        size = round(Decimal(match[1]) * unit)
    if not 0 <= size <= MAX_BYTES:
        raise InputError(f"a size of {size} bytes is out of bounds", f"give between 0 and {MAX_BYTES} bytes")
    return size


def parse_duration(value: str | int) -> int:
    """ns from `"50ms"`, `"1.5 s"`, `"2min"`, or an int of ns; a string must name its unit.

    Raises InputError for anything else, for negative durations and for those over 2^63 - 1 ns.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        duration = value
    else:
        match = _TIME.fullmatch(value.strip()) if isinstance(value, str) else None
        unit = _TIME_UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:40] + "..."
            raise InputError(f"{shown} is not a duration", "write a number with a unit, such as 50ms, 1.5s or 2min")
        duration = round(Decimal(match[1]) * unit)
    if not 0 <= duration <= MAX_DURATION:
        raise InputError(f"a duration of {duration} ns is out of bounds", f"give between 0 and {MAX_DURATION} ns")
    return duration


def format_bytes(size: float) -> str:
    """`1_500_000_000 -> "1.5 GB"`: decimal units, three significant digits."""
    return _scaled(size, "B")


def format_flops(flops: float) -> str:
    """`1.1e11 -> "110 GFLOP"`: decimal units, three significant digits."""
    return _scaled(flops, "FLOP")


def format_rate(per_second: float, unit: str = "B") -> str:
    """`format_rate(12.3e9) -> "12.3 GB/s"`, `(1.1e11, "FLOP") -> "110 GFLOP/s"`, `(12300, "tokens") -> "12.3k tokens/s"`."""
    return (_scaled(per_second, unit) if unit in _SYMBOLS else f"{format_count(per_second)} {unit}") + "/s"


def format_count(count: float) -> str:
    """`9120 -> "9,120"`, `134_515_008 -> "135M"`, `1.24e9 -> "1.24B"`: three significant digits from ten thousand on."""
    if abs(count) < 9_999.5:
        return f"{count:,}" if isinstance(count, int) else _digits(count)
    for scale, suffix in reversed(_COUNT):
        # 999.5 of a unit would print as 1000: the next unit says it as 1.
        if abs(count) < 999.5 * scale or scale == 10**12:
            return _digits(count / scale) + suffix
    raise AssertionError("unreachable: the largest unit takes every count")


def format_duration(ns: float) -> str:
    """`12_300_000 -> "12.3 ms"`; from a minute on `"2 min 05 s"`, from an hour on `"1 h 02 min"`. Input in ns."""
    if ns < 0:
        return "-" + format_duration(-ns)
    if ns >= 59.95 * S:
        seconds = round(ns / S)
        if seconds < 3600:
            return f"{seconds // 60} min {seconds % 60:02d} s"
        minutes = round(ns / MINUTE)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    for scale, unit in ((NS, "ns"), (US, "us"), (MS, "ms")):
        if ns < 999.5 * scale:
            return f"{_digits(ns / scale)} {unit}"
    return f"{_digits(ns / S)} s"


def _scaled(value: float, unit: str) -> str:
    for scale, prefix in reversed(_SI):
        if abs(value) < 999.5 * scale or scale == 10**18:
            return f"{_digits(value / scale)} {prefix}{unit}"
    raise AssertionError("unreachable: the largest prefix takes every value")


def _digits(value: float) -> str:
    """Three significant digits without trailing zeros; never an exponent."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    magnitude = abs(value)
    places = 0 if magnitude >= 99.95 else 1 if magnitude >= 9.995 else 2
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
