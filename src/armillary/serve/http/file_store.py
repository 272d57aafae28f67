"""Uploaded files and the results of batches: in a folder or in memory, within one bound."""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from armillary.core.errors import InputError, NotFoundError
from armillary.serve.http.errors import APIError

Json = dict[str, Any]

DEFAULT_LIMIT = 64 * 1024 * 1024
MAX_FILES = 10_000


class FileStore:
    """Any thread may call. `folder` keeps files over a restart; without one they are gone with the process.

    `limit` bytes for all files together, results included. Records of batches are kept beside them.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT, folder: Path | None = None) -> None:
        self.limit = limit
        self._folder = folder
        self._lock = threading.Lock()
        self._files: dict[str, Json] = {}  # oldest first
        self._contents: dict[str, bytes] = {}  # without a folder
        self._records: dict[str, Json] = {}
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                found = [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))]
                found.sort(key=lambda one: one["created_at"])
                for one in found:
                    (self._files if one["object"] == "file" else self._records)[one["id"]] = one
            except (OSError, ValueError, KeyError, TypeError) as error:  # not there, or not ours
                raise InputError(
                    f"the folder of files {folder} cannot be used ({error})", "choose another --files", field="files"
                ) from error

    @property
    def used(self) -> int:
        """Bytes of all files."""
        return sum(one["bytes"] for one in self._files.values())

    def put(self, filename: str, purpose: str, content: bytes) -> Json:
        """Raises APIError 413 when there is no room for it."""
        with self._lock:
            if self.used + len(content) > self.limit or len(self._files) >= MAX_FILES:
                raise APIError(
                    413,
                    f"{filename[:100]!r} has {len(content):,} bytes; {len(self._files):,} files hold {self.used:,} of {self.limit:,}: "
                    "delete some (DELETE /v1/files/ID), or serve with a larger --files-limit",
                    code="files_full",
                )
            name = f"file-{secrets.token_hex(12)}"
            described = {
                "id": name,
                "object": "file",
                "bytes": len(content),
                "created_at": int(time.time()),
                "filename": filename,
                "purpose": purpose,
                "status": "processed",
            }
            if self._folder is None:
                self._contents[name] = content
            else:
                _write(self._folder / f"{name}.data", content)
                self._describe(described)
            self._files[name] = described
            return described

    def get(self, name: str, field: str = "file_id") -> Json:
        found = self._files.get(name)
        if found is None:
            raise NotFoundError(f"there is no file {name[:128]!r}", "GET /v1/files lists them", field=field)
        return found

    def content(self, name: str, field: str = "file_id") -> bytes:
        self.get(name, field)
        if self._folder is None:
            return self._contents[name]
        try:
            return (self._folder / f"{name}.data").read_bytes()
        except OSError as error:
            raise NotFoundError(f"the content of file {name!r} is gone ({error.strerror})", "upload it again", field=field) from error

    def delete(self, name: str) -> None:
        with self._lock:
            self.get(name)
            del self._files[name]
            self._contents.pop(name, None)
            if self._folder is not None:
                (self._folder / f"{name}.json").unlink(missing_ok=True)
                (self._folder / f"{name}.data").unlink(missing_ok=True)

    def files(self) -> list[Json]:
        """The latest first."""
        return list(reversed(self._files.values()))

    # Records: batches

    def keep(self, record: Json) -> None:
        with self._lock:
            self._records[record["id"]] = record
            if self._folder is not None:
                self._describe(record)

    def drop(self, name: str) -> None:
        with self._lock:
            del self._records[name]
            if self._folder is not None:
                (self._folder / f"{name}.json").unlink(missing_ok=True)

    def record(self, name: str) -> Json:
        found = self._records.get(name)
        if found is None:
            raise NotFoundError(f"there is no batch {name[:128]!r}", "GET /v1/batches lists them", field="batch_id")
        return found

    def records(self) -> list[Json]:
        """The latest first."""
        return list(reversed(self._records.values()))

    def _describe(self, what: Json) -> None:
        assert self._folder is not None
        _write(self._folder / f"{what['id']}.json", json.dumps(what).encode())


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)


def page(rows: list[Json], limit: int, after: str | None, known: Callable[[str], object]) -> Json:
    """One page of a list; `known` raises for an `after` that does not exist."""
    begin = 0
    if after is not None:
        known(after)
        begin = next((index + 1 for index, row in enumerate(rows) if row["id"] == after), len(rows))
    shown = rows[begin : begin + limit]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, **ends, "has_more": len(rows) > begin + limit}
