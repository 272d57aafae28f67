"""Diffusion transformers (Peebles and Xie 2023, DiT): parameters and the operations of one forward pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from armillary.models.graph.precision import Precision
from armillary.models.graph.published import read_table
from armillary.sim.operation import Kind, Operation

TIMESTEP_WIDTH = 256  # of the sinusoid that a timestep becomes
CLASSES = 1001  # ImageNet's and the null class of classifier-free guidance


@dataclass(frozen=True, slots=True)
class DiT:
    """A class-conditional DiT with adaLN-Zero on a latent of `side` x `side` x `channels`, cut into patches of `patch` x `patch`.

    It predicts noise and variance: twice the channels. The MLP is four times as wide as the model.
    """

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    patch: int
    side: int = 32
    channels: int = 4

    @property
    def tokens(self) -> int:
        return (self.side // self.patch) ** 2


@dataclass(frozen=True, slots=True)
class PublishedDiT:
    """Table 4 of the paper: `giga_macs` is what it calls Gflops, a multiply-add counted once; `parameters` in millions."""

    model: DiT
    giga_macs: float
    millions: int


@functools.cache
def published() -> Mapping[str, PublishedDiT]:
    """By name as in the paper, "dit-xl/2"; one for 512-pixel images ends in "-512"."""
    found = {}
    for family, raw in read_table()["diffusion"].items():
        for patch, side, macs, millions in raw["published"]:
            name = f"{family}/{patch}{'-512' if side == 64 else ''}"
            model = DiT(name, raw["hidden_size"], raw["num_layers"], raw["num_heads"], patch, side)
            found[name] = PublishedDiT(model, macs, millions)
    return found


def parameters(model: DiT) -> int:
    """Trained ones: the table of positions is a fixed sinusoid."""
    d, pixels = model.hidden_size, model.patch**2
    conditioning = (TIMESTEP_WIDTH + 1) * d + (d + 1) * d + CLASSES * d
    block = 12 * d * d + 9 * d + 6 * d * (d + 1)
    final = 2 * d * (d + 1) + (d + 1) * 2 * model.channels * pixels
    return (model.channels * pixels + 1) * d + conditioning + model.num_layers * block + final


def operations(model: DiT, images: int = 1, precision: Precision | None = None) -> list[Operation]:
    """One forward pass over a batch of images on one device (with guidance: twice the images)."""
    return list(_operations(model, images, precision or Precision()))


def _operations(model: DiT, images: int, precision: Precision) -> Iterator[Operation]:
    d, layers, tokens = model.hidden_size, model.num_layers, images * model.tokens
    stored = precision.activation_bytes

    def gemm(name: str, m: int, n: int, k: int, repeat: int = 1) -> Operation:
        weights = precision.weight_bytes(n * k) + stored(n)
        return Operation(name, Kind.GEMM, 2 * m * n * k, weights, 0, stored(m * k), stored(m * n), m, n, k, repeat=repeat)

    def memory(name: str, read: int, written: int, repeat: int = 1) -> Operation:
        return Operation(name, Kind.MEMORY, read_bytes=stored(read), write_bytes=stored(written), m=tokens, repeat=repeat)

    yield gemm("patches", tokens, d, model.channels * model.patch**2)
    yield gemm("timestep_in", images, d, TIMESTEP_WIDTH)
    yield gemm("timestep_out", images, d, d)
    yield gemm("modulation", images, 6 * d, d, layers)
    yield memory("norm", tokens * d, tokens * d, layers)
    yield gemm("qkv", tokens, 3 * d, d, layers)
    pairs = images * model.tokens**2
    width = d // model.num_heads
    yield Operation(
        "attention",
        Kind.ATTENTION,
        4 * pairs * d,
        read_bytes=stored(3 * tokens * d),
        write_bytes=stored(tokens * d),
        m=tokens,
        n=model.num_heads,
        k=width,
        repeat=layers,
    )
    yield gemm("o", tokens, d, d, layers)
    yield memory("add", 2 * tokens * d, tokens * d, layers)
    yield memory("norm", tokens * d, tokens * d, layers)
    yield gemm("up", tokens, 4 * d, d, layers)
    yield memory("activation", 4 * tokens * d, 4 * tokens * d, layers)
    yield gemm("down", tokens, d, 4 * d, layers)
    yield memory("add", 2 * tokens * d, tokens * d, layers)
    yield gemm("final_modulation", images, 2 * d, d)
    yield memory("norm", tokens * d, tokens * d)
    yield gemm("pixels", tokens, 2 * model.channels * model.patch**2, d)
