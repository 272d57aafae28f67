"""What a configuration file may say to `serve`, `chat` and `demo`: the model, the server, the engine."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from armillary.core.config import Bytes, Config
from armillary.core.errors import InputError
from armillary.serve.config import EngineConfig
from armillary.serve.fleet.config import FleetConfig


class ServerConfig(Config):
    """Where the HTTP server listens and who may use it."""

    host: str = Field("127.0.0.1", min_length=1, max_length=253)
    """Address to listen on."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    api_key: str | tuple[str, ...] | None = None
    """Key that clients must send as a bearer token; several when there are several clients."""
    keys: Path | None = None
    """A TOML file of keys by name, each with its limits: `[alice]`, `key`, `requests_per_minute`, `tokens_per_minute`."""
    allow_public: bool = False
    """Listen on other addresses than this machine's own without a key."""
    drain_seconds: float = Field(30.0, ge=0, le=86_400)
    """How long SIGTERM lets the answers in flight go on, while new requests are refused."""
    shed_after: float | None = Field(None, gt=0, le=86_400)
    """Seconds that a request may be expected to wait; more is refused (429). None takes any."""
    max_queued_kv: float = Field(64.0, gt=0, le=1e9)
    """What the waiting requests may need of the KV cache, in pools; more is refused (429)."""
    access_log: str | None = Field(None, min_length=1, max_length=4096)
    """A file that gets one JSON line an HTTP request, or - for stdout."""
    allow_debug: bool = False
    """Answer /debug/trace."""
    allow_lora_loading: Path | None = None
    """A directory whose peft folders clients may load and unload while the server runs."""
    otel: str | None = Field(None, min_length=1, max_length=2048)
    """Where to send OpenTelemetry spans (OTLP over HTTP), such as http://localhost:4318/v1/traces."""
    files: Path | None = None
    """Folder that keeps uploaded files and batches over a restart; none keeps them in memory."""
    files_limit: Bytes = Field(64 << 20, ge=1)
    """Bytes of all uploaded files and results of batches."""
    simulations: int = Field(2, ge=0, le=64)
    """Simulations that may run at a time for the page, each a process; 0 switches them off."""
    explain: bool = False
    """Tell on stderr of every request that ends why it took as long as it did."""

    @property
    def key_list(self) -> tuple[str, ...]:
        """The keys of `api_key`."""
        return (self.api_key,) if isinstance(self.api_key, str) else self.api_key or ()

    @property
    def guarded(self) -> bool:
        """Whether clients need a key."""
        return bool(self.key_list) or self.keys is not None

    @field_validator("allow_lora_loading")
    @classmethod
    def _is_a_directory(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_dir():
            raise InputError(f"{path} is no directory", "give the one that adapters may be loaded from", field="server.allow_lora_loading")
        return path

    @field_validator("api_key")
    @classmethod
    def _bounded(cls, keys: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for key in (keys,) if isinstance(keys, str) else keys or ():
            if not 1 <= len(key) <= 512:
                raise InputError(f"an API key has {len(key)} characters", "give 1 to 512", field="server.api_key")
        return keys


class RunConfig(Config):
    """Everything that the serving verbs may be told."""

    model: str = "smollm2"
    """A name, a .gguf file or a model folder."""
    server: ServerConfig = ServerConfig.model_validate({})
    engine: EngineConfig = EngineConfig.model_validate({})
    fleet: FleetConfig = FleetConfig.model_validate({})
    """Replicas, which only `serve` has."""
