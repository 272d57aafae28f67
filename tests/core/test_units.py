"""Sizes, durations and counts are written so that they can be read back; sizes and durations are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.core import units
from armillary.core.errors import InputError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("512 MiB", 512 * 2**20),
        ("1.5g", 1_500_000_000),
        ("4096", 4096),
        (" 0 b ", 0),
        (7, 7),
        ("0.5 KiB", 512),
        ("3tb", 3 * 10**12),
    ],
)
def test_parse_bytes_knows_decimal_and_binary_units(text: str | int, size: int) -> None:
    assert units.parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "1e9", "2 GBs", "nan", "1,5GB", "١GB", -1, 2**63, "10000 PB", True, 1.5, None, "9" * 1000]
)
def test_parse_bytes_refuses_what_is_not_a_size(text: object) -> None:
    with pytest.raises(InputError):
        units.parse_bytes(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "ns"),
    [("50ms", 50_000_000), (" 1.5 S ", 1_500_000_000), ("2min", 120 * 10**9), ("1 h", 3600 * 10**9), ("7us", 7_000), ("0 ns", 0), (9, 9)],
)
def test_parse_duration_knows_its_units(text: str | int, ns: int) -> None:
    assert units.parse_duration(text) == ns


@pytest.mark.parametrize("text", ["", "5", "ms", "-1s", "1e3 s", "5 sec", "nan s", -1, 2**63, "9" * 20 + "h", True, 1.5, None, "1\u0663s"])
def test_parse_duration_refuses_what_is_not_a_duration(text: object) -> None:
    with pytest.raises(InputError):
        units.parse_duration(text)  # type: ignore[arg-type]


@given(st.integers(0, 59 * units.S))
def test_a_formatted_duration_below_a_minute_reads_back_to_three_digits(ns: int) -> None:
    assert units.parse_duration(units.format_duration(ns)) == pytest.approx(ns, rel=0.006)


@given(st.integers(0, 2**63 - 1))
def test_a_formatted_size_reads_back_to_three_digits(size: int) -> None:
    if size < 9 * 10**18:  # EB is written and never read: no machine has one
        text = units.format_bytes(size)
        if "E" not in text:
            assert units.parse_bytes(text) == pytest.approx(size, rel=0.005)


@given(st.integers(0, 2**63 - 1))
def test_plain_digits_are_exact(size: int) -> None:
    assert units.parse_bytes(str(size)) == units.parse_bytes(size) == units.parse_bytes(f"{size} B") == size


@given(st.integers(0, 10**18))
def test_a_formatted_size_never_shows_a_thousand_of_a_unit(size: int) -> None:
    number = units.format_bytes(size).split()[0]
    assert "," not in number
    assert float(number) < 1000


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0 ns"), (850, "850 ns"), (1_230, "1.23 us"), (12_300_000, "12.3 ms"), (999_600, "1 ms"), (1_500_000_000, "1.5 s"),
        (59_940_000_000, "59.9 s"), (59_960_000_000, "1 min 00 s"), (125 * units.S, "2 min 05 s"), (3_599_600_000_000, "1 h 00 min"),
        (3_720 * units.S, "1 h 02 min"), (-1_230, "-1.23 us"),
    ],
)  # fmt: skip
def test_durations(ns: int, text: str) -> None:
    assert units.format_duration(ns) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (9120, "9,120"), (12_300, "12.3k"), (999_600, "1M"), (134_515_008, "135M"), (1.24e9, "1.24B"), (3.5, "3.5")],
)
def test_counts(count: float, text: str) -> None:
    assert units.format_count(count) == text


def test_rates_and_sizes() -> None:
    assert units.format_bytes(1_500_000_000) == "1.5 GB"
    assert units.format_bytes(12) == "12 B"
    assert units.format_rate(12.3e9) == "12.3 GB/s"
    assert units.format_flops(1.1e11) == "110 GFLOP"
    assert units.format_rate(1.1e11, "FLOP") == "110 GFLOP/s"
    assert units.format_rate(12_300, "tokens") == "12.3k tokens/s"
