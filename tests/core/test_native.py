"""A library is built once whoever asks, rebuilt when damaged or changed, and its absence costs a warning, not the run."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from armillary.core import native
from armillary.core.errors import InputError, MissingDependencyError, NotFoundError

SOURCE = 'extern "C" long long twice(long long x) { return 2 * x; }\n'
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler: run `apt install g++`")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ARMILLARY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ARMILLARY_NATIVE", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native, "_warned", set())
    yield
    native._version.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "src" / "twice.cpp"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes a line a compilation."""
    log, script = tmp_path / "log", tmp_path / "counting-g++"
    real = shutil.which("g++") or shutil.which("clang++")
    script.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo x >> "{log}" ;; esac\nexec {real} "$@"\n')
    script.chmod(0o755)
    log.write_text("")
    monkeypatch.setenv("CXX", str(script))
    return log


def libraries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "home" / "native").glob("*.so"))


def twice(library: ctypes.CDLL | None, x: int) -> int:
    assert library is not None
    library.twice.argtypes, library.twice.restype = [ctypes.c_longlong], ctypes.c_longlong
    return int(library.twice(x))


@needs_compiler
def test_built_once_then_kept(source: Path, counting: Path, tmp_path: Path) -> None:
    first = native.load("twice", [source])
    assert twice(first, 2**40) == 2**41
    assert native.load("twice", [source]) is first
    assert counting.read_text() == "x\n"
    assert stat.S_IMODE((tmp_path / "home" / "native").stat().st_mode) == 0o700
    assert not list((tmp_path / "home" / "native").glob("*.partial"))


@needs_compiler
def test_whatever_it_depends_on_changes_the_library(source: Path, tmp_path: Path) -> None:
    built = [native.build("twice", [source])]
    built.append(native.build("twice", [source], (*native.FLAGS, "-DX=1")))
    built.append(native.build("twice", [source], openmp=True))
    (source.parent / "part.h").write_text("// a header")
    built.append(native.build("twice", [source]))
    source.write_text(SOURCE.replace("2 * x", "x + x"))
    built.append(native.build("twice", [source]))
    assert len(set(built)) == 5
    assert libraries(tmp_path) == sorted(built)


@needs_compiler
def test_four_processes_build_one_library(source: Path, counting: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from armillary.core import native\n"
        "sys.stdin.readline()\n"
        f"library = native.load('twice', [{str(source)!r}])\n"
        "print(library.twice(21))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=120)[0] for process in processes] == ["42\n"] * 4
    assert counting.read_text() == "x\n"
    assert len(libraries(tmp_path)) == 1


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "altered", "empty", "no digest"])
def test_a_damaged_library_is_rebuilt(source: Path, counting: Path, damage: str) -> None:
    path = native.build("twice", [source])
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "altered":
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.with_suffix(".sha256").unlink()
    assert twice(native.load("twice", [source]), 3) == 6
    assert counting.read_text() == "x\nx\n"


def test_without_a_compiler_one_warning_and_none(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="apt install g\\+\\+"):
        assert native.load("twice", [source]) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.load("twice", [source]) is None
        assert native.load("other", [source]) is None
    with pytest.raises(MissingDependencyError, match="no C\\+\\+ compiler"):
        native.build("twice", [source])


@needs_compiler
def test_a_source_that_does_not_compile_is_quoted(source: Path, tmp_path: Path) -> None:
    source.write_text("int f() { return undeclared; }")
    with pytest.warns(RuntimeWarning, match="undeclared"):
        assert native.load("broken", [source]) is None
    with pytest.raises(native.NativeBuildError, match=r"failed on twice\.cpp"):
        native.build("broken", [source])
    assert libraries(tmp_path) == []


@needs_compiler
def test_sources_are_compiled_apart_and_linked(source: Path, counting: Path, tmp_path: Path) -> None:
    source.write_text('long long half(long long); extern "C" long long twice(long long x) { return 4 * half(x); }\n')
    other = source.with_name("half.cpp")
    other.write_text("long long half(long long x) { return x / 2; }\n")
    assert twice(native.load("twice", [source, other]), 10) == 20
    assert counting.read_text() == "x\nx\n"
    other.write_text("long long half(long long x) { return missing; }\n")
    with pytest.raises(native.NativeBuildError, match=r"failed on half\.cpp: .*missing"):
        native.build("twice", [source, other])
    other.write_text(source.read_text())
    with pytest.raises(native.NativeBuildError, match=r"(?s)failed on twice\.cpp, half\.cpp: .*multiple definition"):
        native.build("twice", [source, other])
    assert len(libraries(tmp_path)) == 1
    assert not list((tmp_path / "home" / "native").glob("*.partial"))


def test_it_can_be_turned_off(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARMILLARY_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.load("twice", [source]) is None
    assert not (tmp_path / "home").exists()


@needs_compiler
def test_denormals_survive_loading(source: Path) -> None:
    """-ffast-math would turn on flush-to-zero for the thread that loads the library."""
    assert native.load("twice", [source]) is not None
    tiny = 5e-324
    assert tiny * 1.0 == tiny != 0.0
    for flag in ("-ffast-math", "-Ofast"):
        with pytest.raises(InputError, match="denormals"):
            native.build("twice", [source], (*native.FLAGS, flag))


@needs_compiler
def test_openmp_shares_the_runtime_of_torch(source: Path) -> None:
    """One libgomp in the process: torch's, which load imports first."""
    source.write_text('#include <omp.h>\nextern "C" long long twice(long long x) { return 2 * x + 0 * omp_get_max_threads(); }\n')
    assert twice(native.load("twice", [source], openmp=True), 4) == 8
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert len({line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}) == 1


def test_bad_names_sources_and_folders(source: Path, tmp_path: Path) -> None:
    for name in ("../x", "", "a/b", "a" * 81):
        with pytest.raises(InputError, match="library name"):
            native.build(name, [source])
    if shutil.which("g++"):
        with pytest.raises(NotFoundError, match=r"missing\.cpp"):
            native.build("x", [tmp_path / "missing.cpp"])
        (tmp_path / "home" / "native").chmod(0o777)
        with pytest.raises(native.NativeBuildError, match="others may write"):
            native.build("x", [source])
        (tmp_path / "home" / "native").chmod(0o700)
