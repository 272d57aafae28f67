"""Every GGUF type dequantises bit for bit as the `gguf` package's reference, and quantises likewise."""

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest

from armillary.core.errors import InputError
from armillary.models.gguf.quant import READABLE, WRITABLE, dequantise_blocks, quantise
from armillary.models.gguf.types import BY_ID, BY_NAME

ROWS, BLOCKS = 37, 5
# Where each type keeps its float16 scales, so that random bytes can be given finite ones.
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def random_blocks(name: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    kind = BY_NAME[name]
    if kind.block == 1:
        return rng.standard_normal((ROWS, 64)).astype(np.float32).view(np.uint8)
    data = rng.integers(0, 256, (ROWS * BLOCKS, kind.size), dtype=np.uint8)
    for at in SCALES.get(name, ()):
        data[:, at : at + 2] = rng.standard_normal((len(data), 1)).astype(np.float16).view(np.uint8)
    return data.reshape(ROWS, BLOCKS * kind.size)


@pytest.mark.parametrize("name", [n for n in READABLE if n != "Q8_K"])
def test_dequantises_exactly_as_the_reference(name: str) -> None:
    data = random_blocks(name, seed=sum(name.encode()))
    ours = dequantise_blocks(data, BY_NAME[name])
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.reshape(ours.shape).view(np.uint32))


def test_q8_k_is_its_float_scale_times_its_bytes() -> None:
    # The reference package has no decoder for Q8_K; the format is the plain product.
    rng = np.random.default_rng(0)
    q, scale = rng.integers(-128, 128, (3, 256), dtype=np.int8), rng.standard_normal((3, 1)).astype(np.float32)
    data = np.concatenate([scale.view(np.uint8), q.view(np.uint8), np.zeros((3, 32), np.uint8)], axis=1)
    np.testing.assert_array_equal(dequantise_blocks(data, BY_NAME["Q8_K"]), q.astype(np.float32) * scale)


def test_many_pieces_equal_one_piece() -> None:
    data = np.tile(random_blocks("Q4_K", 3), (60, 1))
    with ThreadPoolExecutor(2) as pool:
        whole = dequantise_blocks(data, BY_NAME["Q4_K"], pool=pool)
    np.testing.assert_array_equal(whole[:ROWS], whole[-ROWS:])
    np.testing.assert_array_equal(whole[-ROWS:], dequantise_blocks(data[:ROWS], BY_NAME["Q4_K"]))


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_quantises_exactly_as_the_reference(name: str, scale: float) -> None:
    values = (np.random.default_rng(7).standard_normal((33, 320)) * scale).astype(np.float32)
    values[3] = 0.0  # a block of zeros has the scale zero
    values[4, :32] = np.tile([0.5, -0.5], 16)  # ties in the largest magnitude
    ours = quantise(values, name)
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(ours, theirs.view(np.uint8).reshape(ours.shape))


def test_quantising_what_was_dequantised_changes_nothing() -> None:
    values = np.random.default_rng(1).standard_normal((8, 256)).astype(np.float32)
    stored = quantise(values, "Q8_0")
    np.testing.assert_array_equal(quantise(dequantise_blocks(stored, BY_NAME["Q8_0"]), "Q8_0"), stored)


def test_the_sizes_are_the_formats() -> None:
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.value in BY_ID:
            assert (BY_ID[kind.value].name, BY_ID[kind.value].block, BY_ID[kind.value].size) == (kind.name, block, size)


@pytest.mark.parametrize(
    ("values", "name", "message"),
    [
        (np.ones((2, 33), np.float32), "Q4_0", "33 elements"),
        (np.full((1, 32), np.nan, np.float32), "Q8_0", "not finite"),
        (np.full((1, 32), 1e6, np.float32), "F16", "65,504"),
        (np.ones((1, 32), np.float32), "Q6_K", "cannot be written as Q6_K"),
    ],
)
def test_what_cannot_be_written_says_why(values: np.ndarray, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantise(values, name)


def test_an_undecodable_type_names_the_readable_ones() -> None:
    with pytest.raises(InputError, match=r"IQ2_XXS.*Q4_K"):
        dequantise_blocks(np.zeros((1, 66), np.uint8), BY_NAME["IQ2_XXS"])
