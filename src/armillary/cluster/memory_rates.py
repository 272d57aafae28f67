"""What this machine's memory really does: reading, writing and copying buffers far larger than the caches, by number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from armillary.cluster.measure import best_time
from armillary.cluster.profile import MemoryRate


def measure_memory(threads: int, size: int = 256_000_000, seconds: float = 0.5) -> tuple[MemoryRate, ...]:
    """Read, write and copy `size` bytes with torch on `threads` threads, in about `3 * seconds` beside touching the buffers once."""
    import torch

    with torch_threads(threads), torch.inference_mode():
        rows = max(1, size // (4 * 4096))
        source, target = torch.ones(rows, 4096), torch.zeros(rows, 4096)
        vector, product = torch.ones(4096), torch.ones(rows)
        size = source.nbytes
        # Two readers, for neither is the faster one everywhere: a matrix-vector product and a sum.
        read = min(best_time(lambda: torch.mv(source, vector, out=product), seconds / 2), best_time(source.sum, seconds / 2))
        write = best_time(lambda: target.fill_(1.0), seconds)
        copy = best_time(lambda: target.copy_(source), seconds)
    return (
        MemoryRate(operation="read", threads=threads, size=size, bandwidth=size / read),
        MemoryRate(operation="write", threads=threads, size=size, bandwidth=size / write),
        MemoryRate(operation="copy", threads=threads, size=size, bandwidth=2 * size / copy),
    )


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch with so many threads, and what it had before afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
