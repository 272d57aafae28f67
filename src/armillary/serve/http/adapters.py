"""Adapters that come and go while the server runs, in vLLM's words; only from one directory, and only where that was allowed."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

from armillary.core.errors import InputError
from armillary.serve.http.body import read_body
from armillary.serve.http.endpoints import documented, ignored
from armillary.serve.http.errors import APIError
from armillary.serve.http.schemas.adapters import LoadAdapterBody, UnloadAdapterBody
from armillary.serve.service import Service


def router(service: Service, max_body_bytes: int, directory: Path | None) -> APIRouter:
    """`directory`: where the folders lie that may be loaded; without it both paths refuse."""
    routes = APIRouter()

    @routes.post("/v1/load_lora_adapter", openapi_extra=documented(LoadAdapterBody))
    async def load(request: Request) -> PlainTextResponse:
        allowed = _allowed(directory)
        body = await read_body(request, LoadAdapterBody, max_body_bytes)
        path = inside(allowed, body.lora_path)
        if body.lora_name in service.adapters and not body.load_inplace:
            raise InputError(
                f"adapter {body.lora_name[:200]!r} is loaded already",
                "send load_inplace: true to replace it, or unload it first",
                field="lora_name",
            )
        await asyncio.to_thread(service.load_adapter, body.lora_name, path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.", headers=ignored(body))

    @routes.post("/v1/unload_lora_adapter", openapi_extra=documented(UnloadAdapterBody))
    async def unload(request: Request) -> PlainTextResponse:
        _allowed(directory)
        body = await read_body(request, UnloadAdapterBody, max_body_bytes)
        service.unload_adapter(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", headers=ignored(body))

    return routes


def inside(directory: Path, path: str) -> Path:
    """`path` below `directory`, links followed; a relative one starts there. Raises InputError, which tells nothing of what is elsewhere."""
    root = directory.resolve()
    try:
        found = (root / path).resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL, a loop of links
        found = root.parent
    if not found.is_relative_to(root) or found == root:
        raise InputError(
            f"lora_path {path[:200]!r} is not below the directory that adapters are loaded from",
            "give a folder's path within it",
            field="lora_path",
        )
    return found


def _allowed(directory: Path | None) -> Path:
    if directory is None:
        raise APIError(
            403,
            "this server loads no adapters over HTTP: serve with --allow-lora-loading DIRECTORY",
            type="permission_error",
            code="lora_loading_not_allowed",
        )
    return directory
