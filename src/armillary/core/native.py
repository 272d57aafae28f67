"""C++ built at first use and kept: a plain C ABI, called through ctypes. Without a compiler there is a warning, once, and None.

The flags are the fastest that keep IEEE semantics. `-ffast-math` is refused: g++ then links crtfastmath.o, and merely loading
such a library makes the thread flush denormals to zero, in torch's kernels too.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from armillary.core.cpu import cpu_info
from armillary.core.errors import ArmillaryError, InputError, MissingDependencyError, NotFoundError
from armillary.core.paths import cache_dir

_X86: Final = platform.machine().lower() in ("x86_64", "amd64")
FLAGS: Final[tuple[str, ...]] = (
    "-O3",
    "-march=native",
    *(("-mprefer-vector-width=512",) if _X86 else ()),
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
COMPILE_SECONDS: Final = 600
_ALWAYS: Final = ("-std=c++20", "-fPIC", "-fvisibility=default")
_REFUSED: Final = frozenset({"-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-ffinite-math-only"})
_LAYOUT: Final = "1"  # part of every key: raise it when what a cached file means changes

_loaded: dict[Path, ctypes.CDLL | None] = {}
_warned: set[str] = set()
_lock = threading.Lock()


class NativeBuildError(ArmillaryError):
    """The compiler refused a source, or the library cannot be kept or loaded."""


def enabled() -> bool:
    """False when `ARMILLARY_NATIVE` is 0: everything then runs on the pure-torch path."""
    return os.environ.get("ARMILLARY_NATIVE", "1").strip().lower() not in ("0", "off", "false", "no")


def find_compiler() -> tuple[str, ...]:
    """The C++ compiler's command: `CXX` (which may carry arguments), else g++, else clang++. Raises MissingDependencyError."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["clang++"]]:
        found = shutil.which(command[0])
        if found:
            return (found, *command[1:])
    problem = f"the C++ compiler CXX={shlex.join(named)} is not there" if named else "no C++ compiler is there"
    raise MissingDependencyError(problem, "run `apt install g++`" + (", or unset CXX" if named else ""))


def load(name: str, source_paths: Sequence[str | Path], flags: Sequence[str] = FLAGS, *, openmp: bool = False) -> ctypes.CDLL | None:
    """Build (or find built) and load a library. None, after one visible warning, when that cannot be done; None when `enabled()` is False.

    With `openmp`, torch is imported first: the library then shares torch's libgomp and its threads. The other way round,
    two OpenMP runtimes would fight over the cores.
    """
    if not enabled():
        return None
    try:
        path = build(name, source_paths, flags, openmp=openmp)
        with _lock:
            if path not in _loaded:
                if openmp:
                    import torch  # noqa: F401
                _loaded[path] = ctypes.CDLL(str(path))
            return _loaded[path]
    except (MissingDependencyError, NativeBuildError, OSError) as error:
        # A missing compiler concerns every library and is told once; a source that fails is told once by itself.
        what = "compiler" if isinstance(error, MissingDependencyError) else name
        with _lock:
            first = what not in _warned
            _warned.add(what)
        if first:
            warnings.warn(f"native kernels are off, torch's are used and are slower ({name}): {error}", RuntimeWarning, stacklevel=2)
        return None


def build(name: str, sources: Sequence[str | Path], flags: Sequence[str] = FLAGS, *, openmp: bool = False) -> Path:
    """The shared library of `sources`, compiled unless it is already kept.

    Kept under `cache_dir()/native` by a hash of the sources, the headers beside them, the flags, the compiler's version and
    the CPU's flags; a file that does not match its recorded digest is built anew. Any number of processes may ask at once:
    one builds, the others wait. Raises MissingDependencyError, NativeBuildError, NotFoundError (a source), InputError (a flag).
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,80}", name):
        raise InputError(f"library name {name[:80]!r} is not a file name", "use letters, digits, - and _")
    refused = _REFUSED.intersection(flags)
    if refused:
        raise InputError(f"flag {min(refused)} makes the whole process flush denormals or ignore NaN", "use core.native.FLAGS")
    compiler = find_compiler()
    arguments = (*_ALWAYS, *flags, *(("-fopenmp",) if openmp else ()))
    paths = [Path(source) for source in sources]
    folder = _folder()
    library = folder / f"{name}-{_key(name, paths, arguments, compiler)}.so"
    if _intact(library):
        return library
    with _exclusive(library.with_suffix(".lock")):
        if not _intact(library):  # another process may have built it while this one waited
            _compile(compiler, arguments, paths, library)
    return library


def _compile(compiler: tuple[str, ...], arguments: tuple[str, ...], sources: list[Path], library: Path) -> None:
    """Each source by a compiler of its own, as many at a time as there are cores; then one linker."""
    try:
        with TemporaryDirectory(prefix=f"{library.stem}-", suffix=".partial", dir=library.parent) as scratch:
            objects = [Path(scratch) / f"{place}-{source.stem}.o" for place, source in enumerate(sources)]

            def one(source: Path, to: Path) -> None:
                _run([*compiler, *arguments, "-c", str(source), "-o", str(to)], source.name)

            with ThreadPoolExecutor(os.cpu_count() or 1) as compilers:
                list(compilers.map(one, sources, objects))  # raises what the first that failed raised
            linked = Path(scratch) / library.name
            _run([*compiler, *arguments, "-shared", *map(str, objects), "-o", str(linked)], ", ".join(source.name for source in sources))
            digest = hashlib.sha256(linked.read_bytes()).hexdigest()
            linked.replace(library)
            _digest_file(library).write_text(digest, encoding="ascii")
    except OSError as error:
        raise NativeBuildError(
            f"cannot build {library.name} ({error})", "free space, or set ARMILLARY_HOME to a writable folder"
        ) from error


def _run(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise NativeBuildError(f"{command[0]} took over {COMPILE_SECONDS} s", shlex.join(command)) from error
    if done.returncode != 0:
        said = (
            "\n".join(line for line in done.stderr.splitlines() if "error" in line.lower() and "collect2" not in line)
            or done.stderr
            or "nothing was said"
        )
        raise NativeBuildError(f"{command[0]} failed on {what}: {said[:2000]}", shlex.join(command))


def _key(name: str, sources: list[Path], arguments: tuple[str, ...], compiler: tuple[str, ...]) -> str:
    """Everything that the library depends on, in 20 hex digits."""
    headers = sorted({header for source in sources for header in source.parent.glob("*.h*")})
    model, cpu_flags = cpu_info()
    parts = [_LAYOUT, name, platform.machine(), model, *sorted(cpu_flags), "", *arguments, "", *compiler, _version(compiler)]
    digest = hashlib.sha256("\0".join(parts).encode(errors="surrogateescape"))
    for path in [*sources, *headers]:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise NotFoundError(f"cannot read the C++ source {path} ({error.strerror})", "check the path or reinstall armillary") from error
        digest.update(f"\0{path.name}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    return digest.hexdigest()[:20]


@lru_cache(maxsize=8)
def _version(compiler: tuple[str, ...]) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, errors="replace", timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeBuildError(f"{compiler[0]} does not run ({error})", "run `apt install --reinstall g++`") from error
    return done.stdout.partition("\n")[0]


def compiler_version() -> str:
    """The compiler's first line about itself, such as `g++ (Debian 12.2.0-14) 12.2.0`. Raises MissingDependencyError, NativeBuildError."""
    return _version(find_compiler())


def _folder() -> Path:
    """Where libraries are kept: code is loaded from it, so nobody else may write there."""
    folder = cache_dir() / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        raise NativeBuildError(f"cannot make {folder} ({error.strerror})", "set ARMILLARY_HOME to a writable folder") from error
    if os.name == "posix" and (status.st_mode & 0o022 or status.st_uid not in (os.getuid(), 0)):
        raise NativeBuildError(f"others may write to {folder}, from which code is loaded", f"run `chmod 700 {folder}`, and own it")
    return folder


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _intact(library: Path) -> bool:
    """Whether the kept library is the one that was built: loading half a file would kill the process (SIGBUS), not raise."""
    try:
        return hashlib.sha256(library.read_bytes()).hexdigest() == _digest_file(library).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """One process (and one thread) at a time; the system releases the lock of one that dies."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise NativeBuildError(f"cannot lock {path} ({error.strerror})", "set ARMILLARY_HOME to a writable folder") from error
    try:
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except ImportError:  # no fcntl on Windows: two builds may run, and the atomic rename still leaves a whole file
            pass
        yield
    finally:
        os.close(descriptor)
