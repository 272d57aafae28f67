"""The tensor types that a GGUF file may hold: id, block size in elements, block size in bytes (ggml's `ggml_type`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorType:
    """`block` consecutive elements of a row are stored together in `size` bytes."""

    id: int
    name: str
    block: int
    size: int

    def row_bytes(self, elements: int) -> int:
        """Bytes of a row of `elements` (a multiple of `block`)."""
        return elements // self.block * self.size


_TYPES = (
    TensorType(0, "F32", 1, 4),
    TensorType(1, "F16", 1, 2),
    TensorType(2, "Q4_0", 32, 2 + 16),
    TensorType(3, "Q4_1", 32, 2 + 2 + 16),
    TensorType(6, "Q5_0", 32, 2 + 4 + 16),
    TensorType(7, "Q5_1", 32, 2 + 2 + 4 + 16),
    TensorType(8, "Q8_0", 32, 2 + 32),
    TensorType(9, "Q8_1", 32, 4 + 4 + 32),
    TensorType(10, "Q2_K", 256, 16 + 64 + 2 + 2),
    TensorType(11, "Q3_K", 256, 32 + 64 + 12 + 2),
    TensorType(12, "Q4_K", 256, 2 + 2 + 12 + 128),
    TensorType(13, "Q5_K", 256, 2 + 2 + 12 + 32 + 128),
    TensorType(14, "Q6_K", 256, 128 + 64 + 16 + 2),
    TensorType(15, "Q8_K", 256, 4 + 256 + 32),
    TensorType(16, "IQ2_XXS", 256, 2 + 64),
    TensorType(17, "IQ2_XS", 256, 2 + 64 + 8),
    TensorType(18, "IQ3_XXS", 256, 2 + 64 + 32),
    TensorType(19, "IQ1_S", 256, 2 + 32 + 16),
    TensorType(20, "IQ4_NL", 32, 2 + 16),
    TensorType(21, "IQ3_S", 256, 2 + 64 + 32 + 8 + 4),
    TensorType(22, "IQ2_S", 256, 2 + 64 + 16),
    TensorType(23, "IQ4_XS", 256, 2 + 2 + 128 + 4),
    TensorType(24, "I8", 1, 1),
    TensorType(25, "I16", 1, 2),
    TensorType(26, "I32", 1, 4),
    TensorType(27, "I64", 1, 8),
    TensorType(28, "F64", 1, 8),
    TensorType(29, "IQ1_M", 256, 32 + 16 + 8),
    TensorType(30, "BF16", 1, 2),
    TensorType(34, "TQ1_0", 256, 2 + 4 * 13),
    TensorType(35, "TQ2_0", 256, 2 + 64),
    TensorType(39, "MXFP4", 32, 1 + 16),
)
BY_ID = {t.id: t for t in _TYPES}
BY_NAME = {t.name: t for t in _TYPES}
