"""Which layers of a model draft for it (Zhang et al., "Draft & Verify", ACL 2024)."""

from __future__ import annotations

from armillary.core.errors import InputError


def kept_layers(total: int, share: float) -> tuple[int, ...]:
    """The layers of a self-draft: `share` of all, evenly spread, the first and the last among them.

    Raises InputError when that is fewer than two or all of them.
    """
    count = round(total * share)
    if not 2 <= count < total:
        raise InputError(
            f"draft_layers {share:g} keeps {count} of {total} layers", f"keep from 2 to {total - 1} of them", field="draft_layers"
        )
    return tuple(round(place * (total - 1) / (count - 1)) for place in range(count))
