"""Many ranks in one process and one thread: torch's private LocalTensor, wrapped here so that nothing else imports it.

Every operation runs once a simulated rank, collectives are sums in rank order: exact, reproducible, and no rank can
hang. What it cannot run is FSDP2 (which resizes storages and slices by the rank of the process) and DDP (C++);
`rank_threads` runs those.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def local_ranks(world: int) -> Iterator[LocalTensorMode]:
    """Within, this process is ranks 0 .. world-1 at once, with their own default process group."""
    excepthook = sys.excepthook  # every process group puts its rank before it
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        with LocalTensorMode(world) as mode:
            yield mode
    finally:
        dist.destroy_process_group()
        # DTensor remembers meshes that look alike, and with them groups that are gone.
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
        sys.excepthook = excepthook


def by_rank(mode: LocalTensorMode, value: Callable[[int], Tensor]) -> Tensor:
    """A tensor that is `value(rank)` on each simulated rank."""
    return mode.rank_map(value)


def rank_values(tensor: Tensor) -> list[Tensor]:
    """What each simulated rank holds, in rank order."""
    assert isinstance(tensor, LocalTensor)
    return [tensor._local_tensors[rank] for rank in sorted(tensor._local_tensors)]


def resize_storage(tensor: Tensor, elements: int) -> None:
    """Frees (0) or allocates the memory behind a tensor, on every simulated rank where there are any."""
    parts = tensor._local_tensors.values() if isinstance(tensor, LocalTensor) else (tensor,)
    for part in parts:
        part.untyped_storage().resize_(elements * part.itemsize)
