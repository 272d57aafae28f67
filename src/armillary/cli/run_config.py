"""What a configuration file may say to `serve`, `chat` and `demo`: the model, the server, the engine."""

from __future__ import annotations

from pydantic import Field

from armillary.core.config import Config
from armillary.serve.config import EngineConfig


class ServerConfig(Config):
    """Where the HTTP server listens and who may use it."""

    host: str = Field("127.0.0.1", min_length=1, max_length=253)
    """Address to listen on."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = Field(None, min_length=1, max_length=512)
    """Key that clients must send as a bearer token."""
    allow_public: bool = False
    """Listen on other addresses than this machine's own without a key."""


class RunConfig(Config):
    """Everything that the serving verbs may be told."""

    model: str = "smollm2"
    """A name, a .gguf file or a model folder."""
    server: ServerConfig = ServerConfig.model_validate({})
    engine: EngineConfig = EngineConfig.model_validate({})
