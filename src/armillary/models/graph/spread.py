"""A decoder's weights, tokens and cache over a mesh of chips, and every collective that a batch takes (Pope et al., MLSys 2023, sections 3.2 and 3.3).

Exact where `partition` has the paper's limit of many chips: a collective over k of them carries (k - 1) / k of its tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from armillary.core.errors import InputError
from armillary.models.graph.architecture import Architecture
from armillary.models.graph.parameters import kv_elements

Attention = Literal["heads", "batch"]
"""By what the cache is split."""
Axis = Literal["hidden", "inner", "gathered"]


@dataclass(frozen=True, slots=True)
class Spread:
    """Over `hidden` x `inner` x `gathered` chips: weights are split by the model's width over `hidden` of them and by heads and the MLP's width
    over `inner`, and gathered over `gathered`, which split the sequences instead. The first two hold each sequence's cache by `attention`."""

    hidden: int
    inner: int
    gathered: int = 1
    attention: Attention = "heads"

    @property
    def chips(self) -> int:
        return self.hidden * self.inner * self.gathered

    @property
    def name(self) -> str:
        if self.gathered > 1:
            return f"weight-gathered over {self.gathered}"
        return "1D weight-stationary" if self.hidden == 1 else f"2D weight-stationary, {self.hidden} x {self.inner}"


@dataclass(frozen=True, slots=True)
class Collective:
    """`repeat` times along `axes` of a spread, among `ranks` chips, of a tensor of so many `elements`, sized as `sim.collectives` has it; of weights, or of
    activations."""

    name: str
    elements: float
    axes: tuple[Axis, ...]
    ranks: int
    repeat: int
    weights: bool = False


def padded(model: Architecture, spread: Spread) -> int:
    """Query heads, padded to a multiple of the chips where these share them."""
    split = spread.hidden * spread.inner if spread.attention == "heads" else 1
    return -(-model.num_heads // split) * split


def collectives(model: Architecture, spread: Spread, tokens: int, rows: int) -> Iterator[Collective]:
    """What a chip takes part in for a batch of `tokens`, of which `rows` want logits. Attention and MLP that read the same input gather it once."""
    check(model)
    hidden, inner = model.hidden_size, model.intermediate_size
    queries = padded(model, spread) * model.head_dim
    keys, layers, group = kv_elements(model), model.num_layers, spread.hidden * spread.inner
    mine = tokens / spread.gathered
    attention, mlp = (queries + keys, queries), ((2 if model.gated else 1) * inner, inner)
    halves = [(attention[0] + mlp[0], attention[1] + mlp[1])] if model.parallel else [attention, mlp]
    for up, down in halves:
        yield Collective("all_gather", hidden * (up + down) / group, ("gathered",), spread.gathered, layers, weights=True)
        yield Collective("all_gather", mine * hidden / spread.hidden, ("inner",), spread.inner, layers)
        yield Collective("reduce_scatter", mine * up / spread.inner, ("hidden",), spread.hidden, layers)
        yield Collective("all_gather", mine * down / spread.inner, ("hidden",), spread.hidden, layers)
        yield Collective("reduce_scatter", mine * hidden / spread.hidden, ("inner",), spread.inner, layers)
    if spread.attention == "batch":
        yield Collective("all_to_all", mine * (queries + keys) / group, ("hidden", "inner"), group, layers)
        yield Collective("all_to_all", mine * queries / group, ("hidden", "inner"), group, layers)
    elif model.num_kv_heads < group:  # every chip needs the head that its queries read
        yield Collective(
            "all_gather",
            mine * keys / max(1, model.num_kv_heads),
            ("hidden", "inner"),
            group // max(1, model.num_kv_heads),
            layers,
        )
    yield Collective("all_gather", rows * model.vocab_size, ("hidden", "inner", "gathered"), spread.chips, 1)


def cached_elements(model: Architecture, spread: Spread, sequences: int) -> int:
    """Elements of the cache that a token of every sequence takes on the fullest chip, all layers."""
    mine = -(-sequences // spread.gathered)
    group = spread.hidden * spread.inner
    if spread.attention == "batch":
        return model.num_layers * kv_elements(model) * -(-mine // group)
    return model.num_layers * 2 * model.head_dim * -(-model.num_kv_heads // group) * mine


def check(model: Architecture) -> None:
    """Raises InputError for what no partition here describes."""
    if model.mixture is not None or model.latent is not None:
        what = "a mixture of experts" if model.mixture is not None else "attention over latents"
        raise InputError(
            f"{model.name} has {what}, and these partitions are of dense decoders with grouped queries",
            "plan it with `armillary plan serve`, or choose a dense model",
            field="model",
        )
