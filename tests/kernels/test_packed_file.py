"""What is read is what was written, or an error: whichever byte changes, wherever the file ends."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.core.errors import FormatError
from armillary.kernels import cpu_library, packed_file
from armillary.kernels.packed_file import PackedFile, write
from armillary.kernels.packed_weight import Arena

pytestmark = pytest.mark.skipif(not cpu_library.available(), reason="the native kernels need g++")

SHAPES = st.lists(st.integers(1, 40), min_size=1, max_size=3)
DTYPES = st.sampled_from([torch.uint8, torch.float16, torch.float32])


def array(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    nbytes = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).view(dtype).view(shape)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(
        a[k].shape == b[k].shape and a[k].dtype == b[k].dtype and torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a
    )


@settings(max_examples=40, deadline=None)
@given(arrays=st.lists(st.tuples(DTYPES, SHAPES), max_size=6), seed=st.integers(0, 1000))
def test_arrays_come_back(tmp_path_factory: pytest.TempPathFactory, arrays: list[tuple[torch.dtype, list[int]]], seed: int) -> None:
    path = tmp_path_factory.mktemp("packed") / "f"
    given = {f"a{i}:é": array(dtype, shape, seed + i) for i, (dtype, shape) in enumerate(arrays)}
    size = write(path, given, {"x": [1, "two"]})
    file = PackedFile.open(path)
    assert path.stat().st_size == size
    assert file.about == {"x": [1, "two"]}
    found = file.load(Arena())
    assert same(found, given)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())
    assert [p.name for p in path.parent.iterdir()] == ["f"]


def test_arrays_of_many_pieces_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_file, "_PIECE", 640)
    given = {"a": array(torch.float32, [1000, 3], 0), "b": array(torch.uint8, [641], 1)}
    write(tmp_path / "f", given, {})
    assert same(PackedFile.open(tmp_path / "f").load(Arena()), given)


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    given = {"a": array(torch.float16, [30, 7], 0), "b": array(torch.float16, [30, 7], 1), "c": array(torch.uint8, [1], 2)}
    write(tmp_path / "f", given, {"model": "m"})
    return tmp_path / "f", given


def test_a_changed_byte_is_an_error_or_changes_nothing(small: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, given = small
    raw, caught = path.read_bytes(), 0
    for at in [*range(0, 400, 3), *range(4096, len(raw), 2)]:
        changed = bytearray(raw)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        try:
            assert same(PackedFile.open(path).load(Arena()), given)
        except FormatError:
            caught += 1
    assert caught >= 30 * 7 * 2


def test_arrays_in_each_others_place_are_an_error(small: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, _ = small
    raw = bytearray(path.read_bytes())
    first, second = slice(4096, 4096 + 420), slice(4096 + 448, 4096 + 868)
    raw[first], raw[second] = raw[second], raw[first]
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="damaged"):
        PackedFile.open(path).load(Arena())


def test_a_file_of_any_other_length_is_an_error(small: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, _ = small
    raw = path.read_bytes()
    for length in [*range(0, 64), 4095, 4096, 4097, len(raw) - 1]:
        path.write_bytes(raw[:length])
        with pytest.raises(FormatError):
            PackedFile.open(path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(FormatError, match="its header says"):
        PackedFile.open(path)


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(100), b"armpack1" + b"\xff" * 100])
def test_a_foreign_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(FormatError):
        PackedFile.open(tmp_path / "f")


def test_a_header_that_points_out_of_the_file_is_an_error(tmp_path: Path) -> None:
    for entry in (["float32", [1 << 60, 16], 0], ["float32", [4], 1 << 40], ["float32", [-4], 0], ["float32", [4], 3], ["pickle", [4], 0]):
        header = packed_file.json.dumps({"about": {}, "arrays": {"a": entry}, "bytes": 64, "checksum": "0"}).encode()
        start = packed_file._START.pack(packed_file.MAGIC, len(header), packed_file._checksum_of(header))
        (tmp_path / "f").write_bytes((start + header).ljust(4096, b"\0") + bytes(64))
        with pytest.raises(FormatError, match="cannot be read"):
            PackedFile.open(tmp_path / "f")


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_file.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "f", {"a": torch.zeros(10)}, {})
    assert list(tmp_path.iterdir()) == []
