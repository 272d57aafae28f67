"""A line chart of text, for terminals: braille dots, two columns and four rows a character."""

from __future__ import annotations

import math
from collections.abc import Sequence

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # [column][row] of a braille character


def chart(values: Sequence[float], width: int, height: int, span: int | None = None) -> list[str]:
    """`height` lines of `width` characters with the highest value at the top and the lowest at the bottom; values are spread over the
    width as the first `len(values)` of `span` (default: all of it). Values that are not finite are left out; many in a column are averaged.
    """
    columns, rows = 2 * width, 4 * height
    span = max(span or len(values), len(values), 1)
    sums, counts = [0.0] * columns, [0] * columns
    for index, value in enumerate(values):
        if math.isfinite(value):
            column = min(columns - 1, index * columns // span)
            sums[column] += value
            counts[column] += 1
    points = [(column, total / count) for column, (total, count) in enumerate(zip(sums, counts, strict=True)) if count]
    cells = [[0] * width for _ in range(height)]
    if points:
        low, high = min(value for _, value in points), max(value for _, value in points)
        scale = (rows - 1) / (high - low) if high > low else 0.0
        previous: tuple[int, int] | None = None
        for column, value in points:
            row = round((high - value) * scale)
            for x, y in _line(previous or (column, row), (column, row)):
                cells[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
            previous = column, row
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Dots from start to end."""
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (start[0] + round((end[0] - start[0]) * k / steps), start[1] + round((end[1] - start[1]) * k / steps)) for k in range(steps + 1)
    ]
