"""All operations of one pipeline stage of a layout, and their totals in closed form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import mul
from typing import Final

from armillary.core.errors import InputError
from armillary.models.graph.architecture import Architecture
from armillary.models.graph.attention import attention, cached_bytes
from armillary.models.graph.batch import Batch, summed, windows_of
from armillary.models.graph.layout import Layout, check
from armillary.models.graph.mlp import mixture, mlp
from armillary.models.graph.precision import Precision
from armillary.models.graph.rows import Device, Row, Terms
from armillary.sim.operation import Axis, Kind, Operation, Totals

FEATURES: Final = (
    "always",
    "any_rows",
    "any_prefill",
    "any_decode",
    "tokens",
    "shard",
    "rows",
    "prefill_tokens",
    "decodes",
    "routed",
    "experts",
)
"""What every count is linear in, and after these `prefill_pairs[i]`, `prefill_keys[i]`, `decode_keys[i]` for the i-th distinct window.

The first four are 0 or 1. `shard`: the most tokens that a tensor rank has of its replica's. `routed`: pairs of a token and one of its
experts that a device computes; `experts`: how many distinct experts they are expected to be.
"""
_COUNTS: Final = ("flops", "weight_bytes", "kv_bytes", "read_bytes", "write_bytes", "message_bytes")


class Work:
    """One device of one pipeline stage: what it holds, and what it does for any batch of its replica.

    `rows` are the operations; a cost model that wants them as arrays takes `coefficients(name)` once and `features(batch)` each time.
    """

    def __init__(self, model: Architecture, layout: Layout | None = None, precision: Precision | None = None, stage: int = 0) -> None:
        layout, precision = layout or Layout(), precision or Precision()
        check(model, layout)
        if not 0 <= stage < layout.pipeline_parallel:
            raise InputError(f"stage {stage} of {layout.pipeline_parallel}", f"choose one from 0 to {layout.pipeline_parallel - 1}")
        self.model, self.layout, self.precision, self.stage = model, layout, precision, stage
        self.windows = windows_of(model)
        spans = (f"{name}[{index}]" for index in range(len(self.windows)) for name in ("prefill_pairs", "prefill_keys", "decode_keys"))
        self.basis = (*FEATURES, *spans)
        self.rows: Sequence[Row] = tuple(_stage(Device(model, layout, precision), stage))
        self._sums = {name: self._vector(*((getattr(row, name), row.repeat) for row in self.rows)) for name in _COUNTS}
        sent = (({row.gate: 1}, row.repeat) for row in self.rows if row.kind in (Kind.COLLECTIVE, Kind.SEND))
        self._messages = self._vector(*sent)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that the device holds."""
        return sum(row.resident * row.repeat for row in self.rows)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that a token of full attention holds in the device's cache: its stage's layers, its tensor rank's part."""
        layers = len(self.layout.layers(self.model.num_layers, self.stage))
        return layers * cached_bytes(Device(self.model, self.layout, self.precision))

    def features(self, batch: Batch) -> tuple[int, ...]:
        """The batch on `basis`."""
        tokens, tensor = batch.tokens, self.layout.tensor_parallel
        shard, routed, experts = -(-tokens // tensor), 0, 0
        if (mixed := self.model.mixture) is not None:
            spread = self.layout.expert_parallel
            routed = tokens * mixed.top_k if spread == 1 else -(-tokens * mixed.top_k // tensor)
            experts = expected_experts(
                mixed.experts, mixed.top_k, tokens if spread == 1 else tokens * spread / tensor, mixed.experts // spread
            )
        gates = (int(tokens > 0), int(batch.rows > 0), int(batch.prefill_tokens > 0), int(batch.decodes > 0))
        spans = [count for span in batch.spans for count in (span.prefill_pairs, span.prefill_keys, span.decode_keys)]
        return (*gates, tokens, shard, batch.rows, batch.prefill_tokens, batch.decodes, routed, experts, *spans)

    def of(self, batch: Batch) -> Totals:
        """The sum of `operations(batch)`, without making them."""
        values = self.features(batch)
        flops, weights, kv, read, write, sent = (sum(map(mul, self._sums[name], values)) for name in _COUNTS)
        return Totals(flops, weights, kv, read, write, sent, sum(map(mul, self._messages, values)))

    def coefficients(self, name: str) -> list[tuple[int, ...]]:
        """For each row, one repetition's `flops`, `weight_bytes`, `kv_bytes`, `read_bytes`, `write_bytes` or `message_bytes` on `basis`."""
        return [self._vector((getattr(row, name), 1)) for row in self.rows]

    def operations(self, batch: Batch) -> list[Operation]:
        """What the device does, in order; what the batch does not need is left out."""
        values = dict(zip(self.basis, self.features(batch), strict=True))
        return [_operation(row, values) for row in self.rows if values[row.gate]]

    def batch(self, sequences: Sequence[tuple[int, int]], rows: int | None = None) -> Batch:
        """The sums of (query, context) pairs under this model's windows: see `batch.summed`."""
        return summed(sequences, self.windows, rows)

    def _vector(self, *terms: tuple[Terms, int]) -> tuple[int, ...]:
        sums = dict.fromkeys(self.basis, 0)
        for coefficients, repeat in terms:
            for feature, coefficient in coefficients.items():
                sums[feature] += coefficient * repeat
        return tuple(sums.values())


def operations(
    model: Architecture,
    sequences: Sequence[tuple[int, int]],
    precision: Precision | None = None,
    layout: Layout | None = None,
    rows: int | None = None,
) -> list[list[Operation]]:
    """For each pipeline stage, what one of its devices does for a batch of (query, context) pairs.

    `query` tokens are computed after `context` cached ones; `rows` logits are wanted, one a sequence unless given. Raises InputError for
    a layout that the model does not allow.
    """
    stages = [Work(model, layout, precision, stage) for stage in range((layout or Layout()).pipeline_parallel)]
    return [work.operations(work.batch(sequences, rows)) for work in stages]


def flops(model: Architecture, sequences: Sequence[tuple[int, int]], rows: int | None = None) -> int:
    """FLOPs of matrix products and attention, attention causal, over all devices: a multiply-add is two."""
    work = Work(model)
    return work.of(work.batch(sequences, rows)).flops


def expected_experts(experts: int, top_k: int, tokens: float, local: int) -> int:
    """How many of a device's `local` experts at least one of the tokens chooses, if all choices are equally likely."""
    missed: float = (1.0 - top_k / experts) ** tokens
    return round(local * (1.0 - missed))


def _operation(row: Row, values: dict[str, int]) -> Operation:
    def count(terms: Terms) -> int:
        return sum(coefficient * values[feature] for feature, coefficient in terms.items())

    rows, matrices = values[row.m] if row.m else 0, row.matrices
    if row.expert:
        matrices = max(1, values["experts"])
        rows = -(-rows // matrices)
    return Operation(
        row.name,
        row.kind,
        flops=count(row.flops),
        weight_bytes=count(row.weight_bytes),
        kv_bytes=count(row.kv_bytes),
        read_bytes=count(row.read_bytes),
        write_bytes=count(row.write_bytes),
        m=rows,
        n=row.n,
        k=row.k,
        matrices=matrices,
        message_bytes=count(row.message_bytes),
        ranks=row.ranks,
        axis=row.axis,
        repeat=row.repeat,
    )


def _stage(device: Device, stage: int) -> Iterator[Row]:
    model, layout = device.model, device.layout
    first, last = stage == 0, stage == layout.pipeline_parallel - 1
    if first:
        yield _embed(device)
        yield from device.reduced()
    # Layers that are the same are written once; so an operation's neighbours in the list are its neighbours in the layer.
    same = Counter((model.window(layer), model.mixed(layer)) for layer in layout.layers(model.num_layers, stage))
    for (window, mixed), count in same.items():
        for row in _layer(device, window, mixed):
            yield replace(row, repeat=count)
    if last:
        yield from _head(device, tied_here=first and model.tie_embeddings)
    else:
        yield device.message("send", model.hidden_size, 2, Axis.PIPELINE, m=device.between)


def _layer(device: Device, window: int | None, mixed: bool) -> Iterator[Row]:
    model, hidden = device.model, device.model.hidden_size
    attend = attention(device, windows_of(model).index(window))
    transform = mixture(device) if mixed else mlp(device)
    spread = mixed and device.layout.expert_parallel > 1
    if model.parallel:
        yield from (device.norm(hidden) for _ in range(model.norms))
        yield from device.gathered()
        yield from (*attend, *transform)
        yield from device.reduced()
        yield device.memory("add", 3 * hidden, hidden, m=device.between)
        return
    yield device.norm(hidden)
    yield from device.gathered()
    yield from attend
    yield from device.reduced()
    yield from _joined(device)
    yield device.norm(hidden)
    if not spread:
        yield from device.gathered()
    yield from transform
    if not spread:
        yield from device.reduced()
    elif device.between == "tokens" and device.layout.tensor_parallel > 1:
        yield device.message("all_gather", hidden, device.layout.tensor_parallel, Axis.TENSOR)
    yield from _joined(device)


def _joined(device: Device) -> Iterator[Row]:
    """A part's output into the residual stream, normed before where the family does so (Gemma 2)."""
    hidden = device.model.hidden_size
    if device.model.norms == 4:
        yield device.norm(hidden)
    yield device.memory("add", 2 * hidden, hidden, m=device.between)


def _embed(device: Device) -> Row:
    """A look-up in a table whose rows are split over tensor ranks, and in one of positions."""
    model, precision = device.model, device.precision
    vocabulary = -(-model.vocab_size // device.layout.tensor_parallel)
    positions = {"tokens": precision.activation_bytes(model.hidden_size)} if model.position_table else {}
    return Row(
        "embed",
        Kind.MEMORY,
        m="tokens",
        weight_bytes={"shard": precision.embedding_bytes(model.hidden_size), **positions},
        write_bytes={"tokens": precision.activation_bytes(model.hidden_size)},
        resident=precision.embedding_bytes(vocabulary * model.hidden_size)
        + precision.activation_bytes(model.position_table * model.hidden_size),
    )


def _head(device: Device, tied_here: bool) -> Iterator[Row]:
    """The last norm and the logits of the wanted rows, split by vocabulary and gathered."""
    model, tensor = device.model, device.layout.tensor_parallel
    vocabulary = -(-model.vocab_size // tensor)
    yield from device.gathered()
    yield device.norm(model.hidden_size, m="rows", gate="any_rows")
    weights = device.precision.embedding_bytes(vocabulary * model.hidden_size)
    head = device.gemm("lm_head", vocabulary, model.hidden_size, m="rows", gate="any_rows")
    yield replace(head, weight_bytes={"any_rows": weights}, resident=0 if tied_here else weights)
    if tensor > 1:
        yield device.message("all_gather", vocabulary * tensor, tensor, Axis.TENSOR, m="rows", gate="any_rows")
