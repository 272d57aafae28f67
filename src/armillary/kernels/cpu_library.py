"""The compiled kernels of `cpu/`: how they are built, and the C structs that they take."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from armillary.core import native
from armillary.core.errors import InputError

FOLDER = Path(__file__).parent / "cpu"
SOURCES = ("step.cpp", "pack.cpp", "sample.cpp")  # and the headers beside them
# What ARMILLARY_ISA may ask for instead of the best that this machine has: the tests compile all of them.
_ISAS = {
    "native": native.FLAGS[1:3],
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}
PHASES = ("prepare", "qkv", "rope", "select", "attention", "o", "gate_up", "down", "head", "embed")  # of cpu/step.cpp, in its order
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a layer, as cpu/low_rank.h counts them
MAX_HEAD_DIM = 512  # the buffers of cpu/attention.h


class CWeight(ctypes.Structure):
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


class CCache(ctypes.Structure):
    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_scales", ctypes.c_void_p),
        ("value_scales", ctypes.c_void_p),
        ("bounds", ctypes.c_void_p),
        ("bound_scales", ctypes.c_void_p),
        ("tiles", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
    )


class CLayer(ctypes.Structure):
    _fields_ = (
        ("qkv", CWeight),
        ("o", CWeight),
        ("gate_up", CWeight),
        ("down", CWeight),
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("post_attention_norm", ctypes.c_void_p),
        ("post_mlp_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("cache", CCache),
        ("window", ctypes.c_int32),
        ("rope", ctypes.c_int32),
    )


class CModel(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary", "activation")
        ),
        *((name, ctypes.c_float) for name in ("norm_eps", "attention_scale", "attention_softcap", "logit_softcap", "embedding_scale")),
        ("embedding_half", ctypes.c_int32),
        *((name, ctypes.c_int32) for name in ("deterministic", "pages", "first_pages", "last_pages", "dense_layers", "sinks", "rolling")),
        ("embedding", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        ("layer", ctypes.POINTER(CLayer)),
        ("head", CWeight),
        ("inverse_frequencies", ctypes.c_void_p * 2),
        ("rope_scaling", ctypes.c_float * 2),
    )


class CSequence(ctypes.Structure):
    _fields_ = (("table", ctypes.c_void_p), *((name, ctypes.c_int32) for name in ("start", "count", "row", "selects", "dropped")))


class CBatch(ctypes.Structure):
    _fields_ = (
        ("tokens", ctypes.c_int32),
        ("sequences", ctypes.c_int32),
        ("sampled", ctypes.c_int32),
        ("adapters", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("sequence", ctypes.c_void_p),
        ("sampled_row", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("peak", ctypes.c_void_p),
        ("best", ctypes.c_void_p),
        ("adapter", ctypes.c_void_p),
        ("adapter_of", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
    )


class CLowRank(ctypes.Structure):
    _fields_ = (("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("rank", ctypes.c_int32), ("scale", ctypes.c_float))


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
    lib.arm_engine_phases.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64)]
    lib.arm_forward.argtypes = [ctypes.c_void_p, ctypes.POINTER(CModel), ctypes.POINTER(CBatch)]
    lib.arm_bound_pages.argtypes = [ctypes.POINTER(CCache), ctypes.c_int64, ctypes.c_int64]
    lib.arm_sample.argtypes = [
        ctypes.c_void_p, ctypes.c_int32, ctypes.c_float, ctypes.c_float, ctypes.c_int32, ctypes.c_double, ctypes.c_double, ctypes.c_double,
    ]  # fmt: skip
    lib.arm_allowed.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_float)]
    sizes = (ctypes.c_int32 * 7)()
    lib.arm_struct_sizes(sizes)
    ours = [ctypes.sizeof(c) for c in (CWeight, CLayer, CModel, CBatch, CSequence, CCache, CLowRank)]
    if list(sizes) != ours:
        raise RuntimeError(f"cpu/step.cpp and cpu_library.py disagree on the structs' sizes: {list(sizes)} against {ours}")
    return lib


def available() -> bool:
    return library() is not None


def require() -> ctypes.CDLL:
    lib = library()
    if lib is None:
        raise InputError("the native kernels are not available", "install g++ (apt install g++) or serve with --backend torch")
    return lib
