"""Uploaded files and the results of batches: in a folder or in memory, within one bound."""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from armillary.core.errors import InputError, NotFoundError
from armillary.serve.http.errors import APIError

Json = dict[str, Any]

DEFAULT_LIMIT = 64 * 1024 * 1024
MAX_FILES = 10_000


class Room:
    """Bytes that are kept free for a file on its way; they are given back when the block of `FileStore.room` is left."""

    def __init__(self, store: FileStore, what: str) -> None:
        self._store, self._what = store, what
        self.size = 0

    def grow(self, size: int) -> None:
        """To `size` bytes in all, where it has fewer. Raises APIError 413 `files_full` when there is no room for them."""
        if size > self.size:
            self._store._reserve(size - self.size, self._what, size)
            self.size = size


class FileStore:
    """Any thread may call. `folder` keeps files over a restart; without one they are gone with the process.

    `limit` bytes for all files together, results and what is on its way included. Records of batches are kept beside them. `owner` is the
    name of a key ("" for none): what one owner has made is for every other not there.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT, folder: Path | None = None) -> None:
        self.limit = limit
        self._folder = folder
        self._lock = threading.Lock()  # of the books; nothing is read, written or encoded under it
        self._files: dict[str, Json] = {}  # oldest first
        self._contents: dict[str, bytes] = {}  # without a folder
        self._records: dict[str, Json] = {}
        self._owners: dict[str, str] = {}
        self._claimed: TextIO | None = None  # open as long as the folder is this process's
        self._used = self._reserved = 0  # bytes
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                found = [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))]
                found.sort(key=lambda one: one["created_at"])
                for one in found:
                    self._owners[one["id"]] = one.pop("owner", "")
                    (self._files if one["object"] == "file" else self._records)[one["id"]] = one
                self._used = sum(one["bytes"] for one in self._files.values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # not there, or not ours
                raise InputError(
                    f"the folder of files {folder} cannot be used ({error})", "choose another --files", field="files"
                ) from error

    def claim(self) -> None:
        """Keep other processes from the folder while this one lives: each would miss what another adds, and end its batches.

        Raises InputError when another has claimed it.
        """
        if self._folder is None:
            return
        self._claimed = (self._folder / ".lock").open("a")
        try:
            fcntl.flock(self._claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"the folder of files {self._folder} is another server's", "give each its own --files, or stop that one", field="files"
            ) from error

    @property
    def used(self) -> int:
        """Bytes of all files."""
        return self._used

    @contextlib.contextmanager
    def room(self, what: str) -> Iterator[Room]:
        """Room for a file whose bytes are still coming, so that none of them is taken in vain. `what` names it in errors."""
        room = Room(self, what)
        try:
            room.grow(1)
            yield room
        finally:
            with self._lock:
                self._reserved -= room.size

    def put(self, filename: str, purpose: str, content: Iterable[bytes], owner: str = "", room: Room | None = None) -> Json:
        """Keep a file whose content comes in pieces, each written before the next is asked for. `room`: what it has already.

        Raises APIError 413 when there is no room for it; nothing of it is left then.
        """
        if room is None:
            with self.room(repr(filename[:100])) as room:
                return self.put(filename, purpose, content, owner, room)
        name = f"file-{secrets.token_hex(12)}"
        size = 0

        def counted() -> Iterator[bytes]:
            nonlocal size
            for piece in content:
                size += len(piece)
                room.grow(size)
                yield piece

        kept = b""
        if self._folder is None:
            kept = b"".join(counted())
        else:
            _write(self._folder / f"{name}.data", counted())
        described = {
            "id": name,
            "object": "file",
            "bytes": size,
            "created_at": int(time.time()),
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        if self._folder is not None:
            try:
                self._describe(described, owner)
            except OSError:
                (self._folder / f"{name}.data").unlink(missing_ok=True)
                raise
        with self._lock:
            if self._folder is None:
                self._contents[name] = kept
            self._used, self._reserved, room.size = self._used + size, self._reserved - room.size, 0
            self._owners[name] = owner
            self._files[name] = described
        return described

    def get(self, name: str, owner: str = "", field: str = "file_id") -> Json:
        found = self._files.get(name)
        if found is None or self._owners.get(name) != owner:
            raise NotFoundError(f"there is no file {name[:128]!r}", "GET /v1/files lists them", field=field)
        return found

    def content(self, name: str, owner: str = "", field: str = "file_id") -> bytes:
        self.get(name, owner, field)
        try:
            return self._contents[name] if self._folder is None else (self._folder / f"{name}.data").read_bytes()
        except (OSError, KeyError) as error:  # deleted in this moment, or by somebody else
            raise NotFoundError(f"the content of file {name!r} is gone", "upload it again", field=field) from error

    def delete(self, name: str, owner: str = "") -> None:
        with self._lock:
            self._used -= self.get(name, owner)["bytes"]
            del self._files[name], self._owners[name]
            self._contents.pop(name, None)
        if self._folder is not None:
            (self._folder / f"{name}.json").unlink(missing_ok=True)
            (self._folder / f"{name}.data").unlink(missing_ok=True)

    def files(self, owner: str = "") -> list[Json]:
        """The latest first."""
        with self._lock:
            return [one for one in reversed(self._files.values()) if self._owners[one["id"]] == owner]

    # Records: batches

    def keep(self, record: Json, owner: str | None = None) -> None:
        """A new one of `owner`, or one that has changed. Records are kept, changed and dropped by one thread."""
        with self._lock:
            owner = self._owners.setdefault(record["id"], owner or "")
            self._records[record["id"]] = record
        if self._folder is not None:
            self._describe(record, owner)

    def drop(self, name: str) -> None:
        with self._lock:
            del self._records[name], self._owners[name]
        if self._folder is not None:
            (self._folder / f"{name}.json").unlink(missing_ok=True)

    def record(self, name: str, owner: str = "") -> Json:
        found = self._records.get(name)
        if found is None or self._owners.get(name) != owner:
            raise NotFoundError(f"there is no batch {name[:128]!r}", "GET /v1/batches lists them", field="batch_id")
        return found

    def records(self, owner: str | None = None) -> list[Json]:
        """The latest first; None for those of all owners."""
        with self._lock:
            return [one for one in reversed(self._records.values()) if owner is None or self._owners[one["id"]] == owner]

    def _reserve(self, more: int, what: str, size: int) -> None:
        with self._lock:
            if self._used + self._reserved + more > self.limit or len(self._files) >= MAX_FILES:
                raise APIError(
                    413,
                    f"{what} has {size:,} bytes or more; {len(self._files):,} files, of at most {MAX_FILES:,}, hold {self._used:,} of "
                    f"{self.limit:,} bytes, and {self._reserved:,} are kept for files on their way: "
                    "delete some (DELETE /v1/files/ID), or serve with a larger --files-limit",
                    code="files_full",
                    headers={"connection": "close"},
                )
            self._reserved += more

    def _describe(self, what: Json, owner: str) -> None:
        assert self._folder is not None
        _write(self._folder / f"{what['id']}.json", [json.dumps({**what, **({"owner": owner} if owner else {})}).encode()])


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    """Whole or not at all."""
    part = path.with_suffix(f"{path.suffix}.part")
    try:
        with part.open("wb") as file:
            for piece in pieces:
                file.write(piece)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def page(rows: list[Json], limit: int, after: str | None, known: Callable[[str], object]) -> Json:
    """One page of a list; `known` raises for an `after` that does not exist."""
    begin = 0
    if after is not None:
        known(after)
        begin = next((index + 1 for index, row in enumerate(rows) if row["id"] == after), len(rows))
    shown = rows[begin : begin + limit]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, **ends, "has_more": len(rows) > begin + limit}
