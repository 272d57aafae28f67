"""How many tokens an iteration may have for its duration to meet a target, from what recent iterations took (Sarathi-Serve, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence

TILE = 16  # tokens: rows of a block of the matrix products; a part of a block costs a whole one
MARGIN = 10  # a tenth of the target is left for what the number of tokens does not tell: long contexts, hiccups


def tokens_within(target: int, measured: Sequence[tuple[int, int]]) -> int:
    """Tokens of an iteration that takes `target` ns less a tenth: a multiple of `TILE`, at least one.

    `measured` are iterations as (tokens, ns), oldest first. The paper profiles a machine once; here the budget is
    found while serving, and follows contexts that grow and neighbours that come. Until an iteration was too long, the line
    through the smallest and the largest that were not is followed (through the origin while there is one: an iteration's fixed part
    makes that too little, never too much). From then on the answer lies between those two, and is neared from below. No
    step is more than a doubling of what was tried, or a halving.
    """
    target -= target // MARGIN
    points = _monotone(measured)
    within = [point for point in points if point[1] <= target]
    beyond = [point for point in points if point[1] > target]
    if within and beyond:
        (low, short), (high, long) = within[-1], beyond[0]
        tokens = low + (high - low) * (target - short) // (long - short)
        if low + TILE < high:
            tokens = max(tokens, low + TILE)
    elif within:
        (fewest, least), (low, short) = within[0] if len(within) > 1 else (0, 0), within[-1]
        tokens = min(low + (low - fewest) * (target - short) // max(1, short - least), 2 * low)
    elif beyond:
        high, long = beyond[0]
        tokens = max(high * target // long, high // 2)
    else:
        tokens = 0
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
