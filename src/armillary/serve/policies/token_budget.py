"""How many tokens an iteration may have for its duration to meet a target, from what recent iterations took (Sarathi-Serve, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence

TILE = 16  # tokens: rows of a block of the matrix products; a part of a block costs a whole one
MARGIN = 8  # an eighth of the target is left for what the number of tokens does not tell: long contexts, hiccups


def tokens_within(target: int, measured: Sequence[tuple[int, int]]) -> int:
    """Tokens of an iteration that takes `target` ns less an eighth: a multiple of `TILE`, at least one.

    `measured` are iterations as (tokens, ns), oldest first. The paper profiles a machine once; here the budget is
    found while serving, and follows contexts that grow and neighbours that come. Until an iteration was too long, the line
    through the smallest and the largest that were not is followed (through the origin while there is one: an iteration's fixed part
    makes that too little, never too much), and at least a tile is tried more. From then on the answer lies between those two: where the line between them says, or
    half-way where the first line says more, for what was too long may have been a hiccup. No step is more than a
    doubling of what was tried, or a halving.
    """
    target -= target // MARGIN
    points = _monotone(measured)
    within = [point for point in points if point[1] <= target]
    beyond = [point for point in points if point[1] > target]
    tokens = 0
    if within:
        (fewest, least), (low, short) = within[0] if len(within) > 1 else (0, 0), within[-1]
        line = low + (low - fewest) * (target - short) // max(1, short - least)
        tokens = min(max(line, low + TILE), 2 * low)
        if beyond:
            high, long = beyond[0]
            between = low + (high - low) * (target - short) // (long - short)
            half = ((low + high) // 2 // TILE + 1) * TILE
            tokens = max(between, min(line, half, high))
    elif beyond:
        high, long = beyond[0]
        tokens = max(high * target // long, high // 2)
    return max(TILE, tokens // TILE * TILE)


def _monotone(measured: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """An iteration of each power of two of tokens, fewest tokens first: the slowest but one of four, the slower of two.

    More tokens take longer: where two disagree, the newer is believed.
    """
    classes: dict[int, list[tuple[int, int]]] = {}
    for tokens, duration in reversed(measured):
        classes.setdefault(tokens.bit_length(), []).append((duration, tokens))
    points: list[tuple[int, int]] = []
    for members in classes.values():  # the class with the newest iteration first
        duration, tokens = sorted(members)[len(members) // 2]
        if all((tokens < other) == (duration < theirs) or tokens == other or duration == theirs for other, theirs in points):
            points.append((tokens, duration))
    return sorted(points)
