"""What the kernels hold is what the file says: blocks go straight where a format takes them, and only those become floats that must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from armillary.core.errors import InputError
from armillary.kernels import cpu_library
from armillary.kernels.cpu_step import StepModel
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.models.gguf.load import GGUFWeights
from armillary.models.gguf.mapping import tensor_names, tensor_shape
from armillary.models.gguf.metadata import config_metadata
from armillary.models.gguf.reader import GGUFFile
from armillary.models.gguf.types import BY_NAME
from armillary.models.gguf.writer import write_file
from armillary.models.stored import DecoderWeights
from armillary.serve.executors.packed_model import LaidOut, format_of, step_model

pytestmark = pytest.mark.skipif(not cpu_library.available(), reason="the native kernels need g++")

CONFIG = ModelConfig("llama", 40, 256, 256, 2, 4, 2, 64, 128)
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}


def stored(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random rows of blocks with scales around 0.01."""
    rng, form = np.random.default_rng(seed), BY_NAME[kind]
    if form.block == 1:
        return (rng.standard_normal((int(np.prod(shape[:-1])), shape[-1])) * 0.1 + 0.3).astype(np.float32).view(np.uint8)
    data = rng.integers(0, 256, (shape[0] * shape[1] // form.block, form.size), dtype=np.uint8)
    for at in HALVES.get(kind, ()):
        data[:, at : at + 2] = (rng.random((len(data), 1)) * 0.01).astype(np.float16).view(np.uint8)
    return data.reshape(shape[0], -1)


def gguf_file(path: Path, kind_of: Callable[[str], str], config: ModelConfig = CONFIG) -> GGUFFile:
    """A model whose matrices are of the types that `kind_of` gives their names."""
    entries = []
    for seed, name in enumerate(tensor_names(config)):
        shape = tensor_shape(config, name)
        kind = kind_of(name) if len(shape) == 2 else "F32"
        entries.append((name, shape, BY_NAME[kind], lambda kind=kind, shape=shape, seed=seed: stored(kind, shape, seed)))
    return GGUFFile.open(write_file(path, config_metadata(config), entries))


class Watched(GGUFWeights):
    """Remembers which matrices became floats."""

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        self.floats: list[str] = []

    def tensor(self, name: str) -> torch.Tensor:
        values = super().tensor(name)
        if values.dim() == 2:
            self.floats.append(name)
        return values


def products(model: StepModel) -> list[torch.Tensor]:
    return [model.head.unpack(), *(w.unpack() for layer in model.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down))]


def expected(decoder: Decoder) -> list[torch.Tensor]:
    """The same from the decoder; the tiles of gate and up alternate."""
    found = [decoder.lm_head.weight]
    for layer in decoder.layers:
        qkv, gate_up = layer.self_attn.qkv, layer.mlp.gate_up
        gate, up = (getattr(gate_up, name).weight.view(-1, 16, CONFIG.hidden_size) for name in ("gate_proj", "up_proj"))
        found += [torch.cat([getattr(qkv, f"{name}_proj").weight for name in "qkv"]), layer.self_attn.o_proj.weight]
        found += [torch.stack([gate, up], 1).view(-1, CONFIG.hidden_size), layer.mlp.down_proj.weight]
    return [weight.detach() for weight in found]


@pytest.mark.parametrize(
    ("kind", "quantisation", "error"),
    [("Q4_0", "int4", 0.0), ("Q4_1", "int4", 0.0), ("Q4_K", "int4", 1e-2), ("Q8_0", "int8", 0.0), ("Q4_0", "int8", 0.0)],
)
def test_a_file_of_one_type_never_becomes_floats(tmp_path: Path, kind: str, quantisation: str, error: float) -> None:
    weights = Watched(gguf_file(tmp_path / "m.gguf", lambda name: kind))
    model = step_model(weights.config, LaidOut(weights, quantisation))
    assert weights.floats == ["model.embed_tokens.weight"]
    for ours, exact in zip(products(model), expected(weights.decoder()), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=error)
    torch.testing.assert_close(model.embedding, weights.decoder().embed_tokens.weight, rtol=0, atol=0)


def test_a_mixed_file_becomes_floats_only_where_it_must(tmp_path: Path) -> None:
    """As Q4_K_M files are: v and down of some layers, and the head, of another type."""

    def kind(name: str) -> str:
        other = name in ("blk.0.attn_v.weight", "blk.1.ffn_down.weight", "output.weight")
        return "Q6_K" if other else "Q8_0" if name == "blk.1.attn_k.weight" else "Q4_K"

    weights = Watched(gguf_file(tmp_path / "m.gguf", kind))
    model = step_model(weights.config, LaidOut(weights, "int4"))
    layers = "model.layers"
    assert sorted(weights.floats) == sorted(
        ["model.embed_tokens.weight", "lm_head.weight", f"{layers}.0.self_attn.v_proj.weight", f"{layers}.1.self_attn.k_proj.weight",
         f"{layers}.1.mlp.down_proj.weight"]
    )  # fmt: skip
    for ours, exact in zip(products(model), expected(weights.decoder()), strict=True):
        assert float((ours - exact).abs().max()) <= float(exact.abs().max()) / 15


@pytest.mark.parametrize("quantisation", ["none", "fp16", "int8", "int4"])
def test_a_file_and_its_decoder_give_the_same_weights(tmp_path: Path, quantisation: str) -> None:
    """F32 tensors take the same way whether they lie in a file or in a decoder."""
    weights = GGUFWeights(gguf_file(tmp_path / "m.gguf", lambda name: "F32"))
    ours = products(step_model(CONFIG, LaidOut(weights, quantisation)))
    theirs = products(step_model(CONFIG, LaidOut(DecoderWeights(weights.decoder()), quantisation)))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_a_damaged_scale_is_refused_at_load(tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "m.gguf", lambda name: "Q4_0")
    at = file.tensors["blk.1.ffn_up.weight"].offset
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    content[at : at + 2] = np.float16(np.nan).tobytes()
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: .*NaN or infinite"):
        step_model(CONFIG, LaidOut(GGUFWeights(GGUFFile.open(tmp_path / "bad.gguf")), "int4"))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_a_norm_that_is_no_number_is_refused_at_load(name: str) -> None:
    decoder = Decoder(CONFIG)
    with torch.no_grad():
        decoder.get_parameter(name.removeprefix("model."))[3] = torch.inf
    with pytest.raises(InputError, match=rf"{name} has NaN or infinite values"):
        step_model(CONFIG, LaidOut(DecoderWeights(decoder), "none"))


def test_a_type_that_nobody_reads_is_refused_before_any_is_read(tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "m.gguf", lambda name: "IQ2_XXS" if "ffn_up" in name else "Q4_0")
    with pytest.raises(InputError, match=r"blk\.0\.ffn_up\.weight is of type IQ2_XXS"):
        GGUFWeights(file)


def test_the_format_of_a_product_follows_what_is_stored() -> None:
    assert format_of("o", ["Q4_0"], "int4") == "int4"
    assert format_of("qkv", ["Q4_0", "Q4_0", "Q6_K"], "int4") == "int4m"
    assert {format_of("down", [kind], "int4") for kind in ("float", "Q4_1", "Q4_K", "Q8_0")} == {"int4m"}
    assert {format_of("head", [kind], "int4") for kind in ("float", "Q8_0", "Q6_K")} == {"int8"}  # four bits cost the head too much
    assert [format_of("head", [kind], "int4") for kind in ("Q4_0", "Q4_1", "Q4_K")] == ["int4", "int4m", "int4m"]
    assert [format_of("head", ["Q4_0"], quantisation) for quantisation in ("none", "fp16", "int8")] == ["fp32", "fp16", "int8"]
