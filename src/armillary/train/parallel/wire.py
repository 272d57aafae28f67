"""Counts what collectives put on the wire, operation by operation."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from armillary.train.parallel.volume import ring_bytes

_c10d: Any = dist.distributed_c10d  # private names have no types
Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast"]
_OPERATIONS: dict[str, Operation] = {
    "c10d::allreduce_": "all_reduce",
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::broadcast_": "broadcast",
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
}
_NOT_TRAFFIC = {"_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd", "c10d::barrier", "c10d::monitored_barrier_"}


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective that this rank took part in; `bytes` of the whole tensor."""

    operation: Operation
    bytes: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends when the collective is a ring (a broadcast: a chain)."""
        return self.bytes if self.operation == "broadcast" else ring_bytes(self.operation, self.bytes, self.ranks)


class WireCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, every collective of more than one rank is written down, DDP's and FSDP2's own too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collectives: list[Collective] = []

    @property
    def sent(self) -> float:
        """Bytes that this rank sent, by the ring formula."""
        return sum(collective.sent for collective in self.collectives)

    def by_operation(self) -> dict[Operation, int]:
        """Bytes of tensors by operation."""
        totals: defaultdict[Operation, int] = defaultdict(int)
        for collective in self.collectives:
            totals[collective.operation] += collective.bytes
        return dict(totals)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")) and name not in _NOT_TRAFFIC:
            self._record(name, args)
        return func(*args, **(kwargs or {}))

    def _record(self, name: str, args: tuple[Any, ...]) -> None:
        operation = _OPERATIONS[name]
        if name.startswith("c10d::"):
            # all_gather (out, in, group), reduce_scatter (out, in, group), all_reduce and broadcast ([tensor], group)
            at = 2 if operation in ("all_gather", "reduce_scatter") else 1
            group = dist.ProcessGroup.unbox(args[at])
            tensor: Tensor = args[1] if operation == "reduce_scatter" else args[0]
        else:
            group = _c10d._resolve_process_group(args[-1])
            tensor = args[0]
        tensors = tensor if isinstance(tensor, list) else [tensor]
        size = sum(part.numel() * part.element_size() for part in tensors)
        if name == "_c10d_functional::all_gather_into_tensor":
            size *= group.size()  # the argument is one rank's part
        if group.size() > 1:
            self.collectives.append(Collective(operation, size, group.size()))
