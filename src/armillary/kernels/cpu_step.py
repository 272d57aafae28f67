"""One decoder iteration in one native call: the Python side of `cpu/step.cpp`.

Weights are laid out once (`PackedWeight`), keys and values live in a paged pool of this kernel's own layout (`StepCache`),
and `DecoderStep.forward` runs a flat, padding-free batch through every layer without coming back to Python.
Results do not depend on the number of threads nor on what else is in the batch (see `cpu/gemm.h`, `cpu/attention.h`).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from armillary.core import native
from armillary.core.errors import ArmillaryError, CapacityError, InputError

Format = Literal["fp32", "fp16", "int8", "int4", "int4m"]
_CODES: dict[Format, int] = {"fp32": 0, "fp16": 1, "int8": 2, "int4": 3, "int4m": 4}
_GROUP, _PANEL, _TILE = 32, 48, 16
FOLDER = Path(__file__).parent / "cpu"
SOURCES = ("step.cpp", "pack.cpp")  # and the headers beside them
# What ARMILLARY_ISA may ask for instead of the best that this machine has: the tests run all of them.
_ISAS = {
    "native": native.FLAGS[1:3],
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}
MAX_HEAD_DIM = 512  # the gather buffer of cpu/attention.h


class _Weight(ctypes.Structure):
    _fields_ = (
        ("format", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("minimums", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class _Cache(ctypes.Structure):
    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("half", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", _Weight),
        ("o", _Weight),
        ("gate_up", _Weight),
        ("down", _Weight),
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("post_attention_norm", ctypes.c_void_p),
        ("post_mlp_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("cache", _Cache),
        ("window", ctypes.c_int32),
        ("rope", ctypes.c_int32),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary", "activation")
        ),
        *((name, ctypes.c_float) for name in ("norm_eps", "attention_scale", "attention_softcap", "logit_softcap", "embedding_scale")),
        ("embedding_half", ctypes.c_int32),
        ("embedding", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        ("layer", ctypes.POINTER(_Layer)),
        ("head", _Weight),
        ("inverse_frequencies", ctypes.c_void_p * 2),
        ("rope_scaling", ctypes.c_float * 2),
    )


class _Sequence(ctypes.Structure):
    _fields_ = (("table", ctypes.c_void_p), ("start", ctypes.c_int32), ("count", ctypes.c_int32), ("row", ctypes.c_int32))


class _Batch(ctypes.Structure):
    _fields_ = (
        ("tokens", ctypes.c_int32),
        ("sequences", ctypes.c_int32),
        ("sampled", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("sequence", ctypes.c_void_p),
        ("sampled_row", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("peak", ctypes.c_void_p),
        ("best", ctypes.c_void_p),
    )


def flags() -> tuple[str, ...]:
    """The compiler's flags, for the instruction set that ARMILLARY_ISA names (default: this machine's best)."""
    isa = os.environ.get("ARMILLARY_ISA", "native")
    if isa not in _ISAS:
        raise InputError(f"ARMILLARY_ISA is {isa!r}", f"choose one of {', '.join(_ISAS)}")
    return (*(flag for flag in native.FLAGS if flag not in _ISAS["native"]), *_ISAS[isa], "-pthread")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had (no compiler, switched off)."""
    lib = native.load("decoder_step", [FOLDER / name for name in SOURCES], flags())
    if lib is None:
        return None
    lib.arm_engine_create.restype = ctypes.c_void_p
    lib.arm_engine_create.argtypes = [ctypes.c_int]
    lib.arm_engine_destroy.argtypes = [ctypes.c_void_p]
    lib.arm_forward.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Model), ctypes.POINTER(_Batch)]
    sizes = (ctypes.c_int32 * 6)()
    lib.arm_struct_sizes(sizes)
    ours = [ctypes.sizeof(c) for c in (_Weight, _Layer, _Model, _Batch, _Sequence, _Cache)]
    if list(sizes) != ours:
        raise RuntimeError(f"cpu/step.cpp and cpu_step.py disagree on the structs' sizes: {list(sizes)} against {ours}")
    return lib


def available() -> bool:
    return library() is not None


def _require() -> ctypes.CDLL:
    lib = library()
    if lib is None:
        raise InputError("the native kernels are not available", "install g++ (apt install g++) or serve with --backend torch")
    return lib


class Arena:
    """Memory for packed weights and caches, asked for in large pieces on huge pages: streaming weights through 4 KiB pages
    cost a quarter of the bandwidth where it was measured (41 against 52 GB/s, two Zen 5 cores)."""

    _PIECE = 64 << 20

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        """`nbytes` zeroed bytes, aligned to 64."""
        padded = -(-nbytes // 64) * 64
        if padded > self._free.numel():
            piece = mmap.mmap(-1, max(padded, self._PIECE) + (2 << 20))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                piece.madvise(mmap.MADV_HUGEPAGE)
            memory = torch.frombuffer(piece, dtype=torch.uint8)
            self._free = memory[-memory.data_ptr() % (2 << 20) :]
        taken, self._free = self._free[:nbytes], self._free[padded:]
        return taken


class PackedWeight:
    """A weight [n, k] in a kernel layout, made of one or more matrices set side by side by columns of the result.

    `interleave`: two matrices (gate and up) whose tiles alternate. `bias`: one a matrix, or None.
    Raises InputError for NaN or infinite weights.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        format: Format,
        biases: Sequence[Tensor | None] | None = None,
        *,
        interleave: bool = False,
        arena: Arena | None = None,
    ) -> None:
        arena = arena or Arena()
        lib = _require()
        self.format: Format = format
        code, k = _CODES[format], matrices[0].shape[1]
        width = _PANEL if code <= 1 else _TILE
        rows = [m.shape[0] for m in matrices]
        if interleave:
            tiles = -(-rows[0] // width)
            n = 2 * tiles * width
        else:
            n = sum(rows)
        padded_n, padded_k = -(-n // width) * width, -(-k // _GROUP) * _GROUP
        self.shape = (n, k)
        bits = {0: 32, 1: 16, 2: 8, 3: 4, 4: 4}[code]
        self._data = arena.take(padded_n * (k if code <= 1 else padded_k) * bits // 8)
        groups = padded_n * padded_k // _GROUP if code > 1 else 0
        self._scales = arena.take(2 * groups).view(torch.float16)
        self._minimums = arena.take(2 * groups if code == 4 else 0).view(torch.float16)
        self._bias: Tensor | None = None
        if biases is not None and any(b is not None for b in biases):
            self._bias = torch.zeros(padded_n + 16, dtype=torch.float32)

        def pack(source: Tensor, column: int) -> None:
            finite = lib.arm_pack(
                code,
                ctypes.c_void_p(source.data_ptr()),
                source.shape[0],
                k,
                ctypes.c_int64(source.stride(0)),
                column,
                ctypes.c_void_p(self._data.data_ptr()),
                ctypes.c_void_p(self._scales.data_ptr()),
                ctypes.c_void_p(self._minimums.data_ptr()),
            )
            if not finite:
                raise InputError(f"a weight of {rows} rows by {k} has NaN or infinite values", "check the model file")

        pieces: list[tuple[Tensor, int]] = []  # source rows and their first column; columns never share a byte
        column = 0
        for index, matrix in enumerate(matrices):
            source = matrix.detach().to(torch.float32).contiguous()
            for start in range(0, rows[index], width):
                at = (2 * (start // width) + index) * width if interleave else column + start
                pieces.append((source[start : start + width], at))
                bias = biases[index] if biases is not None else None
                if bias is not None and self._bias is not None:
                    piece = bias[start : start + width]
                    self._bias[at : at + piece.shape[0]] = piece.float()
            column += rows[index]
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            list(pool.map(lambda piece: pack(*piece), pieces))

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._data, self._scales, self._minimums))

    def struct(self) -> _Weight:
        n, k = self.shape
        return _Weight(
            _CODES[self.format],
            n,
            k,
            0,
            self._data.data_ptr(),
            self._scales.data_ptr() or None,
            self._minimums.data_ptr() or None,
            self._bias.data_ptr() if self._bias is not None else None,
        )

    def unpack(self) -> Tensor:
        """What the packed weight stands for: fp32 [n, k] (of an interleaved weight: in the order of the tiles)."""
        out = torch.empty(self.shape)
        _require().arm_unpack(ctypes.byref(self.struct()), ctypes.c_void_p(out.data_ptr()))
        return out

    def multiply(self, x: Tensor) -> Tensor:
        """x [rows, k] fp32 -> [rows, n], on one thread."""
        x = x.contiguous()
        out = torch.empty(x.shape[0], self.shape[0])
        _require().arm_multiply(ctypes.byref(self.struct()), ctypes.c_void_p(x.data_ptr()), x.shape[0], ctypes.c_void_p(out.data_ptr()))
        return out


@dataclass(frozen=True)
class StepLayer:
    """Weights of one layer. Norm weights are final (any offset added); optional parts are None."""

    qkv: PackedWeight
    o: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight
    attention_norm: Tensor
    mlp_norm: Tensor
    post_attention_norm: Tensor | None
    post_mlp_norm: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int | None
    rope: int = 0  # index into StepModel.ropes


@dataclass(frozen=True)
class StepModel:
    """A decoder as the kernel wants it. `embedding` is [vocabulary, hidden], fp32 or fp16."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    activation: Literal["silu", "gelu_tanh"]
    norm_eps: float
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    embedding_scale: float
    embedding: Tensor
    final_norm: Tensor
    layers: tuple[StepLayer, ...]
    head: PackedWeight
    ropes: tuple[tuple[Tensor, float], ...]  # one or two: inverse frequencies [head_dim / 2] and the scaling of cosines and sines

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights that one decode iteration reads."""
        return self.head.nbytes + sum(w.nbytes for layer in self.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down))


class StepCache:
    """Keys and values of every layer in pages. fp32 or fp16; 16 slots are a tile, so the pool is padded to whole tiles."""

    def __init__(self, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in (torch.float32, torch.float16):
            raise InputError(f"the native cache holds float32 or float16, not {dtype}", "choose one of the two")
        slots = -(-blocks * block_size // 16) * 16
        self.block_size, self.dtype, self.blocks = block_size, dtype, blocks
        self.kv_heads, self.head_dim = kv_heads, head_dim
        # Zeroes, which the system gives page by page as the pool is first written: lanes of a tile that no token has
        # written yet are multiplied by weight 0, and 0 x NaN would be NaN.
        nbytes, arena = layers * slots * kv_heads * head_dim * dtype.itemsize, Arena()
        self.keys, self.values = (arena.take(nbytes).view(dtype).view(layers, -1) for _ in range(2))

    @property
    def nbytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def struct(self, layer: int) -> _Cache:
        return _Cache(
            self.keys[layer].data_ptr(),
            self.values[layer].data_ptr(),
            int(self.dtype == torch.float16),
            self.kv_heads,
            self.head_dim,
            self.block_size,
        )


def attention(
    cache: StepCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    table: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Store k, v [T, Hkv, D] of one sequence at positions start.. of layer 0 of `cache`, attend with q [T, Hq, D]; one thread.

    The kernel of `DecoderStep` on its own, for tests and benchmarks. `table`: int32 block table.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    sequence = _Sequence(table.data_ptr(), start, q.shape[0], 0)
    _require().arm_attention(
        ctypes.byref(cache.struct(0)),
        ctypes.byref(sequence),
        q.shape[1],
        ctypes.c_float(scale),
        ctypes.c_float(softcap or 0.0),
        window or 0,
        *(ctypes.c_void_p(t.data_ptr()) for t in (q, k, v, out)),
    )
    return out


class DecoderStep:
    """Runs batches through a packed decoder with `threads` threads of its own (they sleep between calls). One caller at a time."""

    def __init__(self, model: StepModel, cache: StepCache, threads: int) -> None:
        if model.head_dim % 16 or model.head_dim > MAX_HEAD_DIM:
            raise InputError(
                f"head_dim is {model.head_dim}; the native kernels take multiples of 16 up to {MAX_HEAD_DIM}", "serve with --backend torch"
            )
        if threads < 1:
            raise InputError(f"threads is {threads}", "give at least 1")
        self._lib = _require()
        self.model, self.cache, self.threads = model, cache, threads
        self._keep: list[Tensor] = []

        def pointer(t: Tensor | None) -> int | None:
            if t is None:
                return None
            t = t.detach().to(torch.float32).contiguous()
            self._keep.append(t)
            return t.data_ptr()

        self._layers = (_Layer * len(model.layers))(
            *(
                _Layer(
                    layer.qkv.struct(),
                    layer.o.struct(),
                    layer.gate_up.struct(),
                    layer.down.struct(),
                    *(
                        pointer(t)
                        for t in (
                            layer.attention_norm,
                            layer.mlp_norm,
                            layer.post_attention_norm,
                            layer.post_mlp_norm,
                            layer.q_norm,
                            layer.k_norm,
                        )
                    ),
                    cache.struct(index),
                    layer.window or 0,
                    layer.rope,
                )
                for index, layer in enumerate(model.layers)
            )
        )
        embedding = model.embedding.detach().contiguous()
        if embedding.dtype != torch.float16:
            embedding = embedding.to(torch.float32)
        self._keep.append(embedding)
        self._model = _Model(
            len(model.layers),
            model.hidden,
            model.intermediate,
            model.heads,
            model.kv_heads,
            model.head_dim,
            model.vocabulary,
            int(model.activation == "gelu_tanh"),
            model.norm_eps,
            model.attention_scale,
            model.attention_softcap or 0.0,
            model.logit_softcap or 0.0,
            model.embedding_scale,
            int(embedding.dtype == torch.float16),
            embedding.data_ptr(),
            pointer(model.final_norm),
            self._layers,
            model.head.struct(),
            (ctypes.c_void_p * 2)(*(pointer(frequencies) for frequencies, _ in model.ropes)),
            (ctypes.c_float * 2)(*(scaling for _, scaling in model.ropes)),
        )
        self._logits = torch.empty(0, model.vocabulary)
        self._busy = threading.Lock()
        self._handle = self._lib.arm_engine_create(threads)
        if not self._handle:
            raise CapacityError(f"the system does not give {threads:,} threads", "ask for as many as there are cores", field="threads")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._lib.arm_engine_destroy(self._handle)
            self._handle = None

    def forward(
        self, tokens: Tensor, positions: Tensor, starts: Sequence[int], counts: Sequence[int], tables: Sequence[Tensor], rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute a flat batch; logits of `rows` (fp32 [len(rows), vocabulary]), each row's peak (NaN if any is NaN) and its token.

        tokens, positions: int32 [tokens]; sequence i owns the next `counts[i]` rows, its first at position `starts[i]`, and
        `tables[i]` (int32) holds its block table; rows: int32 indices into the batch.
        The logits are a view of a buffer that the next call overwrites. Raises InputError for an index out of its range,
        which the kernel would follow into memory that is not its own, and ArmillaryError while another thread is inside.
        """
        _check("token", tokens, self.model.vocabulary)
        _check("row", rows, tokens.shape[0])
        _check("KV block", torch.cat(list(tables)) if tables else rows[:0], self.cache.blocks)
        sequences = (_Sequence * len(starts))()
        row = 0
        for i, (start, count, table) in enumerate(zip(starts, counts, tables, strict=True)):
            if start < 0 or count < 1 or start + count > table.shape[0] * self.cache.block_size:
                raise InputError(
                    f"{count} tokens from position {start} do not fit a table of {table.shape[0]} KV blocks of {self.cache.block_size}"
                )
            sequences[i] = _Sequence(table.data_ptr(), start, count, row)
            row += count
        if row != tokens.shape[0] or row != positions.shape[0]:
            raise InputError(f"the sequences have {row} tokens, the batch {tokens.shape[0]} and {positions.shape[0]} positions")
        if not self._busy.acquire(blocking=False):
            raise ArmillaryError("this DecoderStep is computing another thread's batch", "give each thread a DecoderStep of its own")
        try:
            return self._forward(tokens, positions, sequences, rows)
        finally:
            self._busy.release()

    def _forward(
        self, tokens: Tensor, positions: Tensor, sequences: ctypes.Array[_Sequence], rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if rows.shape[0] > self._logits.shape[0]:
            self._logits = torch.empty(rows.shape[0], self.model.vocabulary)
        logits, peak, best = self._logits[: rows.shape[0]], torch.empty(rows.shape[0]), torch.empty(rows.shape[0], dtype=torch.int32)
        batch = _Batch(
            tokens.shape[0],
            len(sequences),
            rows.shape[0],
            0,
            tokens.data_ptr(),
            positions.data_ptr(),
            ctypes.addressof(sequences),
            rows.data_ptr(),
            logits.data_ptr(),
            peak.data_ptr(),
            best.data_ptr(),
        )
        if not self._lib.arm_forward(self._handle, ctypes.byref(self._model), ctypes.byref(batch)):
            raise CapacityError(f"no memory for the buffers of a batch of {tokens.shape[0]:,} tokens", "lower max_batch_tokens")
        return logits, peak, best


def _check(what: str, indices: Tensor, bound: int) -> None:
    """Raises InputError for an index outside [0, bound)."""
    if indices.numel():
        low, high = (int(end) for end in indices.aminmax())
        if low < 0 or high >= bound:
            raise InputError(f"{what} {low if low < 0 else high} is outside 0 .. {bound - 1}")
