"""`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`: vLLM's fields."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from armillary.serve.http.body import Body


class LoadAdapterBody(Body):
    lora_name: str = Field(min_length=1, max_length=200)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {"base_model_name": (), "is_3d_lora_weight": (False,)}


class UnloadAdapterBody(Body):
    lora_name: str = Field(min_length=1, max_length=200)
    IGNORED: ClassVar[frozenset[str]] = frozenset({"lora_int_id"})
