"""What a fleet may be told: how many replicas, who chooses among them, and what is done about slow ones."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from armillary.core.config import Bytes, Config
from armillary.core.errors import InputError
from armillary.serve.config import EngineConfig
from armillary.serve.policies import routing


class FleetConfig(Config):
    """How many engines there are, and how requests are given to them. Threads and KV memory are divided among them."""

    replicas: int = Field(1, ge=1, le=256)
    """Engines, each a process with its own KV pool; 1 is the server's own process."""
    prefill_workers: int = Field(0, ge=0, le=256)
    """Processes that compute prompts only (disaggregation); needs decode_workers."""
    decode_workers: int = Field(0, ge=0, le=256)
    """Processes that generate only, from keys and values that prefill workers computed."""
    router: str = routing.DEFAULT
    """Which replica gets a request: cache-aware, power-of-two, shortest-queue, round-robin or consistent-hash."""
    tail: Literal["none", "hedged", "tied"] = Field(
        "none", description="a second copy of a request: when it is late (hedged), or at once in two queues, of which one runs (tied)"
    )
    hedge_budget: float = Field(0.05, ge=0.0, le=1.0)
    """Share of prompt tokens that hedging may compute twice."""
    silence: float = Field(3.0, ge=0.05, le=3600.0)
    """Seconds without a sign of life after which a replica's requests are given to others."""
    transfer_memory: Bytes = 1_000_000_000
    """Memory of each prefill worker for prompts that no decode worker has fetched yet."""
    transfer: Literal["memory", "network"] = Field(
        "memory", description="how keys and values get to decode workers: this machine's shared memory, or torch.distributed (gloo)"
    )
    ray: bool = False
    """Replicas are Ray actors instead of processes of this machine."""

    @field_validator("router")
    @classmethod
    def _known_router(cls, name: str) -> str:
        routing.get(name)
        return name

    @model_validator(mode="after")
    def _whole(self) -> FleetConfig:
        if bool(self.prefill_workers) != bool(self.decode_workers):
            missing = "decode_workers" if self.prefill_workers else "prefill_workers"
            raise InputError(
                f"prefill_workers is {self.prefill_workers} and decode_workers {self.decode_workers}: the one kind answers nothing without the other",
                f"give {missing} too, at least 1",
                field=missing,
            )
        if self.prefill_workers and self.replicas > 1:
            raise InputError(
                f"{self.replicas} replicas and {self.prefill_workers} + {self.decode_workers} prefill and decode workers are both asked for",
                "give replicas, or prefill_workers and decode_workers",
                field="replicas",
            )
        if self.prefill_workers and self.ray and self.transfer == "memory":
            raise InputError(
                "keys and values go through this machine's memory, and Ray may place workers on others",
                "give --transfer network, or leave ray out",
                field="transfer",
            )
        if self.tail != "none" and self.alone:
            raise InputError(f"tail is {self.tail!r} with one replica: there is no second", "give --replicas 2 or more", field="tail")
        return self

    @model_validator(mode="after")
    def _all_is_heeded(self) -> FleetConfig:
        """A number that nothing looks at would be believed to have been heeded."""
        unheeded = {
            "router": (self.alone, "with one replica", "leave it out, or give --replicas 2 or more"),
            "silence": (self.alone, "with one replica", "leave it out, or give --replicas 2 or more"),
            "hedge_budget": (self.tail != "hedged", f"with tail {self.tail}", "leave it out, or give --tail hedged"),
            "transfer": (not self.prefill_workers, "without prefill workers", "leave it out, or give --prefill-workers and --decode-workers"),
            "transfer_memory": (
                not self.prefill_workers, "without prefill workers", "leave it out, or give --prefill-workers and --decode-workers",
            ),
        }  # fmt: skip
        for name, (idle, where, fix) in unheeded.items():
            given = getattr(self, name)
            if idle and given != FleetConfig.model_fields[name].default:
                raise InputError(f"{name} {given} says nothing {where}", fix, field=name)
        return self

    @property
    def alone(self) -> bool:
        """Whether the server's own process computes: no fleet at all."""
        return self.replicas == 1 and not self.prefill_workers and not self.ray

    @property
    def roles(self) -> list[Role]:
        """What each replica does, by its index."""
        prefill: list[Role] = ["prefill"] * self.prefill_workers
        decode: list[Role] = ["decode"] * self.decode_workers
        both: list[Role] = ["both"] * self.replicas
        return prefill + decode if prefill else both


Role = Literal["both", "prefill", "decode"]


def go_together(engine: EngineConfig, fleet: FleetConfig) -> None:
    """Raises InputError for what one engine can do and several cannot do together."""
    if fleet.prefill_workers and engine.kv_policy != "dense":
        raise InputError(
            f"kv_policy {engine.kv_policy} keeps or marks parts of a sequence, and prefill workers hand over plain keys and values",
            "leave kv_policy out, or serve replicas",
            field="kv_policy",
        )
