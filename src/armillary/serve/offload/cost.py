"""What a policy costs: FlexGen's model of a layer's time and of each tier's peak memory, as its authors shipped and fitted it.

Every quantity is affine in the nine fractions of a policy, and is kept so: the same rows price a policy and are the constraints of the
linear program. The shipped model differs from the paper's formula T = max(...): the same link is used by two of its terms one after another.

    Tpre = max(ctog + dtoc, gtoc + ctod, compute)          a layer, all prompts
    Tgen = ctog + max(gtoc, dtoc, ctod, compute)           a layer, one token of each sequence
    T    = l (Tpre + (n - 1) Tgen)

Compressed, weights and cache take 5 bits a number instead of 16 (compress.py) wherever they lie and whenever they move. A cache in 4 bits is not
attended to by the CPU, as in FlexGen: it moves, and attention is the accelerator's. What is expanded there is in fp16.

Source: Sheng et al., "FlexGen" (ICML 2023), section 4.3 and appendix A.1, and the project's experimental/cost_model.py (constants and maxima).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from armillary.core.errors import InputError
from armillary.core.units import GIB
from armillary.serve.offload.compress import BITS
from armillary.serve.offload.policy import Split

FRACTIONS: Final = ("wg", "wc", "wd", "cg", "cc", "cd", "hg", "hc", "hd")
Row = np.ndarray
"""[10] float64: a constant, then the coefficients of FRACTIONS."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Memory in bytes, bandwidths in B/s, rates in FLOP/s; `_p` in prefill, `_g` in generation. The defaults are FlexGen's fit of a T4."""

    arena: float = 15 * GIB
    ram: float = 204 * GIB
    disk: float = 1500 * GIB
    margin: float = 0.8  # share of each that a plan may fill
    ram_to_arena: float = 12.89 * GIB
    arena_to_ram_cache: float = 0.97 * GIB
    arena_to_ram_hidden: float = 4.82 * GIB
    disk_to_ram: float = 0.473 * GIB
    ram_to_disk_cache_p: float = 0.746 * GIB
    ram_to_disk_hidden_p: float = 2.015 * GIB
    ram_to_disk_g: float = 2.015 * GIB
    products_p: float = 21.24e12
    products_g: float = 4.3e12
    attention_p: float = 9.97e12
    attention_g: float = 0.079e12
    cpu: float = 0.0123e12  # of attention to keys in RAM; 0 where these move to the arena instead


T4: Final = Hardware()


@dataclass(frozen=True, slots=True)
class Work:
    """A block of `block` sequences in batches of `batch`: prompts of `prompt` tokens, `answer` new ones each, by a decoder of this shape.

    Unless said it is an OPT in fp16: `queries` and `keys` as wide as the model (None), an MLP of two `matrices`, `element` bytes a number.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    prompt: int
    answer: int
    block: int
    batch: int
    compressed: bool = False
    queries: int | None = None
    keys: int | None = None
    matrices: int = 2
    element: int = 2
    head: float = 0.0  # its weights, in layers: what every new token passes too; FlexGen's model leaves it out

    def __post_init__(self) -> None:
        if self.batch < 1 or self.block % self.batch:
            raise InputError(f"a block of {self.block} sequences in batches of {self.batch}", "make it a whole number of batches")

    @property
    def widths(self) -> tuple[int, int]:
        """Of a layer's queries and of its keys."""
        return (self.hidden if self.queries is None else self.queries, self.hidden if self.keys is None else self.keys)

    @property
    def numbers(self) -> int:
        """Weights of a layer: queries and output, keys and values, and the MLP's matrices."""
        q, k = self.widths
        return 2 * self.hidden * (q + k) + self.matrices * self.hidden * self.inner

    @property
    def passes(self) -> float:
        """How many times the time of a token of a layer a block takes, the head priced as so many layers."""
        return (self.layers + self.head) * (self.answer - 1) + self.head

    @property
    def layer_bytes(self) -> int:
        """Weights of a layer as they are computed with."""
        return self.element * self.numbers

    @property
    def kept(self) -> float:
        """What weights and cache take at home, of what they are computed with."""
        return BITS / (8 * self.element) if self.compressed else 1.0


@dataclass(frozen=True, slots=True)
class Price:
    """What a policy costs: seconds of a layer and of the whole block, tokens a second, and bytes of each tier's peak."""

    prefill: float
    generation: float
    total: float
    throughput: float
    peaks: Mapping[str, float]


def row(constant: float = 0.0, **coefficients: float) -> Row:
    found = np.zeros(1 + len(FRACTIONS))
    found[0] = constant
    for name, value in coefficients.items():
        found[1 + FRACTIONS.index(name)] = value
    return found


def prefill_rows(work: Work, hardware: Hardware) -> list[Row]:
    """Seconds of a layer over all prompts: the largest counts."""
    s, h, bls, wi = work.prompt, work.hidden, work.block, work.layer_bytes * work.kept
    (q, k), e = work.widths, work.element
    state, cache = e * s * h * bls, 2 * e * (s + 1) * k * bls * work.kept
    to_arena = row(wc=wi, wd=wi, hc=state, hd=state) / hardware.ram_to_arena
    to_ram = row(cc=cache, cd=cache) / hardware.arena_to_ram_cache + row(hc=state, hd=state) / hardware.arena_to_ram_hidden
    from_disk = row(wd=wi, hd=state) / hardware.disk_to_ram
    to_disk = row(cd=cache) / hardware.ram_to_disk_cache_p + row(hd=state) / hardware.ram_to_disk_hidden_p
    compute = row(2 * bls * s * work.numbers / hardware.products_p + 4 * bls * s**2 * q / hardware.attention_p)
    return [to_arena + from_disk, to_ram + to_disk, compute]


def generation_rows(work: Work, hardware: Hardware) -> list[Row]:
    """Seconds of a layer over one token of every sequence: the largest counts. Keys that are not in the arena are attended to by the CPU,
    where it does that and they are not compressed; else they move."""
    h, bls, wi = work.hidden, work.block, work.layer_bytes * work.kept
    (q, k), e, length = work.widths, work.element, work.prompt + work.answer / 2
    state, attended = e * h * bls, 4 * bls * length * q
    cached, new = 2 * e * bls * length * k * work.kept, 2 * e * bls * k * work.kept
    to_arena = row(wc=wi, wd=wi, hc=state, hd=state) / hardware.ram_to_arena
    to_ram = row(hc=state, hd=state) / hardware.arena_to_ram_hidden
    from_disk = row(cd=cached, hd=state) / hardware.disk_to_ram + row(wd=wi) / (0.95 * hardware.disk_to_ram)
    to_disk = row(cd=new, hd=state) / hardware.ram_to_disk_g
    products = row(2 * bls * work.numbers / hardware.products_g)
    if _moves(work, hardware):
        to_arena += row(cc=cached, cd=cached) / hardware.ram_to_arena
        to_ram += row(cc=new, cd=new) / hardware.arena_to_ram_cache
        attention = row(attended / hardware.attention_g)
    else:
        on_cpu = attended / (hardware.cpu * _cpu_share(work))
        attention = row(cg=attended / hardware.attention_g, cc=on_cpu, cd=on_cpu)
    return [to_arena + other for other in (to_ram, from_disk, to_disk, products + attention)]


def peak_rows(work: Work, hardware: Hardware) -> dict[str, tuple[Row, float]]:
    """Bytes at the peak of each tier and phase, and what they may be: what lives there, and buffers of what passes through."""
    s, n, layers, h, h2, heads = work.prompt, work.answer, work.layers, work.hidden, work.inner, work.heads
    bls, gbs, full, kept = work.block, work.batch, work.layer_bytes, work.kept
    k, e = work.widths[1], work.element
    wi, whole = full * kept, s + n
    stored = wi * (layers + work.head)
    cache, window = 2 * e * whole * k * bls * layers * kept, 2 * e * gbs * whole * k
    # What is compressed passes through buffers of whole numbers from the arena too; else a buffer is spared for what lives there.
    passing, moving = float(not work.compressed), float(_moves(work, hardware))
    arena, ram, disk = (hardware.margin * size for size in (hardware.arena, hardware.ram, hardware.disk))
    inside_p = gbs * e * (9 * s * h + heads * s**2 + s * h2)
    attending = gbs * e * (2 * h + heads * whole) + 2 * window
    arena_p = row(
        inside_p + 2 * full + e * s * h * gbs + moving * 2 * window,
        wg=stored - 2 * passing * wi,
        hg=e * s * h * bls - e * s * h * gbs,
        cg=cache,
    )
    arena_g = row(
        gbs * e * (7 * h + h2) + 2 * full + e * h * gbs + moving * attending,
        wg=stored - 2 * passing * wi,
        hg=e * h * bls - e * h * gbs,
        cg=cache + (1 - moving) * attending,
    )
    ram_p = row(wi + e * s * h * gbs, wg=-wi, hg=-e * s * h * gbs, wc=stored, hc=e * s * h * bls, cc=2 * e * s * k * bls * layers * kept)
    ram_g = row(
        e * heads * whole * gbs + e * h * gbs,
        wc=stored,
        hc=e * h * bls,
        cc=cache,
        wd=wi,
        hd=2 * e * h * gbs,
        cd=4 * e * whole * k * gbs * kept,
    )
    on_disk = row(wd=stored, hd=e * s * h * bls, cd=cache)
    return {
        "arena, prefill": (arena_p, arena),
        "arena, generation": (arena_g, arena),
        "RAM, prefill": (ram_p, ram),
        "RAM, generation": (ram_g, ram),
        "disk": (on_disk, disk),
    }


def price(work: Work, weights: Split, cache: Split, hidden: Split, hardware: Hardware = T4) -> Price:
    """What the model says of a policy. Peaks may exceed the hardware: see `peak_rows`."""
    at = np.array([1.0, *weights.shares, *cache.shares, *hidden.shares])
    prefill = max(float(one @ at) for one in prefill_rows(work, hardware))
    generation = max(float(one @ at) for one in generation_rows(work, hardware))
    total = work.layers * prefill + work.passes * generation
    peaks = {name: float(used @ at) for name, (used, _) in peak_rows(work, hardware).items()}
    return Price(prefill, generation, total, work.block * work.answer / total, peaks)


def _moves(work: Work, hardware: Hardware) -> bool:
    """Whether keys that live elsewhere come to the arena to be attended to."""
    return work.compressed or hardware.cpu == 0


def _cpu_share(work: Work) -> float:
    """FlexGen's fit of how the CPU's attention slows down for small batches and narrow models."""
    a, b = max(0.0, math.log2(64 / work.batch)), max(0.0, math.log2(4096 / work.hidden))
    return max(0.1, 1 + 0.0168 * a * b - 0.0328 * a - 0.0621 * b)
