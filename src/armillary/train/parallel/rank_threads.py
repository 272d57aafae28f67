"""Many ranks in one process, a thread each: torch's private threaded process group, wrapped here so that nothing else imports it.

FSDP2, DTensor and DCP run unmodified; collectives are sums in rank order, so results are reproducible. For tests
and for the table of layouts: wide layouts on a machine with few cores. What fails here and not in processes:
`DTensor.full_tensor` of shards of unequal sizes.
"""

from __future__ import annotations

import functools
import operator
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed import multi_threaded_pg

Result = TypeVar("Result")
_threaded: Any = multi_threaded_pg  # neither has types for what is private
_c10d: Any = _distributed_c10d


def run_ranks(world: int, work: Callable[[int], Result]) -> list[Result]:
    """`work(rank)` in `world` threads, each with its own default process group. Returns the results in rank order.

    The first exception of a rank ends the others and is raised here.
    """
    results: dict[int, Result] = {}
    failures: list[BaseException] = []
    store = _c10d.HashStore()

    def rank_main(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            results[rank] = work(rank)
        except BaseException as error:
            if not isinstance(error, SystemExit):  # how the threads that wait for a failed one are ended
                failures.append(error)
            _threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    excepthook = sys.excepthook  # every process group puts its rank before it
    plain_sum = _threaded._reduce_ops[dist.ReduceOp.SUM]
    _c10d._set_thread_isolation_mode(True)
    _threaded._install_threaded_pg()
    _threaded._reduce_ops[dist.ReduceOp.SUM] = _sum_in_rank_order
    try:
        threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        _threaded._reduce_ops[dist.ReduceOp.SUM] = plain_sum
        _threaded._uninstall_threaded_pg()
        _threaded.ProcessLocalGroup.reset()
        _c10d._set_thread_isolation_mode(False)
        # DTensor remembers meshes that look alike, and with them groups that are gone.
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
        sys.excepthook = excepthook
    if failures:
        raise failures[0]
    return [results[rank] for rank in range(world)]


def _sum_in_rank_order(tensors: list[torch.Tensor]) -> Any:
    return functools.reduce(operator.add, tensors)
