"""Documents of many lengths into rows of one length."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from armillary.core.errors import InputError


def first_fit_decreasing(lengths: ArrayLike, capacity: int) -> NDArray[np.int64]:
    """The bin of every item: each, longest first, goes into the first bin that has room.

    `lengths` [items] in 1 .. capacity; items of one length keep their order. At most 11/9 of the fewest bins possible, plus 6/9
    (Dosa 2007). All items of one length are placed in one pass over the bins, so the cost is distinct lengths x bins, not items x bins.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and not 1 <= sizes.min() <= sizes.max() <= capacity:
        raise InputError(f"an item of length {int(sizes.max())} or {int(sizes.min())} is outside 1 .. {capacity}", "split or drop it first")
    bins = np.empty(sizes.size, dtype=np.int64)
    room = np.empty(0, dtype=np.int64)  # what is left of every open bin
    items = np.argsort(-sizes, kind="stable")
    edges = np.flatnonzero(np.diff(sizes[items])) + 1
    for group in np.split(items, edges) if sizes.size else ():
        size, count = int(sizes[group[0]]), group.size
        # First fit fills a bin with this length until it no longer fits, then goes on to the next: room // size a bin.
        places = room // size
        filled = int(np.searchsorted(np.cumsum(places), count))
        if filled == room.size:  # not enough room: open what is missing
            missing = count - int(places.sum())
            opened = -(-missing // (capacity // size))
            room = np.concatenate([room, np.full(opened, capacity)])
            places = np.concatenate([places, np.full(opened, capacity // size)])
        taken = np.minimum(places, np.maximum(0, count - (np.cumsum(places) - places)))
        bins[group] = np.repeat(np.arange(room.size), taken)
        room -= taken * size
    return bins
