"""How many ranks share a model, and in which way: parallelism as data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from armillary.core.errors import InputError
from armillary.models.config import ModelConfig

DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
_LATER = {"pp": "pipeline schedules", "cp": "context parallelism", "ep": "expert parallelism"}


@dataclass(frozen=True, slots=True)
class Layout:
    """The degree of every kind of parallelism; the product of all but `ep` is the number of ranks.

    `dp_replicate`: ranks with a whole copy each (DDP). `dp_shard`: ranks that share one copy, ZeRO-style; `zero_stage`
    says what of it (1 optimizer state; 2 and gradients, parameters are kept from forward to backward; 3 parameters too:
    Rajbhandari et al. 2020). Both together are HSDP. `tp`: ranks that split each matrix (Shoeybi et al. 2019);
    `sequence_parallel` splits the norms and residuals between them by tokens too (Korthikanti et al. 2023).
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    zero_stage: Literal[1, 2, 3] = 3

    def __post_init__(self) -> None:
        for name in DIMENSIONS:
            degree = getattr(self, name)
            if degree < 1:
                raise InputError(f"layout: {name} is {degree}", "give at least 1 (1 switches it off)", field=name)
            if degree > 1 and name in _LATER:
                raise InputError(f"layout: {name}={degree} comes with {_LATER[name]}", f"leave {name} at 1 until then", field=name)
        if self.sequence_parallel and self.tp == 1:
            raise InputError(
                "layout: sequence_parallel splits tokens between tensor-parallel ranks, and tp is 1",
                "set tp=2 or more, or drop it",
                field="sequence_parallel",
            )
        if self.zero_stage not in (1, 2, 3):
            raise InputError(f"layout: zero_stage is {self.zero_stage}", "give 1, 2 or 3", field="zero_stage")
        if self.zero_stage == 1 and (self.dp_replicate > 1 or self.tp > 1):
            raise InputError(
                "layout: zero_stage=1 shards the optimizer over dp_shard alone",
                "use zero_stage=2 or 3 together with dp_replicate or tp",
                field="zero_stage",
            )

    @classmethod
    def parse(cls, text: str) -> Layout:
        """`dp_shard=2,tp=2,sequence_parallel` -> Layout. The empty string, or `single`, is one rank. Raises InputError that names the part."""
        values: dict[str, int | bool] = {}
        known = [field.name for field in fields(cls)]
        text = "" if text.strip() == "single" else text
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, given, value = (piece.strip() for piece in part.partition("="))
            if name not in known:
                raise InputError(f"layout: there is no {name!r}", f"the parts are {', '.join(known)}", field=name)
            if name in values:
                raise InputError(f"layout: {name} is given twice", "give it once", field=name)
            if name == "sequence_parallel":
                if given and value.lower() not in ("true", "false"):
                    raise InputError(
                        f"layout: sequence_parallel={value!r}", "write sequence_parallel or sequence_parallel=false", field=name
                    )
                values[name] = value.lower() != "false"
            elif not (value.isascii() and value.isdigit()):
                raise InputError(f"layout: {part!r} is no degree", f"write {name}=2", field=name)
            else:
                values[name] = int(value)
        return cls(**values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """What `parse` reads; the parts at their defaults are left out. One rank is `single`."""
        parts = [f"{name}={getattr(self, name)}" for name in DIMENSIONS if getattr(self, name) > 1]
        parts += ["sequence_parallel"] if self.sequence_parallel else []
        parts += [f"zero_stage={self.zero_stage}"] if self.zero_stage != 3 and self.dp_shard > 1 else []
        return ",".join(parts) or "single"

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Number of ranks (or tensor-parallel groups) that see different data."""
        return self.dp_replicate * self.dp_shard

    def check_world(self, world: int) -> None:
        """Raises InputError unless exactly `world` ranks are wanted."""
        if self.world != world:
            raise InputError(
                f"layout {self} is for {self.world} ranks ({_product(self)}), but {world} run",
                f"start with torchrun --nproc-per-node {self.world}, or give a layout whose degrees multiply to {world}",
                field="layout",
            )

    def check_model(self, config: ModelConfig) -> None:
        """Raises InputError when `tp` does not divide what it splits. The vocabulary may be uneven; no rank's part of it may be empty."""
        if self.tp == 1:
            return
        divided = (("num_heads", config.num_heads), ("intermediate_size", config.intermediate_size))
        for name, size in divided:
            if size % self.tp:
                raise InputError(f"layout: tp={self.tp} does not divide {name}={size}", f"use tp in {_divisors(config)}", field="tp")
        if config.num_kv_heads % self.tp and self.tp % config.num_kv_heads:
            raise InputError(
                f"layout: {config.num_kv_heads} key/value heads can be neither split nor repeated evenly over tp={self.tp}",
                f"use tp in {_divisors(config)}",
                field="tp",
            )
        if (self.tp - 1) * -(-config.vocab_size // self.tp) >= config.vocab_size:
            raise InputError(
                f"layout: a vocabulary of {config.vocab_size} leaves some of tp={self.tp} ranks without a row",
                f"use tp in {_divisors(config)}",
                field="tp",
            )


def _product(layout: Layout) -> str:
    return " x ".join(f"{name} {getattr(layout, name)}" for name in DIMENSIONS if getattr(layout, name) > 1) or "one rank"


def _divisors(config: ModelConfig) -> str:
    """Degrees of tensor parallelism that this model allows, as a message names them."""
    allowed = []
    for tp in range(1, config.num_heads + 1):
        heads = config.num_heads % tp == 0 and config.intermediate_size % tp == 0
        kv = config.num_kv_heads % tp == 0 or tp % config.num_kv_heads == 0
        if heads and kv and (tp - 1) * -(-config.vocab_size // tp) < config.vocab_size:
            allowed.append(str(tp))
    return "{" + ", ".join(allowed) + "}"
