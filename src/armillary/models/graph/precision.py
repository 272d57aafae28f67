"""How many bits a weight, an activation and a cached element take."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from armillary.core.errors import InputError

BITS: Final = {
    "fp32": Fraction(32),
    "bf16": Fraction(16),
    "fp16": Fraction(16),
    "fp8": Fraction(8),
    "int8": Fraction(8),
    "q8_0": Fraction(17, 2),  # GGUF: 32 codes of 8 bits and a scale of 16
    "int4": Fraction(9, 2),  # ours and GGUF's Q4_0: 32 codes of 4 bits and a scale of 16
    "fp4": Fraction(17, 4),  # MXFP4 (OCP 2023): 32 codes of 4 bits and a scale of 8
}
"""Bits an element, scales of groups included."""


def bits(name: str) -> Fraction:
    """Bits an element of a named format. Raises InputError with the closest name."""
    found = BITS.get(name.lower())
    if found is None:
        close = difflib.get_close_matches(name.lower(), BITS, n=1, cutoff=0.5)
        raise InputError(f"unknown number format {name[:40]!r}", f"did you mean {close[0]}?" if close else f"choose from {', '.join(BITS)}")
    return found


@dataclass(frozen=True, slots=True)
class Precision:
    """Formats of the layers' matrices, of everything between operations (norms, biases and routers too), of the cache, and of the
    embedding and head (None: as the matrices)."""

    weights: str = "fp16"
    activations: str = "fp16"
    kv: str = "fp16"
    embeddings: str | None = None

    def __post_init__(self) -> None:
        for name in (self.weights, self.activations, self.kv, self.embeddings or self.weights):
            bits(name)

    @classmethod
    def of(cls, quantize: str, kv_dtype: str) -> Precision:
        """As the engine's options of these names have it: weights that are not packed are computed in fp32, all others in 16 bits."""
        return cls("fp32" if quantize == "none" else quantize, "fp32" if quantize == "none" else "fp16", kv_dtype)

    def weight_bytes(self, elements: int) -> int:
        return stored(elements, bits(self.weights))

    def activation_bytes(self, elements: int) -> int:
        return stored(elements, bits(self.activations))

    def kv_bytes(self, elements: int) -> int:
        return stored(elements, bits(self.kv))

    def embedding_bytes(self, elements: int) -> int:
        return stored(elements, bits(self.embeddings or self.weights))


def stored(elements: int, each: Fraction) -> int:
    """Bytes of so many elements, rounded up."""
    return -(-elements * each.numerator // (8 * each.denominator))
