"""Efficiently Scaling Transformer Inference (Pope et al., MLSys 2023): how long contexts fit, and which partition moves least."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from armillary.cluster.cluster import cluster
from armillary.core.units import GIB
from armillary.models.graph import partition
from armillary.models.graph.layout import Layout
from armillary.models.graph.precision import Precision
from armillary.models.graph.published import architecture
from armillary.models.graph.spread import Spread
from armillary.models.graph.work import Work
from armillary.plan.partition import Phase, Plan, Problem, mesh
from armillary.reproduce.registry import Experiment, Result, Row, exactly

CHIPS: Final = 64  # TPU v4
CACHE: Final = 0.3 * 32 * GIB  # bytes of a chip: table 1 leaves 30 % of its memory to keys and values
TABLE: Final = {
    ("multihead, heads of 128", 128): 1320,
    ("multihead, heads of 128", 512): 330,
    ("multiquery, split by heads", 128): 660,
    ("multiquery, split by heads", 512): 165,
    ("multiquery, split by batch", 128): 43_000,
    ("multiquery, split by batch", 512): 10_700,
}
"""Table 1's longest contexts by attention and batch."""
MEASURED: Final[tuple[tuple[str, Phase, int, str, Spread, int, float], ...]] = (
    ("prefill of one prompt, int8", "prefill", 1, "int8", Spread(4, 16), 1, 0.29),
    ("64 tokens of 64 sequences, int8", "decode", 64, "int8", Spread(4, 16, 1, "batch"), 64, 1.82),
    ("prefill of 512 prompts, bf16", "prefill", 512, "bf16", Spread(1, 1, 64, "batch"), 1, 85.2),
    ("64 tokens of 512 sequences, bf16", "decode", 512, "bf16", Spread(4, 16, 1, "batch"), 64, 6.0),
)
"""Table 2, PaLM 540B at 2,048 tokens: what, batch, weights, the partition that was used, passes, s."""
_HIDDEN, _INNER, _TOKENS = 32, 128, 8  # of the layer that is computed here, on 16 chips


def longest(attention: str, batch: int) -> float:
    """Tokens of context whose keys and values fit. PaLM 540B's 48 heads are padded to 64, so that 64 chips can share them."""
    if attention.startswith("multihead"):
        model = replace(architecture("palm-540b-multihead"), num_heads=CHIPS, num_kv_heads=CHIPS)
    else:
        model = replace(architecture("palm-540b"), num_heads=CHIPS)
    layout = Layout(tensor_parallel=CHIPS, batch_attention=attention.endswith("batch"))
    return CACHE / Work(model, layout, Precision("bf16", "bf16", "bf16")).kv_bytes_per_token / batch


def first_chips() -> int:
    """The fewest chips on which two dimensions move less than one, for an MLP four times as wide inside."""
    model = architecture("palm-540b")
    sides = model.hidden_size, model.intermediate_size
    return next(n for n in range(2, 1000) if partition.stationary_2d(1, *sides, n) < partition.stationary_1d(1, sides[0]) * (1 - 1e-12))


def crossover() -> int:
    """The fewest tokens of a batch for which PaLM 540B's weights are gathered rather than left where they are, on 64 chips."""
    model, low, high = architecture("palm-540b"), 1, 10_000_000
    while high - low > 1:
        tokens = (low + high) // 2
        name, _ = partition.best(tokens, model.hidden_size, model.intermediate_size, CHIPS)
        low, high = (low, tokens) if name == "weight-gathered" else (tokens, high)
    return high


def planned(weights: str) -> Problem:
    """PaLM 540B on 64 chips, as `armillary plan partition` has it."""
    place = cluster("tpu-v4-cube")
    return Problem(architecture("palm-540b"), place, mesh(place), Precision(weights, "bf16", "bf16"))


def measured() -> Iterator[Row]:
    """The planner's choice and its time beside what was measured."""
    for name, phase, batch, weights, used, passes, paper in MEASURED:
        problem = planned(weights)
        best = problem.ranked(phase, batch, 2048)[0]
        yield Row(
            f"{name}: the paper's partition over the planner's, by the planner", "x", 1.0, "table 2", problem.price(used, phase, batch, 2048).seconds / best.seconds,
            1.0, 1.05, "5 %: gathering over 16 chips or 64 is 2 % apart", after=True,
        )  # fmt: skip
        yield Row(
            f"{name}, 2,048 tokens, on 64 chips", "s", paper, "table 2, measured", best.seconds * passes, 0.4 * paper, paper,
            "at most the paper's: a roofline; at least 0.4 of it", after=True,
        )  # fmt: skip

    def token(weights: str) -> Plan:
        return planned(weights).ranked("decode", 64, 2048)[0]

    saved = (token("bf16").seconds - token("int8").seconds) * 1e3
    yield Row(
        "what int8 weights save of a token of 64 sequences", "ms", 36.9 - 28.5, "section 4.1: 36.9 and 28.5 ms", saved, 0.8 * 8.4, 1.2 * 8.4,
        "20 %: half the weights' bytes at the memory's full bandwidth", after=True,
    )  # fmt: skip


Array = NDArray[np.float64]


@dataclass(slots=True)
class Wire:
    """Collectives over the chips of this process, and how many elements each chip has moved."""

    moved: float = 0.0

    def gather(self, parts: Sequence[Array], axis: int) -> Array:
        """All parts, on every chip."""
        whole = np.concatenate(parts, axis)
        self.moved += whole.size * (len(parts) - 1) / len(parts)
        return whole

    def reduce(self, parts: Sequence[Array], axis: int) -> list[Array]:
        """The sum of the parts, a piece of it on each chip."""
        self.moved += parts[0].size * (len(parts) - 1) / len(parts)
        return np.split(np.sum(parts, axis=0), len(parts), axis)


def one_dimension(x: Array, up: Array, down: Array, chips: int) -> tuple[Array, float]:
    """Weights split by the inner width: every chip has all tokens."""
    wire = Wire()
    parts = [np.tanh(x @ one) @ other for one, other in zip(np.split(up, chips, 1), np.split(down, chips, 0), strict=True)]
    return wire.gather(wire.reduce(parts, 1), 1), wire.moved


def two_dimensions(x: Array, up: Array, down: Array, chips: int, across: int) -> tuple[Array, float]:
    """Weights split by the hidden width over `across` chips and by the inner width over the others; one row and one column of chips are counted,
    for all others do the same."""
    down_by, wire = chips // across, Wire()
    columns = np.split(x, across, 1)
    ups = [np.split(one, down_by, 1) for one in np.split(up, across, 0)]  # [across][down_by]
    inner = []
    for y in range(down_by):
        mesh = wire if y == 0 else Wire()
        pieces = mesh.reduce([columns[i] @ ups[i][y] for i in range(across)], 1)
        inner.append(mesh.gather([np.tanh(piece) for piece in pieces], 1))
    downs = [np.split(one, across, 1) for one in np.split(down, down_by, 0)]  # [down_by][across]
    out = []
    for i in range(across):
        mesh = wire if i == 0 else Wire()
        out.append(mesh.gather(mesh.reduce([inner[y] @ downs[y][i] for y in range(down_by)], 1), 1))
    return np.concatenate(out, 1), wire.moved


def weights_gathered(x: Array, up: Array, down: Array, chips: int, over: int) -> tuple[Array, float]:
    """Each of `over` chips gets the others' weights and has its share of the tokens; those with the same share split the inner width."""
    rest, wire = chips // over, Wire()
    ups, downs = np.split(up, rest, 1), np.split(down, rest, 0)
    for weights in (ups[0], downs[0]):
        wire.gather(np.split(weights, over, 0), 0)
    out = []
    for place, tokens in enumerate(np.split(x, over, 0)):
        mesh = wire if place == 0 else Wire()
        parts = [np.tanh(tokens @ one) @ other for one, other in zip(ups, downs, strict=True)]
        out.append(mesh.gather(mesh.reduce(parts, 1), 1))
    return np.concatenate(out, 0), wire.moved


def carried_out() -> Iterator[Row]:
    """A small layer here, partitioned over 16 chips in this process: the same result, and as many elements as the formula has."""
    generator, chips = np.random.default_rng(0), 16
    x, up, down = (generator.standard_normal(shape) for shape in ((_TOKENS, _HIDDEN), (_HIDDEN, _INNER), (_INNER, _HIDDEN)))
    expected = np.tanh(x @ up) @ down
    exact: dict[str, tuple[Callable[[], tuple[Array, float]], float]] = {
        "1D": (lambda: one_dimension(x, up, down, chips), partition.stationary_1d(_TOKENS, _HIDDEN) * 15 / 16),
        "2D, 2 x 8": (
            lambda: two_dimensions(x, up, down, chips, 2),
            2 * _TOKENS * (_HIDDEN / 2 * 7 / 8 + _INNER / 8 * 1 / 2),
        ),
        "weights gathered over 4": (
            lambda: weights_gathered(x, up, down, chips, 4),
            2 * _HIDDEN * _INNER / 4 * 3 / 4 + 2 * _TOKENS / 4 * _HIDDEN * 3 / 4,
        ),
    }
    for name, (compute, formula) in exact.items():
        result, moved = compute()
        wrong = float(np.abs(result - expected).max() / np.abs(expected).max())
        yield Row(f"{name}, on 16 chips: largest difference of a result", "", 0, "by construction", wrong, 0, 1e-12, "rounding of doubles")
        yield exactly(
            f"{name}: elements moved, counted over the formula with (k - 1) / k", "x", 1, "section 3.2, appendix A", moved / formula
        )


def run() -> Result:
    rows = [
        Row(
            f"longest context of PaLM 540B, {attention}, batch {batch}", "tokens", paper, "table 1", longest(attention, batch),
            0.99 * paper, 1.01 * paper, "1 %: the paper rounds",
        )
        for (attention, batch), paper in TABLE.items()
    ]  # fmt: skip
    ratio = longest("multiquery, split by batch", 512) / longest("multihead, heads of 128", 512)
    rows += [
        Row("contexts of multiquery split by batch, over multihead's", "x", 32, "abstract: 32 times", ratio, 31.5, 32.5, "half a time"),
        exactly("the fewest chips on which two dimensions move less than one", "chips", 17, "section 3.2.2: more than (F / E)^2 = 16", first_chips()),
        Row(
            "tokens of a batch from which gathering weights moves less, on 64 chips", "tokens", 18_432, "closed form: F / 4 for F = 4 E",
            crossover(), 18_432, 18_433, "exact: at that many both move as much",
        ),
        *measured(),
        *carried_out(),
    ]  # fmt: skip
    return Result(tuple(rows))


EXPERIMENT: Final = Experiment(
    name="pope",
    title="Efficiently scaling Transformer inference",
    paper="Pope et al., MLSys 2023",
    claim="contexts 32 times as long with multiquery attention split by batch; partitions chosen by phase; 29 ms a token",
    setup="closed forms on the operation graphs of PaLM 540B over 64 TPU v4, heads padded to 64; its partitions by the planner, a roofline at the "
    "chips' peaks with collectives that wait, beside what was measured; then a small MLP partitioned in the three ways "
    "over 16 chips of this process, every element that crosses between them counted",
    takes="a moment",
    run=run,
)
