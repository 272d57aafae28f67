"""Which KV blocks each sequence has: shared with those that begin alike, taken, and given back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain

from armillary.core.errors import ArmillaryError
from armillary.serve.block_pool import BlockPool
from armillary.serve.kv_policies import KVPolicy
from armillary.serve.prefix_cache import PrefixCache
from armillary.serve.request import Request
from armillary.serve.schedule import Hit


class SequenceMemory:
    """The pool, and with `sharing` the prefix cache, behind the block tables of all sequences. To policies it is `schedule.Memory`.

    `kv` says what of a table is still needed, and what of it others may have.
    """

    def __init__(self, total: int, block_size: int, kv: KVPolicy, *, sharing: bool) -> None:
        self._kv = kv
        self.pool = BlockPool(total, block_size, self._forget)
        self._prefixes = PrefixCache(self.pool) if sharing else None
        self._retained: dict[str, Request] = {}
        self._whole = kv.positional  # a table keeps all its blocks

    @property
    def shared(self) -> bool:
        """Whether sequences that begin alike share blocks."""
        return self._prefixes is not None

    def retain(self, request: Request) -> None:
        """An ended sequence keeps its blocks for forks."""
        self._retained[request.id] = request

    def let_go(self, requests: Iterable[Request] | None = None) -> bool:
        """Take the blocks of retained sequences back, by default of all; whether there were any."""
        freed = False
        for request in list(self._retained.values()) if requests is None else requests:
            if self._retained.get(request.id) is request:
                self.release(self._retained.pop(request.id))
                freed = True
        return freed

    def looks_for(self, request: Request) -> bool:
        """Whether a sequence may begin with blocks of others: not where the prompt's own probabilities are wanted, which come from computing it."""
        return self._prefixes is not None and request.sampling.prompt_logprobs is None

    def hit(self, request: Request) -> Hit:
        fork = self._fork(request)
        if fork is not None and not request.output:
            return fork  # nothing is longer
        found = self._prefixes.hit(request) if self._prefixes is not None and self.looks_for(request) else Hit()
        if request.delivered > found.tokens and (fork is None or request.delivered > fork.tokens):
            return Hit(tokens=request.delivered, delivered=True)
        return fork if fork is not None and fork.tokens > found.tokens else found

    def _fork(self, request: Request) -> Hit | None:
        """All of the prompt but its last token, where the parent has computed it: whole blocks are shared, the rest is copied."""
        parent, tokens = request.parent, len(request.prompt) - 1
        if (
            parent is None
            or not self._kv.positional
            or not tokens
            or not parent.blocks
            or parent.computed < tokens
            or request.sampling.prompt_logprobs is not None
        ):
            return None
        whole, rest = divmod(tokens, self.pool.block_size)
        return Hit(tuple(parent.blocks[:whole]), tokens, parent.blocks[whole] if rest else None, forked=True)

    def references(self, block: int) -> int:
        return self.pool.references(block)

    def begin(self, request: Request, start: int) -> Hit:
        """An admitted sequence shares the blocks of its first `start` tokens, which `hit` has found in this iteration."""
        if not start:
            return Hit()
        hit = self.hit(request)
        self.pool.share(hit.blocks)
        request.blocks.extend(hit.blocks)
        request.computed = start
        request.kept = 0 if hit.forked else len(hit.blocks)
        request.delivered = 0  # once: what is lost by preemption is computed again
        return hit

    def grow(self, request: Request, blocks: int) -> None:
        """The sequence owns `blocks` blocks from now on. Those that it needs no longer hold what comes next."""
        table = request.blocks
        if blocks == len(table) and self._whole:
            return
        gone = self._kv.dropped(request.computed) - request.dropped
        if gone > 0:
            stay = self._kv.sink_blocks
            table[:] = [*table[:stay], *table[stay + gone :], *table[stay : stay + gone]]
            request.dropped += gone
        table.extend(self.pool.allocate(blocks - len(table), table[-1] if table else None))

    def keep(self, request: Request) -> None:
        """What `request` has computed is right, and others may use it."""
        if self._prefixes is not None:
            self._prefixes.keep(request, self._kv.shareable(len(request.prompt), request.computed))

    def release(self, request: Request) -> None:
        """The sequence gives its blocks back."""
        blocks = list(request.blocks)
        request.blocks.clear()
        request.dropped = 0
        self.pool.free(blocks)

    def check(self, requests: Iterable[Request]) -> None:
        """Assert the invariants: each block is in as many of the requests' tables, or of retained ones, as it has users."""
        self.pool.check()
        users = Counter(block for request in chain(requests, self._retained.values()) for block in request.blocks)
        for block, count in users.items():
            if self.pool.references(block) != count:
                raise ArmillaryError(f"KV block {block} is in {count} block tables, its users are {self.pool.references(block)}")
        if len(users) != self.pool.used_count:
            raise ArmillaryError(f"{self.pool.used_count} KV blocks are in use, {len(users)} are in block tables")

    def _forget(self, block: int) -> None:
        assert self._prefixes is not None  # without it nothing is kept
        self._prefixes.forget(block)
