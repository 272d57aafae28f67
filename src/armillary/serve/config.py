"""What an engine may be told: policy, memory, batch bounds."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from armillary.core.config import Bytes, Config, Duration
from armillary.core.errors import InputError
from armillary.core.units import GB, S, format_duration
from armillary.serve import kv_policies, policies
from armillary.serve.offload.policy import OffloadPolicy
from armillary.serve.tools import formats

DEFAULT_KV_MEMORY: Final = 1 * GB


class EngineConfig(Config):
    """How an engine schedules and how much memory it may use.

    The KV pool is `kv_blocks` blocks, or as many as fit `kv_memory`, or, with neither, as many as fit `DEFAULT_KV_MEMORY`.
    """

    policy: str = policies.DEFAULT
    """Who runs when: sarathi, vllm, orca or request-level."""
    order: Literal["fcfs", "sjf", "deadline", "priority", "prefix"] = Field(
        "fcfs",
        description="who is admitted first: as they came, the shortest, the earliest deadline, the lowest priority number, the longest cached prefix",
    )
    max_wait: Duration | None = Field(60 * S, description="who waits longer goes first, whatever the order")
    victim: Literal["last", "cost"] = Field("last", description="who is preempted: the last admitted, or who costs least to compute again")
    tbt_target: Duration | None = Field(
        None, gt=0, description="bound of the time between tokens, for which sarathi finds its token budget"
    )
    block_size: int = Field(16, ge=1, le=4096)
    """Tokens a KV block."""
    kv_blocks: int | None = Field(None, ge=1, le=1 << 28)
    """KV blocks in the pool."""
    kv_memory: Bytes | None = None
    """Memory of the KV pool, such as "1 GB"."""
    prefix_cache: Literal["on", "off"] = Field("on", description="keep computed prompts and answers for later requests that begin alike")
    max_batch_tokens: int = Field(512, ge=1, le=1 << 20)
    """Most tokens an iteration: the budget of chunked prefill. Small: steady decodes; large: fast prompts."""
    max_running: int = Field(64, ge=1, le=1 << 16)
    """Most sequences in flight."""
    max_queue: int = Field(16384, ge=1, le=1 << 24)
    """Most requests that may wait; more are refused."""
    context: int | None = Field(None, ge=1, le=1 << 30)
    """Most tokens of one sequence, prompt and answer; none leaves it to the model."""
    backend: Literal["auto", "native", "torch"] = Field("auto", description="who computes: the CPU kernels (native), or plain torch")
    quantize: Literal["none", "fp16", "int8", "int4"] = Field("none", description="weights in memory; needs the native backend")
    kv_dtype: Literal["fp32", "fp16", "fp8", "int8"] = Field(
        "fp32", description="keys and values in memory; all but fp32 need the native backend"
    )
    kv_policy: str = "dense"
    """What is kept of keys and values, and read: dense, streaming, h2o, quest, minference or infllm."""
    kv_sinks: int = Field(4, ge=0, le=4096)
    """First tokens that a bounded KV policy always keeps."""
    kv_window: int = Field(1024, ge=1, le=1 << 24)
    """Last tokens that a bounded KV policy always keeps."""
    kv_budget: int = Field(1024, ge=1, le=1 << 24)
    """Tokens that a KV policy chooses to read, or to keep."""
    kv_dense_layers: int = Field(0, ge=0, le=1 << 16)
    """First layers that read everything, with kv_policy "quest"."""
    kv_patterns: str | None = None
    """File of each head's attention pattern, with kv_policy "minference"; none is vertical-slash for all."""
    weight_cache: Literal["on", "off"] = Field("on", description="keep the native backend's laid-out weights on disk for the next start")
    deterministic: bool = False
    """An answer depends on its prompt, parameters and seed alone, never on its company; only the native backend can promise it."""
    async_scheduling: Literal["on", "off"] = Field("off", description="make the next schedule while the current iteration runs")
    speculate: Literal["off", "ngram", "layers", "model"] = Field(
        "off", description="who proposes tokens to be verified together: earlier text, the model without some layers, or draft_model"
    )
    draft_model: str | None = None
    """The model that proposes, as it is named to `serve`; of the same vocabulary."""
    draft_tokens: int = Field(8, ge=1, le=64)
    """Most tokens proposed for a sequence; fewer where more would not pay."""
    draft_layers: float = Field(0.5, gt=0, lt=1)
    """Share of the layers that propose, with speculate "layers"."""
    offload: str | None = None
    """What of the model lies in the accelerator's memory, in RAM and on disk: "auto" or a policy (see `serve.offload.policy`); none keeps all here."""
    offload_memory: Bytes | None = None
    """Bytes of the accelerator's memory; none is what the policy needs."""
    offload_compress: Literal["none", "int4"] = Field(
        "none", description="keep offloaded matrices, keys and values in 4 bits, in groups of 64"
    )
    offload_folder: str | None = None
    """Where the disk tier's files are; none is the cache folder."""
    tool_format: str = "auto"
    """How the model writes tool calls: auto (by its chat template), hermes, tagged-list, granite, llama-json or pythonic."""
    sparsity: str | None = None
    """A file of predictors (`models.neuron_predictor`): single tokens compute only the neurons that it names; none computes all."""
    sparsity_share: float | None = Field(None, gt=0, le=1)
    """Share of a layer's neurons that the predictors name; none is all that are likelier active than not."""
    lora: dict[str, str] = Field({}, description="adapters served beside the model: peft folders by name (flags: NAME=PATH)")
    max_loras: int = Field(16, ge=1, le=4096)
    """Most adapters in memory; the least recently used makes room and is read again when it is asked for."""
    lora_memory: Bytes = 1 * GB
    """Most memory of adapters, such as "512 MiB"."""
    threads: int | None = Field(None, ge=1, le=1024)
    """Threads of the executor; none is one a core."""
    seed: int = Field(0, ge=0, le=(1 << 63) - 1)
    """Seed of the requests that bring none."""

    @field_validator("lora", mode="before")
    @classmethod
    def _named_folders(cls, given: Any) -> Any:
        """`NAME=PATH`, as flags have it, or a table."""
        if isinstance(given, str):
            given = [given]
        if not isinstance(given, list | tuple):
            return given
        folders: dict[str, str] = {}
        for one in given:
            name, sign, path = str(one).partition("=")
            if not (name and sign and path):
                raise InputError(f"lora is {str(one)[:200]!r}", "write NAME=PATH, such as sql=adapters/sql", field="lora")
            if name in folders:
                raise InputError(f"lora names {name[:200]!r} twice", "give each adapter its own name", field="lora")
            folders[name] = path
        return folders

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, name: str) -> str:
        policies.get(name)
        return name

    @field_validator("tool_format")
    @classmethod
    def _known_tool_format(cls, name: str) -> str:
        if name != "auto":
            formats.get(name)
        return name

    @model_validator(mode="after")
    def _composed(self) -> EngineConfig:
        policies.get(self.policy, *self.composition)
        return self

    @property
    def scheduling(self) -> str:
        """The policy and what was composed with it, in words."""
        parts = [self.policy]
        parts += [f"order {self.order}"] if self.order != "fcfs" else []
        parts += [f"victim by {self.victim}"] if self.victim != "last" else []
        parts += [f"{format_duration(self.tbt_target)} between tokens"] if self.tbt_target is not None else []
        return ", ".join(parts)

    @property
    def composition(self) -> tuple[str, str, int | None, int | None]:
        """What `policies.get` takes beside the policy's name."""
        return self.order, self.victim, self.max_wait, self.tbt_target

    @model_validator(mode="after")
    def _one_pool_size(self) -> EngineConfig:
        if self.kv_blocks is not None and self.kv_memory is not None:
            raise InputError("kv_blocks and kv_memory both set the size of the KV pool", "give one of them", field="kv_blocks")
        return self

    @model_validator(mode="after")
    def _torch_can(self) -> EngineConfig:
        if self.backend == "torch" and (wanted := self.native_only):
            raise InputError(
                f"{wanted[0]} needs the native backend, but the torch backend was asked for",
                f"leave {wanted[0]} out, or the backend",
                field=wanted[0],
            )
        return self

    @field_validator("kv_policy")
    @classmethod
    def _known_kv_policy(cls, name: str) -> str:
        if name not in kv_policies.names():
            raise InputError(f"kv_policy {name!r} is unknown", f"choose one of {', '.join(kv_policies.names())}", field="kv_policy")
        return name

    @property
    def kv(self) -> kv_policies.KVPolicy:
        """What is kept of keys and values, and read."""
        options = kv_policies.Options(
            self.block_size, self.max_batch_tokens, self.kv_sinks, self.kv_window, self.kv_budget, self.kv_dense_layers, self.kv_patterns
        )
        return kv_policies.build(self.kv_policy, options)

    @model_validator(mode="after")
    def _kv_policy_composes(self) -> EngineConfig:
        kv, name = self.kv, f"kv_policy {self.kv_policy}"
        if self.kv_patterns is not None and self.kv_policy != "minference":
            raise InputError(f"{name} has no use for kv_patterns", "leave it out, or choose minference", field="kv_patterns")
        if self.backend != "auto" and self.backend not in kv.backends:
            raise InputError(
                f"{name} has no kernels in the {self.backend} backend", f"serve with --backend {kv.backends[0]}", field="kv_policy"
            )
        if "native" not in kv.backends and (wanted := self.native_only):
            raise InputError(
                f"{wanted[0]} needs the native backend, and {name} has kernels in the torch backend only",
                f"leave {wanted[0]} out, or choose another kv_policy",
                field=wanted[0],
            )
        if self.speculate != "off" and not kv.takes_drafts:
            raise InputError(
                f"{name} cannot take back what a refused draft has left in it", "serve with --speculate off", field="speculate"
            )
        if self.prefix_cache == "on" and kv.unshareable is not None:
            raise InputError(
                f"{name} {kv.unshareable}",
                "serve with --prefix-cache off",
                field="prefix_cache",
            )
        if kv.positional:
            return self
        if self.policy in ("orca", "request-level"):
            raise InputError(
                f"policy {self.policy} computes a prompt in one iteration, and {name} holds no more than max_batch_tokens of it beside what it keeps",
                "serve with --policy sarathi or vllm",
                field="policy",
            )
        if self.speculate in ("layers", "model"):
            raise InputError(
                f"speculate {self.speculate} fills a cache of its own by the same block tables, whose middle {name} takes away",
                "serve with --speculate ngram or off",
                field="speculate",
            )
        return self

    @model_validator(mode="after")
    def _all_is_heeded(self) -> EngineConfig:
        """A number that nothing looks at would be believed to have been heeded."""
        kept_by = {
            "kv_sinks": ("streaming", "minference", "infllm"),
            "kv_window": ("streaming", "h2o", "minference", "infllm"),
            "kv_budget": ("h2o", "quest", "minference", "infllm"),
            "kv_dense_layers": ("quest",),
        }
        heeded = {name: ("kv_policy", self.kv_policy, policies) for name, policies in kept_by.items()}
        heeded["draft_tokens"] = ("speculate", self.speculate, ("ngram", "layers", "model"))
        heeded["draft_layers"] = ("speculate", self.speculate, ("layers",))
        for name, (option, chosen, choices) in heeded.items():
            given = getattr(self, name)
            if chosen not in choices and given != EngineConfig.model_fields[name].default:
                raise InputError(
                    f"{name} {given} says nothing with {option} {chosen}",
                    f"leave it out, or choose {option} {' or '.join(choices)}",
                    field=name,
                )
        return self

    @model_validator(mode="after")
    def _draft_model_is_asked_for(self) -> EngineConfig:
        if (self.speculate == "model") != (self.draft_model is not None):
            raise InputError('speculate "model" and draft_model go together', "give both of them, or neither", field="draft_model")
        return self

    @model_validator(mode="after")
    def _offload_can(self) -> EngineConfig:
        if self.offload is None:
            if self.offload_compress != "none":
                raise InputError("offload_compress says nothing without offload", "give offload, such as auto", field="offload")
            if self.offload_memory is not None or self.offload_folder is not None:
                raise InputError(
                    "offload_memory and offload_folder say nothing without offload", "give offload, such as auto", field="offload"
                )
            return self
        if self.offload == "auto":
            if self.offload_memory is None:
                raise InputError("offload is auto, of an unknown size", "give offload_memory, such as 2GB", field="offload_memory")
        else:
            OffloadPolicy.parse(self.offload)
        if self.kv_policy != "dense":
            raise InputError(
                f"offload moves whole sequences, and kv_policy {self.kv_policy} keeps or reads parts of them",
                "serve with --kv-policy dense",
                field="kv_policy",
            )
        if self.speculate == "layers":
            raise InputError(
                "speculate layers would load the weights of every drafted token", "use ngram, or a draft_model", field="speculate"
            )
        if self.backend == "native" or self.native_only:
            what = "backend native" if self.backend == "native" else self.native_only[0]
            raise InputError(
                f"offload streams fp32 weights through torch; {what} needs the native kernels", f"leave {what} out", field="offload"
            )
        return self

    @model_validator(mode="after")
    def _sparsity_can(self) -> EngineConfig:
        if self.sparsity is None:
            if self.sparsity_share is not None:
                raise InputError("sparsity_share says nothing without sparsity", "give the file of predictors", field="sparsity")
            return self
        without = {
            "backend": self.backend == "native", "offload": self.offload is not None, "kv_policy": self.kv_policy != "dense",
            "speculate": self.speculate in ("layers", "model"), "lora": bool(self.lora),
        }  # fmt: skip
        if wanted := [name for name, asked in without.items() if asked] + self.native_only:
            raise InputError(
                f"sparsity computes with torch and its own rows of fp32 weights, and {wanted[0]} is not for it",
                f"leave {wanted[0]} out",
                field=wanted[0],
            )
        return self

    @property
    def native_only(self) -> list[str]:
        """The fields that ask for what only the native backend has.

        Torch's products choose their blocking by the batch's size, so a sequence's last bits depend on its company.
        """
        asked = {"quantize": self.quantize != "none", "kv_dtype": self.kv_dtype != "fp32", "deterministic": self.deterministic}
        return [name for name, wanted in asked.items() if wanted]

    def with_pool(self, bytes_per_token: int) -> EngineConfig:
        """The same configuration with `kv_blocks` settled, for a model whose cache takes `bytes_per_token` bytes a token.

        Raises InputError when the memory does not hold one block.
        """
        if self.kv_blocks is not None:
            return self
        memory = self.kv_memory if self.kv_memory is not None else DEFAULT_KV_MEMORY
        block = bytes_per_token * self.block_size
        if memory < block:
            raise InputError(
                f"kv_memory of {memory:,} bytes does not hold one KV block of {self.block_size} tokens ({block:,} bytes)",
                "give more memory or a smaller block_size",
                field="kv_memory",
            )
        return self.model_copy(update={"kv_blocks": memory // block, "kv_memory": None})
