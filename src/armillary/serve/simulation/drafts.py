"""Drafts in virtual time: how many there are and what they cost is the engine's own doing, whether they are right is the workload's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from armillary.core.clock import VirtualClock
from armillary.core.errors import InputError
from armillary.models.graph.architecture import Architecture
from armillary.models.graph.cost import Deployment
from armillary.models.graph.find import find
from armillary.serve.config import EngineConfig
from armillary.serve.executors.virtual import BLANK, Drawn
from armillary.serve.request import Request
from armillary.serve.simulation.acceptance import Acceptance
from armillary.serve.speculation.adaptive import Adaptive
from armillary.serve.speculation.layers import kept_layers
from armillary.sim.batch import Batch
from armillary.sim.costs import CostModel

if TYPE_CHECKING:
    from torch import Tensor

CHUNK: Final = 512  # tokens of known text that a draft model reads at a time (speculation/draft_model.py)


@dataclass(slots=True)
class _Cache:
    """What a draft model's cache holds of a sequence, and how many blocks of its pool that takes."""

    tokens: int = 0
    blocks: int = 0


class VirtualProposer:
    """A `Proposer` that names right tokens where `acceptance` says so and wrong ones elsewhere, and moves `clock` by what drafting takes.

    `cost`: of a draft model, which reads what it has not read and then draws one token of every sequence at a time, with a cache of as
    many blocks as the engine's, as `speculation.draft_model` does; without it drafts cost nothing (n-grams). `drawn` names the tokens that
    are right, as the executor has it.
    """

    def __init__(
        self,
        name: str,
        acceptance: Acceptance,
        clock: VirtualClock,
        *,
        seed: int = 0,
        cost: CostModel | None = None,
        num_blocks: int = 0,
        block_size: int = 16,
        context: int = 1 << 40,
        drawn: Drawn | None = None,
    ) -> None:
        self.name = name
        self._acceptance, self._clock, self._seed, self._drawn = acceptance, clock, seed, drawn
        self._cost, self._free, self._block_size, self._context = cost, num_blocks, block_size, context
        self._caches: dict[str, _Cache] = {}
        self._again: set[str] = set()  # whose last drafts were all right

    def prepare(self, requests: Sequence[Request]) -> None:
        if self._cost is None:
            return
        for request in requests:
            known, cache = request.known, self._cache(request)
            while known - cache.tokens > 2 and self._room(cache, known + 1):
                piece = min(CHUNK, known - 1 - cache.tokens)
                self._clock.advance(self._cost.iteration(Batch(((piece, cache.tokens),))))
                cache.tokens += piece

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[tuple[int, ...]]:
        lengths = [self._length(request, bound) for request, bound in zip(requests, most, strict=True)]
        if self._cost is not None and any(lengths):
            self._draw([(request, length) for request, length in zip(requests, lengths, strict=True) if length])
        return [self._tokens(request, length) for request, length in zip(requests, lengths, strict=True)]

    def laws(self, request: Request) -> tuple[Tensor, ...]:
        return ()

    def forget(self, request: Request) -> None:
        self._again.discard(request.id)
        cache = self._caches.pop(request.id, None)
        if cache is not None:
            self._free += cache.blocks

    def _length(self, request: Request, bound: int) -> int:
        """How many tokens are proposed of `bound`: all or none."""
        if not bound:
            return 0
        if not self._acceptance.proposed(request, self._seed, request.id in self._again):
            self._again.discard(request.id)
            return 0
        if self._cost is None:
            return bound
        known, cache = request.known, self._cache(request)
        fits = known + bound <= self._context and known - cache.tokens <= 2 and self._room(cache, known + bound - 1)
        return bound if fits else 0

    def _draw(self, wanted: Sequence[tuple[Request, int]]) -> None:
        """The draft model's passes: the first reads the one or two tokens that it has not, each later one the token that was just drawn."""
        assert self._cost is not None
        pieces = [(request.known - self._caches[request.id].tokens, self._caches[request.id].tokens) for request, _ in wanted]
        single = [start for count, start in pieces if count == 1]
        several = tuple((count, start) for count, start in pieces if count > 1)
        self._clock.advance(self._cost.iteration(Batch(several, len(single), sum(single), len(wanted))))
        for ahead in range(1, max(length for _, length in wanted)):
            further = [request.known + ahead - 1 for request, length in wanted if length > ahead]
            self._clock.advance(self._cost.iteration(Batch((), len(further), sum(further), len(further))))
        for request, length in wanted:  # the last one is not read, and from the first wrong one on what was read is of no use
            right = next((place for place in range(length - 1) if not self._right(request, place)), length - 1)
            self._caches[request.id].tokens = request.known + right

    def _tokens(self, request: Request, length: int) -> tuple[int, ...]:
        """The right tokens as far as they can be foreseen, then a wrong one and what would follow it."""
        known, tokens, right = request.known, list[int](), True
        for place in range(length):
            position = known + place
            token = self._drawn(request, position) if self._drawn is not None else BLANK
            right = right and self._right(request, place)
            tokens.append(token if right else token + 1)
        if length and right:
            self._again.add(request.id)
        elif length:
            self._again.discard(request.id)
        return tuple(tokens)

    def _right(self, request: Request, place: int) -> bool:
        return self._acceptance.right(request, request.known + place, place, self._seed, request.id in self._again)

    def _cache(self, request: Request) -> _Cache:
        """Cut to what is true of the sequence; its last known token is always read anew."""
        cache = self._caches.setdefault(request.id, _Cache())
        cache.tokens = min(cache.tokens, request.known - 1)
        return cache

    def _room(self, cache: _Cache, length: int) -> bool:
        """Blocks for `length` tokens, if there are."""
        needed = max(0, -(-length // self._block_size) - cache.blocks)
        if needed > self._free:
            return False
        self._free -= needed
        cache.blocks += needed
        return True


def draft_of(deployment: Deployment, config: EngineConfig) -> Deployment | None:
    """What drafts beside `deployment`, laid out over the same devices: another model, or some of its own layers; None where nothing computes drafts.

    Raises InputError or CapacityError for one that cannot be there.
    """
    if config.speculate == "layers":
        return replace(deployment, model=_without_layers(deployment.model, config.draft_layers))
    if config.draft_model is None:
        return None
    draft = find(config.draft_model)
    if draft.vocab_size != deployment.model.vocab_size:
        raise InputError(
            f"the draft model '{draft.name}' has {draft.vocab_size:,} tokens, '{deployment.model.name}' {deployment.model.vocab_size:,}",
            "use a draft model of the same family",
            field="draft_model",
        )
    return replace(deployment, model=draft)


def _without_layers(model: Architecture, share: float) -> Architecture:
    kept = kept_layers(model.num_layers, share)
    mixture = model.mixture and replace(model.mixture, dense_layers=sum(layer < model.mixture.dense_layers for layer in kept))
    windows = tuple(model.windows[layer] for layer in kept) if model.windows else ()
    return replace(model, name=f"{len(kept)} layers of {model.name}", num_layers=len(kept), windows=windows, mixture=mixture)


@dataclass(frozen=True, slots=True)
class Drafting:
    """Who drafts in a simulation: `cost` and `context` of a draft model, None where drafts cost nothing."""

    acceptance: Acceptance
    cost: CostModel | None = None
    context: int = 1 << 40

    def drafter(self, config: EngineConfig, clock: VirtualClock, drawn: Drawn | None = None) -> Adaptive:
        """For an engine of `config`, whose KV pool is settled: as many tokens as pay, as in `speculation.build`."""
        assert config.kv_blocks is not None
        proposer = VirtualProposer(
            config.speculate if self.cost is None else self.cost.name,
            self.acceptance,
            clock,
            seed=config.seed,
            cost=self.cost,
            num_blocks=config.kv_blocks,
            block_size=config.block_size,
            context=self.context,
            drawn=drawn,
        )
        return Adaptive(proposer, config.draft_tokens, clock)
