"""What a checkpoint holds of a run: its state as tensors under global names and as JSON pieces, and whether a saved one fits."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from armillary.core.errors import InputError
from armillary.train.checkpoint_storage import Manifest, Parts, Staging

_FIX: Final = "resume with the run's own configuration (config.toml beside its checkpoints)"


def staged(step: int, state: Mapping[str, Any], rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This rank's part of the state, as copies, and what the manifest says of the whole (on rank 0). All ranks call it."""
    staging = Staging(rank)
    tensors, pieces = _split(state)
    tensors |= {f"rng.{rank}.{name}": value for name, value in state["rng"].state_dict().items()}
    with _quietly(world):
        save(tensors, storage_writer=staging, planner=DefaultSavePlanner(flatten_state_dict=False), no_dist=world == 1)
    body = {"step": step, "world": world, "optimizer": _kind(state["optimizer"]), "tensors": staging.tensors, "pieces": pieces}
    return staging.blocks, body


def load_state(manifest: Manifest, state: Mapping[str, Any], rank: int, world: int) -> None:
    """A checkpoint, whose parts are as they were written, into the pieces of a run. Raises InputError for another model's or optimizer's."""
    _check_fits(manifest, state)
    _make_state(_inner(state["optimizer"]))
    tensors, _ = _split(state)
    _forget_unsaved(_inner(state["optimizer"]), state["parallel"], tensors, manifest)
    own = rank % manifest.world
    rng = {name: torch.empty_like(value) for name, value in state["rng"].state_dict().items()}
    tensors |= {f"rng.{own}.{name}": value for name, value in rng.items()}
    _check_tensors(manifest, tensors)
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    with _quietly(world):
        load(tensors, storage_reader=Parts(manifest), planner=planner, no_dist=world == 1)
    for name, entries in _optimizer_state(state["optimizer"], state["parallel"]):
        for key, value in entries.items():
            if isinstance(value, int):
                entries[key] = int(tensors[f"optimizer.{name}.{key}"])
    state["rng"].load_state_dict(rng)
    for name, piece in manifest.pieces.items():
        state[name].load_state_dict(piece)


def load_weights(checkpoint: Path, model: nn.Module) -> int:
    """A checkpoint's weights alone into a whole model, in one process. Returns its step. Raises as `restore`."""
    manifest = Manifest.read(checkpoint)
    for part in sorted(manifest.parts):
        manifest.check(part)
    _check_model(manifest, dict(model.named_parameters()))
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    with _quietly(1):
        load(tensors, storage_reader=Parts(manifest), planner=DefaultLoadPlanner(flatten_state_dict=False), no_dist=True)
    return manifest.step


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as tensors under global names and as JSON pieces."""
    parallel = state["parallel"]
    tensors: dict[str, Tensor] = {f"model.{name}": parameter.detach() for name, parameter in parallel.named_parameters()}
    for name, entries in _optimizer_state(state["optimizer"], parallel):
        for key, value in entries.items():
            tensors[f"optimizer.{name}.{key}"] = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
    pieces = {name: piece.state_dict() for name, piece in state.items() if name not in ("parallel", "optimizer", "rng")}
    return tensors, pieces


def _kind(optimizer: Any) -> str:
    return type(_inner(optimizer)).__name__


def _optimizer_state(optimizer: Any, parallel: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The state that this rank keeps, by the parameter's name. Options (learning rate, ...) are the configuration's, not state."""
    names = {parameter: name for name, parameter in parallel.named_parameters()}
    for parameter, entries in list(_inner(optimizer).state.items()):
        if entries:
            yield names[parameter], entries


def _inner(optimizer: Any) -> Optimizer:
    """Under ZeRO stage 1 the optimizer of this rank's parameters."""
    inner: Optimizer = getattr(optimizer, "optim", optimizer)
    return inner


@torch.no_grad()
def _make_state(optimizer: Optimizer) -> None:
    """Lets an optimizer that has made no step lay out its state: a step with zero gradients and a learning rate of zero."""
    if any(optimizer.state.values()):
        return
    parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    gradients, rates = [p.grad for p in parameters], [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _forget_unsaved(optimizer: Optimizer, parallel: Any, tensors: dict[str, Tensor], manifest: Manifest) -> None:
    """A parameter that never had a gradient has no saved state, and gets none."""
    for name, parameter in parallel.named_parameters():
        mine = [key for key in tensors if key.startswith(f"optimizer.{name}.")]
        if mine and not any(key in manifest.tensors for key in mine):
            optimizer.state.pop(parameter, None)
            for key in mine:
                del tensors[key]


def _check_fits(manifest: Manifest, state: Mapping[str, Any]) -> None:
    """Raises InputError for another model or another optimizer, saying which."""
    _check_model(manifest, dict(state["parallel"].named_parameters()))
    where = manifest.folder
    if manifest.optimizer != _kind(state["optimizer"]):
        raise InputError(f"{where} was trained with {manifest.optimizer}, not {_kind(state['optimizer'])}", _FIX, field="optimizer.name")
    pieces = {name for name in state if name not in ("parallel", "optimizer", "rng")}
    if differing := sorted(pieces ^ manifest.pieces.keys()):
        has = "has" if differing[0] in manifest.pieces else "has no"
        raise InputError(
            f"{where} {has} state of {differing[0]!r}, other than this run (its precision is another)", _FIX, field="precision"
        )


def _check_model(manifest: Manifest, parameters: Mapping[str, Tensor]) -> None:
    where = manifest.folder
    have = {name.removeprefix("model."): tensor["shape"] for name, tensor in manifest.tensors.items() if name.startswith("model.")}
    want = {name: list(parameter.shape) for name, parameter in parameters.items()}
    if missing := sorted(want.keys() - have.keys()):
        raise InputError(f"{where} is another model's: it has no {missing[0]} ({len(missing)} such)", _FIX)
    if extra := sorted(have.keys() - want.keys()):
        raise InputError(f"{where} is another model's: its {extra[0]} ({len(extra)} such) has no place in this one", _FIX)
    for name, shape in want.items():
        if have[name] != shape:
            raise InputError(f"{where} is another model's: its {name} is {have[name]}, this model's is {shape}", _FIX)


def _check_tensors(manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name not in manifest.tensors:
            raise InputError(f"{manifest.folder} has no {name}", "its optimizer had other options: resume with the run's own configuration")
        if manifest.tensors[name]["shape"] != list(tensor.shape):
            raise InputError(
                f"{manifest.folder} has {name} as {manifest.tensors[name]['shape']}, this run as {list(tensor.shape)}",
                "resume with the run's own configuration",
            )


def _quietly(world: int) -> contextlib.AbstractContextManager[Any]:
    """One process is what is wanted where there is one: DCP warns of it."""
    if world > 1:
        return contextlib.nullcontext()
    return warnings.catch_warnings(action="ignore", category=UserWarning)
