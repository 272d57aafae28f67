"""A GGUF file either opens as the `gguf` package reads it, or says what is wrong with it."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from armillary.core.errors import ArmillaryError, FormatError, NotFoundError
from armillary.models.gguf.quant import dequantise
from armillary.models.gguf.reader import GGUFFile

KINDS = {int: (10, "<Q"), float: (12, "<d"), bool: (7, "<B")}


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(tensors: int, keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def build(keys: list[bytes], tensors: list[bytes], data: bytes = b"", version: int = 3) -> bytes:
    head = header(len(tensors), len(keys), version) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


GOOD = build(
    [
        key("general.architecture", 8, text("llama")),
        key("list", 9, struct.pack("<IQ", 8, 2) + text("a") + text("ü")),
        key("numbers", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
        key("nested", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ2f", 6, 2, 0.5, 1.5)),
        key("flag", 7, b"\x01"),
        key("real", 6, struct.pack("<f", 2.5)),
    ],
    [tensor("a", (4, 2)), tensor("b", (32,), 8, 32)],
    np.arange(8, dtype="<f4").tobytes() + np.float16(2).tobytes() + bytes(range(32)),
)


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    def run(raw: bytes) -> GGUFFile:
        path = tmp_path / "model.gguf"
        path.write_bytes(raw)
        return GGUFFile.open(path)

    return run


@pytest.mark.parametrize("version", [2, 3])
def test_reads_values_and_tensors(opened: Any, version: int) -> None:
    file = opened(GOOD.replace(struct.pack("<I", 3), struct.pack("<I", version), 1))
    assert file.version == version
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["list"] == ["a", "ü"]
    assert file.metadata["numbers"].tolist() == [1, -2, 3]
    assert [part.tolist() for part in file.metadata["nested"]] == [[0.5, 1.5]]
    assert file.metadata["flag"] is True
    assert file.metadata["real"] == 2.5
    np.testing.assert_array_equal(dequantise(file.tensors["a"]), np.arange(8, dtype=np.float32).reshape(2, 4))
    np.testing.assert_array_equal(dequantise(file.tensors["b"]), 2 * np.arange(32, dtype=np.float32))


def test_equals_the_gguf_package(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "peer.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_context_length(128)
    writer.add_token_list(["a", "b", "▁ü"])
    writer.add_token_scores([0.0, -1.0, -2.5])
    weights = {"x": rng.standard_normal((3, 64)).astype(np.float32), "y": rng.standard_normal((5,)).astype(np.float16)}
    for name, value in weights.items():
        writer.add_tensor(name, value)
    writer.add_tensor("q", gguf.quants.quantize(weights["x"], gguf.GGMLQuantizationType.Q5_1), raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = GGUFFile.open(path), gguf.GGUFReader(path)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            value = ours.metadata[name]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
    assert set(ours.tensors) == {t.name for t in theirs.tensors}
    for peer in theirs.tensors:
        mine = ours.tensors[peer.name]
        assert (mine.shape, mine.offset, mine.nbytes) == (tuple(peer.shape.tolist())[::-1], peer.data_offset, peer.n_bytes)
        np.testing.assert_array_equal(dequantise(mine), gguf.quants.dequantize(peer.data, peer.tensor_type))


HUGE = 2**63 + 7
BAD = {
    "empty": (b"", "0 bytes"),
    "magic": (b"GGML" + GOOD[4:], "b'GGML'"),
    "version": (GOOD.replace(struct.pack("<I", 3), struct.pack("<I", 1), 1), "version is 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensor count": (header(HUGE, 0) + bytes(64), "tensor count is 9,223"),
    "key count": (header(0, HUGE) + bytes(64), "key count is 9,223"),
    "key length": (header(0, 1) + struct.pack("<Q", HUGE) + bytes(64), "length of key 0"),
    "string length": (build([text("k") + struct.pack("<IQ", 8, HUGE)], []), "length of key 'k'"),
    "array length": (build([key("k", 9, struct.pack("<IQ", 4, HUGE))], []), "key 'k': length"),
    "string array length": (build([key("k", 9, struct.pack("<IQ", 8, HUGE))], []), "key 'k': length"),
    "string in array": (build([key("k", 9, struct.pack("<IQQ", 8, 1, HUGE))], []), r"'k'\[0\] has 9223"),
    "nesting": (build([key("k", 9, struct.pack("<IQ", 9, 1) * 8)], [], bytes(64)), "more than 4 deep"),
    "nested count": (build([key("k", 9, struct.pack("<IQ", 9, 2**40))], [], bytes(64)), "nested arrays"),
    "value type": (build([key("k", 13, bytes(8))], []), "unknown value type 13"),
    "element type": (build([key("k", 9, struct.pack("<IQ", 77, 1))], []), "unknown element type 77"),
    "boolean": (build([key("k", 7, b"\x02")], []), "boolean with the value 2"),
    "not UTF-8": (build([key("k", 8, text(b"\xff"))], []), "not UTF-8"),
    "same key": (build([key("k", 7, b"\x01")] * 2, []), "'k' occurs twice"),
    "alignment": (build([key("general.alignment", 4, struct.pack("<I", 24))], []), "power of two"),
    "alignment zero": (build([key("general.alignment", 4, bytes(4))], []), "power of two"),
    "dimensions": (build([], [tensor("t", (1,) * 5)]), "5 dimensions"),
    "no dimension": (build([], [tensor("t", ())]), "0 dimensions"),
    "empty dimension": (build([], [tensor("t", (4, 0))], bytes(64)), "at least 1"),
    "tensor type": (build([], [tensor("t", (4,), 99)], bytes(64)), "unknown type 99"),
    "removed type": (build([], [tensor("t", (32,), 4)], bytes(64)), "unknown type 4"),
    "block": (build([], [tensor("t", (33,), 2)], bytes(64)), "33 elements"),
    "shape product": (build([], [tensor("t", (2**33, 2**33, 2**33, 4))], bytes(64)), "ends at byte"),
    "offset beyond": (build([], [tensor("t", (4,), 0, 2**40)], bytes(64)), "ends at byte"),
    "offset around": (build([], [tensor("t", (4,), 0, 2**64 - 32)], bytes(64)), "ends at byte"),
    "misaligned": (build([], [tensor("t", (4,), 0, 4)], bytes(64)), "multiple of the alignment 32"),
    "overlap": (build([], [tensor("s", (16,)), tensor("t", (4,), 0, 32)], bytes(64)), "overlap"),
    "same place": (build([], [tensor("s", (4,)), tensor("t", (4,))], bytes(64)), "overlap"),
    "same tensor": (build([], [tensor("t", (4,)), tensor("t", (4,), 0, 32)], bytes(64)), "'t' occurs twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named(opened: Any, name: str) -> None:
    raw, message = BAD[name]
    with pytest.raises(FormatError, match=message):
        opened(raw)


def test_every_truncation_is_refused(opened: Any) -> None:
    for length in range(len(GOOD)):
        with pytest.raises(FormatError):
            opened(GOOD[:length])


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(NotFoundError, match="not a file"):
            GGUFFile.open(path)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=9)), min_size=1, max_size=6))
def test_mutated_bytes_open_or_are_refused(opened: Any, edits: list[tuple[int, bytes]]) -> None:
    raw = bytearray(GOOD)
    for at, replacement in edits:
        raw[at : at + len(replacement)] = replacement
    try:
        file = opened(bytes(raw))
        total = sum(dequantise(tensor).nbytes for tensor in file.tensors.values())
    except ArmillaryError:
        return
    assert total <= 8 * len(raw)  # nothing can grow beyond what its bytes hold
