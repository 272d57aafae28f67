"""What the GPU benches measure, with the bytes and FLOPs that each case needs at least (closed forms; no torch, no GPU)."""

from __future__ import annotations

from dataclasses import dataclass

GROUP, PAIR = 32, 64  # inputs that share a scale; inputs are padded to pairs of groups
BITS = {"int8": 8, "int4": 4, "int4m": 4}
ITEMSIZE = {"float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class AttentionCase:
    """`spans`: (tokens in the cache before, new tokens) of each sequence."""

    name: str
    spans: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    block_size: int = 16
    window: int | None = None

    @property
    def flops(self) -> int:
        """Two products of 2 * head_dim for each query head and key that it sees."""
        return 4 * self.heads * self.head_dim * sum(_pairs(start, count, self.window) for start, count in self.spans)

    @property
    def bytes(self) -> int:
        """Every visible key and value once, queries in, results out. Block tables are left out: 4 bytes a block."""
        keys = sum(min(start + count, start + count if self.window is None else self.window + count - 1) for start, count in self.spans)
        tokens = sum(count for _, count in self.spans)
        return ITEMSIZE[self.dtype] * self.head_dim * (2 * keys * self.kv_heads + 2 * tokens * self.heads)


@dataclass(frozen=True)
class LinearCase:
    """x [m, k] times the transpose of a weight [n, k]."""

    name: str
    m: int
    n: int
    k: int
    format: str
    dtype: str = "float16"

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def weight_bytes(self) -> int:
        """Levels of the padded inputs, an fp16 scale a group, and an fp16 minimum where the format has one."""
        padded = -(-self.k // PAIR) * PAIR
        return self.n * padded * BITS[self.format] // 8 + 2 * self.n * (padded // GROUP) * (2 if self.format == "int4m" else 1)

    @property
    def bytes(self) -> int:
        """The weight once, x in, the result out."""
        return self.weight_bytes + ITEMSIZE[self.dtype] * (self.m * self.k + self.m * self.n)


Case = AttentionCase | LinearCase


def bound(case: Case, bandwidth: float, flops: float) -> float:
    """Seconds that the card needs at least: memory and arithmetic overlapped perfectly (Williams et al. 2009)."""
    return max(case.bytes / bandwidth, case.flops / flops)


def _pairs(start: int, count: int, window: int | None) -> int:
    """Keys that the positions start .. start+count-1 see, added up: position i sees min(i + 1, window)."""

    def below(end: int) -> int:
        """Of the positions 0 .. end-1."""
        if window is None or end <= window:
            return end * (end + 1) // 2
        return window * (window + 1) // 2 + (end - window) * window

    return below(start + count) - below(start)


_LLAMA = {"heads": 32, "kv_heads": 8, "head_dim": 128}  # Llama 3 8B
_SMOL = {"heads": 9, "kv_heads": 3, "head_dim": 64}  # SmolLM2 135M

ATTENTION: tuple[AttentionCase, ...] = (
    *(
        AttentionCase(f"decode-{b}-at-{n}", ((n - 1, 1),) * b, **_LLAMA)
        for b, n in ((1, 1024), (1, 8192), (1, 32768), (8, 8192), (64, 2048))
    ),
    AttentionCase("decode-64-at-2048-blocks-of-256", ((2047, 1),) * 64, block_size=256, **_LLAMA),
    AttentionCase("decode-32-unequal", tuple((128 * (i + 1) - 1, 1) for i in range(32)), **_LLAMA),
    AttentionCase("decode-8-at-8192-window-1024", ((8191, 1),) * 8, window=1024, **_LLAMA),
    AttentionCase("decode-32-at-512-smollm2", ((511, 1),) * 32, **_SMOL),
    AttentionCase("prefill-2048", ((0, 2048),), **_LLAMA),
    AttentionCase("prefill-2048-fp16", ((0, 2048),), dtype="float16", **_LLAMA),
    AttentionCase("chunk-512-after-8192", ((8192, 512),), **_LLAMA),
    AttentionCase("chunk-512-and-31-decodes", ((0, 512), *((2047, 1),) * 31), **_LLAMA),
)
_SHAPES = {"qkv": (6144, 4096), "gate-up": (28672, 4096), "down": (4096, 14336)}  # Llama 3 8B's products, [n, k]
LINEAR: tuple[LinearCase, ...] = (
    *(
        LinearCase(f"{shape}-{format}-{m}", m, n, k, format)
        for shape, (n, k) in _SHAPES.items()
        for format in ("int4", "int8")
        for m in (1, 4, 16, 64, 512)
    ),
    *(LinearCase(f"gate-up-int4m-bf16-{m}", m, 28672, 4096, "int4m", "bfloat16") for m in (1, 4, 16, 64, 512)),
)
