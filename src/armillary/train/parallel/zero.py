"""ZeRO's three stages (Rajbhandari et al. 2020) as three policies on one plan: the reference that FSDP2 is read beside.

Every unit of a model (a block, and the rest as the root) is one flat buffer, padded to a multiple of the ranks; rank r
owns part r of each. A stage only says when parts are gathered into wholes, when gradients are reduced to parts, and
what is freed. Small and exact, not fast: nothing overlaps. What trains for real is FSDP2 (`fsdp`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from armillary.train.parallel.local_tensor import resize_storage

# torch 2.13 renamed both and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_keep_version: Any = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class ZeroPolicy:
    """What a stage does, and when. The optimizer's state is partitioned in all of them."""

    reduce_in_backward: bool  # a unit's gradients are reduced and freed when they are complete, not all at the step
    partition_parameters: bool  # wholes exist only around a unit's forward and backward; otherwise they are gathered after the step


STAGES: dict[int, ZeroPolicy] = {
    1: ZeroPolicy(reduce_in_backward=False, partition_parameters=False),
    2: ZeroPolicy(reduce_in_backward=True, partition_parameters=False),
    3: ZeroPolicy(reduce_in_backward=True, partition_parameters=True),
}


class FlatUnit:
    """Parameters of one dtype as one buffer of `ranks` equal parts, of which this rank owns number `rank`.

    part: this rank's [padded / ranks] elements, always there. whole: [padded]; its storage comes and goes when
    `partitioned`, and the parameters are views of it. gradient: the reduced part, once there is one.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rank: int, ranks: int, partitioned: bool) -> None:
        self.trainable = parameters[0].requires_grad
        self.partitioned = partitioned
        count = sum(parameter.numel() for parameter in parameters)
        self.elements = count + -count % ranks
        flat = [parameter.detach().reshape(-1) for parameter in parameters]
        self.whole = torch.cat([*flat, flat[0].new_zeros(self.elements - count)])
        own = self.whole.narrow(0, rank * (self.elements // ranks), self.elements // ranks)
        self.part = own.clone() if partitioned else own
        self.gradient: Tensor | None = None
        self.parameters: list[nn.Parameter] = []  # in the order given: what takes their place
        offset = 0
        for parameter in parameters:
            view = self.whole.narrow(0, offset, parameter.numel()).view_as(parameter)
            self.parameters.append(nn.Parameter(view, self.trainable))
            offset += parameter.numel()
        self.free()

    def gather(self, group: dist.ProcessGroup | None) -> None:
        """Makes the wholes of every rank's part."""
        if self.partitioned:
            resize_storage(self.whole, self.elements)
        # Autograd saved views of this storage in forward; refilling it with the same numbers changes nothing that it saw.
        with torch.no_grad(), _keep_version(self.whole):
            _all_gather(self.whole, self.part.clone(), group=group)

    def free(self) -> None:
        """Gives the wholes' memory back."""
        if self.partitioned:
            resize_storage(self.whole, 0)

    @torch.no_grad()
    def reduce(self, group: dist.ProcessGroup | None) -> None:
        """Sums the gradients over ranks, adds this rank's part to `gradient` and frees the wholes. No gradient counts as zero."""
        gradients = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in self.parameters]
        count = sum(gradient.numel() for gradient in gradients)
        whole = torch.cat([*gradients, gradients[0].new_zeros(self.elements - count)])
        part = torch.empty_like(self.part)
        _reduce_scatter(part, whole, group=group)
        self.gradient = part if self.gradient is None else self.gradient + part
        for parameter in self.parameters:
            parameter.grad = None


class ZeroExecutor:
    """A module trained under a ZeRO stage: call the module, `backward` its loss, then `step`.

    units: the submodules that are gathered one at a time, none inside another; what they do not hold is the root.
    A parameter shared by two modules belongs to the root. optimizer: makes the optimizer of this rank's float32 parts.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[nn.Module],
        stage: Literal[1, 2, 3],
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        rank: int,
        ranks: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.policy, self.group = STAGES[stage], group
        self.units: list[list[FlatUnit]] = []
        for owner, parameters in list(_owners(module, units)):
            flats = []
            for alike in _alike(parameters):
                flats.append(FlatUnit(alike, rank, ranks, self.policy.partition_parameters))
                _replace(module, dict(zip(alike, flats[-1].parameters, strict=True)))
            self.units.append(flats)
            self._hook(owner, flats)
        self.trainable = [flat for flats in self.units for flat in flats if flat.trainable]
        # Weights that are not float32 get a float32 master part, which is what the optimizer updates.
        self.masters = [nn.Parameter(flat.part if flat.part.dtype == torch.float32 else flat.part.float()) for flat in self.trainable]
        self.optimizer = optimizer(self.masters)

    def _hook(self, owner: nn.Module, flats: list[FlatUnit]) -> None:
        waiting: set[int] = set()

        def gather(*_: Any) -> None:
            for flat in flats:
                flat.gather(self.group)

        def after_forward(_: nn.Module, __: Any, out: Tensor) -> None:
            for flat in flats:
                flat.free()
            if out.requires_grad:
                waiting.update(id(p) for flat in flats for p in flat.parameters if p.requires_grad)
                out.register_hook(gather)  # type: ignore[no-untyped-call]

        def ready(flat: FlatUnit, parameter: nn.Parameter) -> None:
            waiting.discard(id(parameter))
            if all(id(p) not in waiting for p in flat.parameters):
                flat.reduce(self.group)
            if not waiting:
                for each in flats:
                    each.free()

        if self.policy.partition_parameters:
            owner.register_forward_pre_hook(gather)
            owner.register_forward_hook(after_forward)
        if self.policy.reduce_in_backward:
            for flat in flats:
                for parameter in flat.parameters if flat.trainable else ():
                    partitioned = self.policy.partition_parameters
                    done = partial(ready, flat) if partitioned else partial(self._reduce_when_complete, flat)
                    parameter.register_post_accumulate_grad_hook(done)  # type: ignore[no-untyped-call]

    def _reduce_when_complete(self, flat: FlatUnit, _: nn.Parameter) -> None:
        if all(parameter.grad is not None for parameter in flat.parameters):
            flat.reduce(self.group)

    def finish_backward(self) -> None:
        """Reduces what is still whole: everything in stage 1, units with unused parameters in the others."""
        for flat in self.trainable:
            if flat.gradient is None or any(parameter.grad is not None for parameter in flat.parameters):
                flat.reduce(self.group)
            flat.free()

    @torch.no_grad()
    def step(self) -> None:
        """Updates this rank's parts; where wholes are kept, gathers them anew."""
        self.finish_backward()
        for flat, master in zip(self.trainable, self.masters, strict=True):
            assert flat.gradient is not None
            master.grad = flat.gradient.to(master.dtype)
        self.optimizer.step()
        for flat, master in zip(self.trainable, self.masters, strict=True):
            if master.dtype != flat.part.dtype:
                flat.part.copy_(master)
            flat.gradient = master.grad = None
            if not flat.partitioned:
                flat.gather(self.group)

    def gather_all(self) -> None:
        """Makes every parameter whole, to be read."""
        for flat in (flat for unit in self.units for flat in unit):
            flat.gather(self.group)

    def state_bytes(self) -> dict[str, int]:
        """Bytes that this rank's model states hold right now: storages counted, each once."""
        seen: set[int] = set()
        flats = [flat for unit in self.units for flat in unit]
        gradients = [p.grad for flat in flats for p in flat.parameters] + [flat.gradient for flat in flats]
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return {
            "parameters": _storages([tensor for flat in flats for tensor in (flat.part, flat.whole)], seen),
            "gradients": _storages(gradients, seen),
            "optimizer": _storages([*self.masters, *states], seen),
        }


def _owners(module: nn.Module, units: Sequence[nn.Module]) -> Iterable[tuple[nn.Module, list[nn.Parameter]]]:
    """(unit, its parameters), the root last; a parameter that two of them reach belongs to the root."""
    root = len(units)
    home = {child: number for number, unit in enumerate(units) for child in unit.modules()}
    reached: dict[nn.Parameter, set[int]] = {}
    for child in module.modules():
        for parameter in child._parameters.values():
            if parameter is not None:
                reached.setdefault(parameter, set()).add(home.get(child, root))
    for number, owner in enumerate([*units, module]):
        own = [parameter for parameter, numbers in reached.items() if (numbers if len(numbers) == 1 else {root}) == {number}]
        if own:
            yield owner, own


def _replace(module: nn.Module, parameters: dict[nn.Parameter, nn.Parameter]) -> None:
    """Puts new parameters in the old ones' places, wherever they are shared (`.data =` would not do for a LocalTensor)."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter in parameters:
                child._parameters[name] = parameters[parameter]


def _alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Groups that may share a buffer: the same dtype, and all trained or all frozen."""
    groups: dict[tuple[torch.dtype, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.dtype, parameter.requires_grad), []).append(parameter)
    return list(groups.values())


def _storages(tensors: Iterable[Tensor | None], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.numel() > 1:  # step counters are scalars
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                total += storage.nbytes()
    return total
