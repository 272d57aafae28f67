"""The forward pass of a model that does not fit the accelerator: FlexGen's zig-zag schedule, carried out with two lanes that move bytes.

One iteration of the engine is one pass of the block (`serve.offload.schedule`): its sequences are cut into batches, which pass each layer
one after another while the weights of the next are loaded. Everything above it stays as it is: block tables, prefix cache, preemption.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from armillary.core.clock import Clock, RealClock
from armillary.core.errors import InputError
from armillary.core.trace import Trace
from armillary.kernels.low_rank import Layer
from armillary.kernels.paged_attention import PagedAttend
from armillary.models.decoder import Angles, Decoder
from armillary.models.stored import DecoderWeights, Weights
from armillary.serve.executors.forward import FlatBatch, Logits
from armillary.serve.executors.torch_adapters import Adapted, TorchAdapter
from armillary.serve.offload.arena import Arena, aligned, as_floats
from armillary.serve.offload.batches import Batch, cut
from armillary.serve.offload.cache import RoundedAttend, TieredCache, WindowMap
from armillary.serve.offload.disk import on_disk
from armillary.serve.offload.layout import Bounds, Layout, layout
from armillary.serve.offload.policy import OffloadPolicy, Tier
from armillary.serve.offload.schedule import BlockSchedule, Move, Unit, zigzag
from armillary.serve.offload.weights import TieredWeights

Moved = tuple[Literal["weights", "cache", "hidden", "input"], Literal["load", "store"], Tier]


class OffloadForward:
    """`Forward` with weights, KV cache and activations on three tiers.

    `memory`: bytes of the accelerator, which this process keeps to by its own books (default: what the policy needs). `folder` is for
    the disk tier's files. `moved` counts bytes by what moved, which way, and the tier at the other end (what is compressed is expanded from its
    home, the arena's too); the logits are bit for bit those of the same batches with everything in the arena. Raises CapacityError when the policy needs more than `memory`.
    """

    own_threads = False

    def __init__(
        self,
        source: Decoder | Weights,
        policy: OffloadPolicy,
        bounds: Bounds,
        *,
        folder: Path,
        memory: int | None = None,
        release: bool = False,
        trace: Trace | None = None,
        clock: Clock | None = None,
    ) -> None:
        weights = DecoderWeights(source) if isinstance(source, Decoder) else source
        config = self.config = weights.config
        begin = time.perf_counter()
        self.layout: Layout = layout(config, policy, bounds)
        self.arena = Arena(self.layout.total if memory is None else memory)
        self.layout.check(self.arena.capacity)
        self.arena.reserve(dict(self.layout.parts)["workspace"], "workspace")
        self.weights = TieredWeights(weights, self.layout, self.arena, folder, release=release)
        self.cache = TieredCache(config, self.layout, bounds.num_blocks, bounds.block_size, self.arena, folder)
        self._shape = (self.layout.batch_tokens, config.hidden_size)
        self._resident = [self._activations() for _ in range(self.layout.resident_hidden)]
        self._ring = [self._activations() for _ in range(2)]
        self._homes: dict[tuple[int, Tier], Tensor] = {}
        self._folder = folder
        self._views = [self.weights.views(buffer) for buffer in self.weights.buffers if buffer.nbytes]
        for index, home in enumerate(self.weights.homes[: config.num_layers]):
            if not self.layout.weights_away[index]:
                self.weights.bind(index, self.weights.views(home))
        self.name = "torch (offloaded)"
        self.prepared = (
            f"{policy} percent in the accelerator, RAM and on disk, {self.arena.used / 1e6:,.0f} MB of the accelerator, "
            f"in {time.perf_counter() - begin:.2f} s"
        )
        self.weight_bytes = self.weights.nbytes
        self.cache_bytes = self.cache.nbytes
        self.moved: Counter[Moved] = Counter()
        self._lanes = {name: ThreadPoolExecutor(1, f"offload-{name}") for name in ("weights", "state")}
        self._buffer_of: dict[int, int] = {}  # of weights that were asked for
        self._weight_turn = 0
        self._asked: dict[Move, Future[None]] = {}
        self._warm = False
        self._adapted: Adapted | None = None  # since the first adapter
        self._trace, self._clock = trace, clock if clock is not None else RealClock()

    def logits(self, batch: FlatBatch) -> Logits:
        at = self.layout
        batches = cut(
            batch.spans,
            batch.rows,
            sequences=at.batch_sequences,
            tokens=at.batch_tokens,
            blocks=at.window_blocks if self.cache.windows else self.cache.num_blocks,
            block_size=self.cache.block_size,
        )
        out = torch.empty(len(batch.rows), self.config.vocab_size)
        run = _Pass(self, batch, batches, out)
        try:
            run.run(zigzag(self._units(batches), run.hidden_away, [one.continues for one in batches], warm=self._warm, ahead=True))
            self._warm = self.weights.moves
        except BaseException:
            self._settle()
            raise
        cap = self.config.logit_softcap
        return Logits(out if cap is None else torch.tanh(out / cap) * cap)

    def pack_adapter(self, layers: Sequence[Layer]) -> TorchAdapter:
        """Adapters are small, stay where they are, and are not counted among the accelerator's bytes."""
        if self._adapted is None:
            self._adapted = Adapted(self.weights.skeleton)
        return TorchAdapter(layers, self.config, self.weights.table.device)

    def with_layers(self, kept: Sequence[int]) -> OffloadForward:
        """Refused: a draft by some of the layers would load their weights for every token, which drafting is to save."""
        raise InputError(
            "an offloaded model does not draft with its own layers", "speculate with ngram, or a draft model", field="speculate"
        )

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        self.cache.contents.copy(copies)

    def read_blocks(self, blocks: Sequence[int]) -> Tensor:
        return self.cache.contents.read(blocks)

    def write_blocks(self, blocks: Sequence[int], data: Tensor) -> None:
        self.cache.contents.write(blocks, data)

    def _units(self, batches: Sequence[Batch]) -> list[Unit]:
        """The layers, and the pieces of the head for the batches that want logits."""
        every = tuple(range(len(batches)))
        sampled = tuple(index for index, one in enumerate(batches) if one.rows)
        layers, away = self.config.num_layers, self.layout.weights_away
        units = [Unit(index, every, away[index], self.layout.cache_away[index]) for index in range(layers)]
        if sampled:
            units += [Unit(index, sampled, away[index], keeps=False) for index in range(layers, len(away))]
        return units

    def _settle(self) -> None:
        """After an error: whatever still moves ends, and the next pass begins from nothing."""
        for future in self._asked.values():
            future.exception()
        self._asked.clear()
        self._warm = False

    def _activations(self) -> Tensor:
        return as_floats(self.arena.take(4 * self._shape[0] * self._shape[1], "activations"), self._shape)

    def _home(self, batch: int, tier: Tier) -> Tensor:
        """Where a batch's activations are between its steps, [tokens, hidden_size]."""
        home = self._homes.get((batch, tier))
        if home is None:
            size = 4 * self._shape[0] * self._shape[1]
            raw = aligned(size) if tier is Tier.RAM else on_disk(size, self._folder)
            home = self._homes[batch, tier] = as_floats(raw, self._shape)
        return home

    def close(self) -> None:
        """Wait for what still moves, and end the lanes: nothing can be computed any more."""
        for lane in self._lanes.values():
            lane.shutdown()

    def __del__(self) -> None:
        for lane in getattr(self, "_lanes", {}).values():
            lane.shutdown(wait=False)


class _Pass:
    """One pass of the block: what its steps share, and how each move and computation is carried out."""

    def __init__(self, forward: OffloadForward, batch: FlatBatch, batches: Sequence[Batch], out: Tensor) -> None:
        self.forward, self.batches, self.out = forward, batches, out
        config = forward.config
        tiers = forward.layout.policy.hidden.place([1] * len(batches))
        resident = iter(forward._resident)
        self.stays: list[Tensor | None] = []  # activations that never leave the arena
        self.tiers: list[Tier] = []
        for tier in tiers:
            stays = forward._ring[0] if len(batches) == 1 else next(resident, None) if tier is Tier.ARENA else None
            self.stays.append(stays)
            self.tiers.append(Tier.ARENA if stays is not None else tier if tier is not Tier.ARENA else Tier.RAM)
        self.hidden_away = [stays is None for stays in self.stays]
        self.turns = {"cache": 0, "hidden": 0}
        self.buffer: dict[Move, int] = {}
        self.angles: list[tuple[Angles, Angles]] = []
        self.adapters = batch.adapters
        self.maps = [WindowMap(forward.cache, one.spans) for one in batches] if forward.cache.windows else []
        self.attends: dict[tuple[int, int], PagedAttend | RoundedAttend] = {}
        decoder = forward.weights.skeleton
        tokens, positions = (torch.from_numpy(np.array(values, np.int64)) for values in (batch.tokens, batch.positions))
        for index, one in enumerate(batches):
            mine = slice(one.first, one.first + one.count)
            x = functional.embedding(tokens[mine], forward.weights.table)
            if config.embedding_scale != 1.0:
                x = x * config.embedding_scale
            self._place(index)[: one.count].copy_(x)
            if not self.hidden_away[index]:
                forward.moved["input", "load", Tier.RAM] += x.nbytes
            angles = decoder.rope(positions[mine], x.dtype)
            self.angles.append((angles, decoder.local_rope(positions[mine], x.dtype) if decoder.local_rope else angles))

    def run(self, schedule: BlockSchedule) -> None:
        forward = self.forward
        for move in schedule.before:
            self._ask(move)
        for step in schedule.steps:
            for move in step.beside:
                self._ask(move)
            for move in step.needs:
                forward._asked[move].result()
            start = forward._clock.now()
            self._compute(step.unit, step.batch)
            self._note("compute", f"unit {step.unit}", start, step.batch)
        for move in schedule.after:
            self._ask(move)
        for move in list(forward._asked):
            if move.what != "weights":
                forward._asked.pop(move).result()

    def _ask(self, move: Move) -> None:
        """Queue a move on its lane, and say which buffer it is about."""
        forward = self.forward
        if move.what == "weights":
            buffer, forward._weight_turn = forward._weight_turn % 2, forward._weight_turn + 1
            forward._buffer_of[move.unit] = buffer
        elif move.way == "load":
            buffer, self.turns[move.what] = self.turns[move.what] % 2, self.turns[move.what] + 1
            self.buffer[move] = buffer
        else:
            buffer = self.buffer[move._replace(way="load")]
        lane = forward._lanes["weights" if move.what == "weights" else "state"]
        forward._asked[move] = lane.submit(self._carry_out, move, buffer)

    def _carry_out(self, move: Move, buffer: int) -> None:
        forward, start = self.forward, self.forward._clock.now()
        if move.what == "weights":
            tier, size = forward.layout.weight_tiers[move.unit], forward.weights.load(move.unit, buffer)
        elif move.what == "cache":
            tier, where, window = forward.layout.cache_tiers[move.unit], self.maps[move.batch], forward.cache.windows[buffer]
            size = (where.load if move.way == "load" else where.store)(forward.cache, move.unit, window)
        else:
            tier = self.tiers[move.batch]
            rows = self._rows(move.unit, move.batch, after=move.way == "store")
            home, ring = (tensor.numpy()[:rows] for tensor in (self._place(move.batch), forward._ring[buffer]))
            np.copyto(*((ring, home) if move.way == "load" else (home, ring)))
            size = ring.nbytes
        forward.moved[move.what, move.way, tier] += size
        self._note("weights" if move.what == "weights" else "state", f"{move.way} {move.what} {move.unit}", start, move.batch, size)

    def _compute(self, unit: int, index: int) -> None:
        forward, one = self.forward, self.batches[index]
        config, stays = forward.config, self.stays[index]
        x = stays if stays is not None else forward._ring[self.buffer[Move("hidden", "load", unit, index)]]
        x = x[: self._rows(unit, index, after=False)]
        away = forward.layout.weights_away[unit]
        if unit >= config.num_layers:
            first, end = forward.weights.rows_of(unit)
            flat = forward.weights.buffers[forward._buffer_of[unit]] if away else forward.weights.homes[unit]
            self.out[one.wanted, first:end] = functional.linear(x, as_floats(flat, (end - first, config.hidden_size)))
            return
        block = forward.weights.skeleton.layers[unit]
        if away:
            forward.weights.bind(unit, forward._views[forward._buffer_of[unit]])
        if forward._adapted is not None:
            forward._adapted.choose(FlatBatch((), (), one.spans, (), [self.adapters[i] for i in one.whose] if self.adapters else ()))
        full, local = self.angles[index]
        y: Tensor = block(x, full if config.window(unit) is None else local, self._attend(unit, index))
        if unit == config.num_layers - 1:
            y = forward.weights.skeleton.norm(y[one.rows])
        (stays if stays is not None else forward._ring[self.buffer[Move("hidden", "load", unit, index)]])[: len(y)].copy_(y)

    def _attend(self, unit: int, index: int) -> PagedAttend | RoundedAttend:
        """On the layer's own pool where it is in the arena, else on the window that it was loaded into."""
        cache = self.forward.cache
        away = self.forward.layout.cache_away[unit]
        window = self.buffer[Move("cache", "load", unit, index)] if away else -1
        attend = self.attends.get((index, window))
        if attend is None:
            pool, spans = (cache.windows[window], self.maps[index].spans) if away else (cache, tuple(self.batches[index].spans))
            attend = PagedAttend(pool, spans)
            if self.forward.layout.policy.compress:
                attend = RoundedAttend(attend, self.maps[index])
            self.attends[index, window] = attend
        return attend

    def _rows(self, unit: int, index: int, *, after: bool) -> int:
        """How many rows of activations a batch has before (or after) a unit: behind the last layer only those that the head reads."""
        layers = self.forward.config.num_layers
        one = self.batches[index]
        return len(one.rows) if unit >= layers or (after and unit == layers - 1) else one.count

    def _place(self, index: int) -> Tensor:
        """Where a batch's activations are between its steps."""
        stays = self.stays[index]
        return stays if stays is not None else self.forward._home(index, self.tiers[index])

    def _note(self, lane: str, kind: str, start: int, batch: int, size: int = 0) -> None:
        if self.forward._trace is not None:
            self.forward._trace.add(lane, kind, start, self.forward._clock.now(), sizes={"batch": batch, "bytes": size})
