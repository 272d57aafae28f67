"""A DeepSpeed JSON as this trainer's keys: what both have is carried over, what only DeepSpeed has is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from armillary.core.errors import InputError
from armillary.models.fields import read_json

MAX_BYTES: Final = 1_000_000
_NO_EFFECT: Final = {
    "steps_per_print": "progress is always shown",
    "wall_clock_breakdown": "the trace has every phase",
    "dump_state": "the run's folder has the resolved configuration",
    "memory_breakdown": "memory is always shown",
    "zero_allow_untested_optimizer": "every optimizer is tested under every stage",
    "zero_force_ds_cpu_optimizer": "there is one implementation of each optimizer",
    "prescale_gradients": "the loss is divided by the global number of tokens before the first backward pass",
    "gradient_predivide_factor": "the loss is divided by the global number of tokens before the first backward pass",
}
_ZERO_NO_EFFECT: Final = (
    "overlap_comm", "contiguous_gradients", "reduce_scatter", "allgather_partitions", "allgather_bucket_size", "reduce_bucket_size",
    "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "round_robin_gradients", "stage3_gather_16bit_weights_on_model_save",
)  # fmt: skip
_OPTIMIZERS: Final = {"adam": "adamw", "adamw": "adamw", "lion": "lion", "fusedadam": "adamw", "fusedlion": "lion"}
_SCHEDULES: Final = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


@dataclass(frozen=True, slots=True)
class Imported:
    """`flags`: dotted keys of `TrainConfig`. `notes`: what a reader should know, one line each: keys without effect here."""

    flags: Mapping[str, Any]
    notes: tuple[str, ...]


def read_deepspeed(path: str | Path, world: int = 1) -> Imported:
    """The keys of a DeepSpeed file for `world` ranks. Raises InputError that names the first key that has no counterpart here."""
    return from_deepspeed(read_json(Path(path), MAX_BYTES), world, str(path))


def from_deepspeed(raw: Mapping[str, Any], world: int = 1, source: str = "the DeepSpeed file") -> Imported:
    """As `read_deepspeed`, of a parsed file."""
    taken = _Taken(raw, source)
    flags: dict[str, Any] = {}
    notes: list[str] = []
    _batch(taken, flags, world)
    _clipping(taken, flags, notes)
    _precision(taken, flags, notes)
    _optimizer(taken, flags, notes)
    _schedule(taken, flags, notes)
    _zero(taken, flags, notes, world)
    for key, why in _NO_EFFECT.items():
        if taken.pop(key) is not None:
            notes.append(f"{key} has no effect: {why}")
    taken.refuse_rest()
    return Imported({key: value for key, value in flags.items() if value is not None}, tuple(notes))


class _Taken:
    """A section of the file, from which keys are taken; what is left over is refused."""

    def __init__(self, raw: Mapping[str, Any], source: str, path: str = "") -> None:
        self.left, self.source, self.path = dict(raw), source, path

    def pop(self, key: str) -> Any:
        value = self.left.pop(key, None)
        if value == "auto":
            raise InputError(f'{self.source}: {self.path}{key} is "auto"', "write the number: nothing else fills it in here", field=key)
        return value

    def number(self, key: str) -> int | float | None:
        value = self.pop(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InputError(f"{self.source}: {self.path}{key} is {value!r}", "give a number", field=key)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.pop(key)
        if value is not None and not isinstance(value, bool):
            raise InputError(f"{self.source}: {self.path}{key} is {value!r}", "give true or false", field=key)
        return default if value is None else value

    def section(self, key: str) -> _Taken | None:
        value = self.left.pop(key, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise InputError(f"{self.source}: {self.path}{key} is {value!r}", "give an object", field=key)
        return _Taken(value, self.source, f"{self.path}{key}.")

    def refuse(self, key: str, why: str) -> InputError:
        return InputError(f"{self.source}: {self.path}{key} is not supported ({why})", "remove it", field=f"{self.path}{key}")

    def refuse_rest(self) -> None:
        for key, value in self.left.items():
            if value not in (None, False) and not (isinstance(value, Mapping) and value.get("enabled") is False):
                raise self.refuse(key, "this trainer has no counterpart")


def _batch(taken: _Taken, flags: dict[str, Any], world: int) -> None:
    rows, micro = taken.number("train_batch_size"), taken.number("train_micro_batch_size_per_gpu")
    steps = taken.number("gradient_accumulation_steps")
    if rows is None and micro is not None:
        rows = micro * (steps or 1) * world
    if micro is None and rows is not None:
        micro = rows / ((steps or 1) * world)
    if rows is not None and micro is not None and rows != micro * world * (steps if steps is not None else rows / (micro * world)):
        raise InputError(
            f"{taken.source}: train_batch_size {rows} is not train_micro_batch_size_per_gpu {micro:g} x "
            f"gradient_accumulation_steps {steps} x {world} ranks",
            "give two of the three",
            field="train_batch_size",
        )
    if micro is not None and micro != int(micro):
        raise InputError(
            f"{taken.source}: train_batch_size {rows} does not divide among {world} ranks x {steps} steps", "choose a multiple"
        )
    flags["batch.rows"], flags["batch.micro_rows"] = (None if value is None else int(value) for value in (rows, micro))


def _clipping(taken: _Taken, flags: dict[str, Any], notes: list[str]) -> None:
    bound = taken.number("gradient_clipping")
    if bound is None:
        notes.append("gradient_clipping is absent, with which DeepSpeed does not clip: clip_norm stays as it is configured here")
    flags["clip_norm"] = "none" if bound == 0 else bound


def _precision(taken: _Taken, flags: dict[str, Any], notes: list[str]) -> None:
    wanted = []
    for name in ("bf16", "fp16"):
        section = taken.section(name)
        if section is None or not section.flag("enabled", False):
            continue
        wanted.append(name)
        if name == "fp16":
            if section.number("loss_scale"):
                raise section.refuse("loss_scale", "the scale is dynamic here; initial_scale_power sets its start")
            power = section.number("initial_scale_power")
            flags["loss_scale"] = None if power is None else 2.0**power
            for key, own in (("loss_scale_window", 2000), ("hysteresis", 1)):
                value = section.number(key)
                if value is not None and value != own:
                    raise section.refuse(key, f"it is {own} here")
            if section.number("min_loss_scale") is not None:
                notes.append("fp16.min_loss_scale has no effect: a run whose scale falls below 2^-14 ends")
            notes.append("fp16: the loss scale halves at the first overflow and doubles after 2,000 clean steps")
        section.refuse_rest()
    if len(wanted) == 2:
        raise InputError(f"{taken.source}: bf16 and fp16 are both enabled", "enable one", field="fp16")
    flags["precision"] = wanted[0] if wanted else None


def _optimizer(taken: _Taken, flags: dict[str, Any], notes: list[str]) -> None:
    section = taken.section("optimizer")
    if section is None:
        return
    kind = section.pop("type")
    if str(kind).lower() not in _OPTIMIZERS:
        raise section.refuse("type", f"{kind!r}; known are Adam, AdamW and Lion")
    flags["optimizer.name"] = _OPTIMIZERS[str(kind).lower()]
    params = section.section("params") or _Taken({}, taken.source)
    if str(kind).lower() in ("adam", "fusedadam") and not params.flag("adam_w_mode", True):
        raise params.refuse("adam_w_mode", "decay is decoupled here")
    params.flag("torch_adam", False)
    flags["optimizer.lr"] = params.number("lr")
    flags["optimizer.eps"] = params.number("eps")
    # What is absent is DeepSpeed's default, not ours: no decay, and Adam's usual second moment.
    flags["optimizer.weight_decay"] = params.number("weight_decay") or 0.0
    if flags["optimizer.weight_decay"]:
        notes.append("optimizer.params.weight_decay is for matrices: norms and biases are not decayed here")
    betas = params.pop("betas")
    usual = (0.9, 0.999) if flags["optimizer.name"] == "adamw" else None
    flags["optimizer.betas"] = usual if betas is None else tuple(betas)
    params.refuse_rest()
    section.refuse_rest()


def _schedule(taken: _Taken, flags: dict[str, Any], notes: list[str]) -> None:
    section = taken.section("scheduler")
    if section is None:
        if "optimizer.name" in flags:
            notes.append(
                "scheduler is absent, with which DeepSpeed's learning rate is constant: the schedule stays as it is configured here"
            )
        return
    kind = section.pop("type")
    if kind not in _SCHEDULES:
        raise section.refuse("type", f"{kind!r}; known are {', '.join(_SCHEDULES)}")
    flags["schedule.name"] = _SCHEDULES[kind]
    params = section.section("params") or _Taken({}, taken.source)
    warmup, total = params.number("warmup_num_steps"), params.number("total_num_steps")
    shape = params.pop("warmup_type")
    if warmup is None:
        raise InputError(f"{taken.source}: scheduler.params.warmup_num_steps is absent", "write it: DeepSpeed's default is 1000")
    if warmup and shape != "linear":
        raise params.refuse("warmup_type", f'{shape or "log"!r}, DeepSpeed\'s default, bends the warm-up; it is "linear" here: say so')
    if params.number("warmup_min_lr"):
        raise params.refuse("warmup_min_lr", "the warm-up starts near 0 here")
    highest = params.number("warmup_max_lr")
    if highest is not None:
        flags["optimizer.lr"] = highest
    elif kind != "WarmupCosineLR" and flags.get("optimizer.lr") not in (None, 1e-3):
        notes.append("scheduler.params.warmup_max_lr is absent: the learning rate is optimizer.params.lr, not DeepSpeed's default of 0.001")
    floor = params.number("cos_min_ratio")
    flags["schedule.final"] = 1e-4 if floor is None and kind == "WarmupCosineLR" else floor
    flags["schedule.warmup"] = int(warmup)
    flags["steps"] = None if total is None else int(total)
    params.refuse_rest()
    section.refuse_rest()


def _zero(taken: _Taken, flags: dict[str, Any], notes: list[str], world: int) -> None:
    section = taken.section("zero_optimization")
    stage = 0
    if section is not None:
        stage = int(section.number("stage") or 0)
        if stage not in (0, 1, 2, 3):
            raise InputError(f"{taken.source}: zero_optimization.stage is {stage}", "give 0, 1, 2 or 3", field="zero_optimization.stage")
        for key in ("offload_optimizer", "offload_param"):
            offload = section.section(key)
            if offload is not None and offload.pop("device") not in (None, "none"):
                raise section.refuse(key, "offloading comes later")
        for key in _ZERO_NO_EFFECT:
            if section.left.pop(key, None) is not None:
                notes.append(f"zero_optimization.{key} has no effect: torch's FSDP2 decides it")
        section.refuse_rest()
    if world > 1:
        flags["layout"] = f"dp_replicate={world}" if stage == 0 else f"dp_shard={world},zero_stage={stage}"
