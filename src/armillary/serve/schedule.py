"""The schedule of one iteration, as plain data: who runs how many tokens, who is preempted, who waits, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from armillary.core.values import value
from armillary.serve.request import Request, TokenLogprob

if TYPE_CHECKING:
    from torch import Tensor


class Reason(StrEnum):
    """Why a schedule says what it says. The values are shown to users."""

    DECODE = "decode"  # one new token for a sequence whose cache is complete but for it
    PROMPT = "prompt"  # all that remains of the prompt, in one piece
    CHUNK = "chunk"  # part of the prompt: the token budget ends here
    RECOMPUTE = "recompute"  # rebuilding the cache of a preempted sequence
    NO_BLOCKS = "no free KV blocks"
    NO_BUDGET = "token budget spent"
    NO_TIME = "token budget spent: more would exceed the target of the time between tokens"
    NO_SEAT = "max running sequences reached"
    BATCH_CLOSED = "batch runs to its end before another starts"  # request-level batching
    QUEUE_ORDER = "behind an earlier request"
    BEHIND_SHORTER = "behind a shorter request"
    BEHIND_DEADLINE = "behind a request that is due earlier"
    BEHIND_PRIORITY = "behind a request of a higher priority"
    BEHIND_PREFIX = "behind a request with more of its prompt in the cache"
    MAKE_ROOM = "preempted: an earlier sequence needed its KV blocks"
    CHEAPEST = "preempted: others needed KV blocks, and its own cost the least to compute again"
    LOWEST_CLASS = "preempted: others needed KV blocks, and nobody was of a lower priority"


@value
class Entry:
    """One sequence's share of an iteration: compute `count` tokens from position `start`.

    `sample`: the last known token is among them, so the next one is drawn.
    `blocks`: how many KV blocks the sequence must own before the iteration runs.
    `drafts`: of `count`, how many follow the known tokens: the first of `Request.drafts`. Each that is drawn is accepted, and
    the token after it is drawn too (speculative decoding).
    """

    request_id: str
    start: int
    count: int
    sample: bool
    blocks: int
    reason: Reason
    drafts: int = 0


@value
class Preemption:
    """A running sequence that loses its blocks and goes back to the front of the queue."""

    request_id: str
    reason: Reason
    blocks: int  # free by that: its own, but for those that another sequence shares


@value
class Hold:
    """A sequence that could not run in this iteration, and why."""

    request_id: str
    reason: Reason


@value
class Schedule:
    """One iteration. Entries of running sequences come first, then those admitted, in queue order.

    Applied in the order: preemptions, then block growth, then the entries as one flat batch. Each preemption goes to the
    very front of the queue, so the last admitted is named first. `max_batch_tokens` bounds the entries together; only a
    sequence that runs alone and whole may exceed it (policies without chunked prefill).
    `held` names at most who is next, the front of the queue and running sequences left out, not the whole queue. `overdue`
    names those admitted whom the bound on waiting let go first.
    """

    index: int
    entries: tuple[Entry, ...] = ()
    preempted: tuple[Preemption, ...] = ()
    held: tuple[Hold, ...] = ()
    overdue: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return sum([entry.count for entry in self.entries])


@dataclass(frozen=True, slots=True)
class Limits:
    """What a schedule must respect."""

    block_size: int  # tokens a KV block
    total_blocks: int
    max_batch_tokens: int  # tokens an iteration
    max_running: int  # sequences in flight
    most_blocks: int | None = None  # that a sequence owns, however long it is (kv_policies); None: no such bound

    def blocks_for(self, tokens: int) -> int:
        """KV blocks that hold what a sequence of `tokens` tokens keeps."""
        filled = -(-tokens // self.block_size)
        return filled if self.most_blocks is None else min(filled, self.most_blocks)


@value
class Hit:
    """The beginning of a sequence that has been computed already: whole blocks, in order, and the tokens in them.

    `copied`: a further block that holds the tokens beyond the whole blocks; another sequence goes on writing to it, so it is copied.
    """

    blocks: tuple[int, ...] = ()
    tokens: int = 0
    copied: int | None = None
    forked: bool = False  # from the request's parent, not from the prefix cache
    delivered: bool = False  # by another worker, into blocks of the request's own


class Memory(Protocol):
    """What KV blocks hold, and how many sequences use each."""

    def hit(self, request: Request) -> Hit:
        """What a waiting request may begin with: an entry that admits it starts at `Hit.tokens`, or at 0."""
        ...

    def references(self, block: int) -> int: ...


class NothingShared:
    """The memory of an engine without a prefix cache: every used block is one sequence's."""

    def hit(self, request: Request) -> Hit:
        return Hit()

    def references(self, block: int) -> int:
        return 1


class Room:
    """The free KV blocks while a schedule is being made. A block is given back when its last user gives it back."""

    def __init__(self, state: State) -> None:
        self.free = state.free_blocks
        self._memory = state.memory
        self._given_back: dict[int, int] = {}

    def give_back(self, victim: Request) -> int:
        """`victim` loses its blocks: how many are free by that."""
        freed = 0
        for block in victim.blocks:
            self._given_back[block] = self._given_back.get(block, 0) + 1
            freed += self._left(block) == 0
        self.free += freed
        return freed

    def needed(self, blocks: int, hit: Hit) -> int:
        """Free blocks that a sequence takes which begins with `hit` and then owns `blocks`."""
        return blocks - sum(self._left(block) > 0 for block in hit.blocks)

    def _left(self, block: int) -> int:
        return self._memory.references(block) - self._given_back.get(block, 0)


@value
class State:
    """What a policy sees. `waiting` is in queue order (preempted sequences at the front), `running` in admission order.

    Policies read `Request` and never write it, and know no time but `now` (ns of the engine's clock). `measured` are recent iterations
    as (tokens, ns), oldest first: the last few of each power of two of tokens.
    """

    index: int
    waiting: Sequence[Request]
    running: Sequence[Request]
    free_blocks: int
    limits: Limits
    memory: Memory = NothingShared()
    now: int = 0
    measured: Sequence[tuple[int, int]] = ()


class SchedulerPolicy(Protocol):
    """`core.contract.Policy` for serving: the same state gives the same schedule.

    `returns_together`: a sequence that ends keeps its blocks and its last event until nothing else is running,
    as systems that batch whole requests do. `behind` is what a waiting sequence is told that no schedule names.
    """

    name: str
    returns_together: bool
    behind: Reason

    def step(self, state: State) -> Schedule: ...


@runtime_checkable
class Repeating(Protocol):
    """A policy that knows when it would say the same again, so that a simulation need not ask each time."""

    def repeats(self, state: State, schedule: Schedule) -> bool:
        """Of its `schedule` for `state`, in which everything that runs decodes one token and nothing else happens: whether the next
        ones say the same, each sequence a token further, until a sequence arrives, ends or lacks a KV block."""
        ...


@value
class Plan:
    """A schedule with the block tables that carry it out: what an executor gets.

    `requests[i]` and `block_tables[i]` belong to `schedule.entries[i]`; position p of a sequence lives in
    slot `block_table[p // block_size] * block_size + p % block_size`. `copies` are KV blocks (from, to) to be copied first.
    """

    schedule: Schedule
    requests: tuple[Request, ...]
    block_tables: tuple[Sequence[int], ...]
    copies: tuple[tuple[int, int], ...] = ()


@value
class Outcome:
    """What an iteration produced, by entry index.

    `sampled[i]` are the next tokens of entry i, with their logprobs when asked for: none when it did not sample, otherwise the
    drafts that were accepted and one more; `prompt_logprobs[i]` scores the prompt tokens at positions start+1 .. start+count when asked for.
    `start` and `end` are ns of the executor's clock. `failed` names entries that alone went wrong (NaN logits), and why.
    `pooled` are the last hidden states [hidden] of the prompts that ended and wanted them.
    """

    sampled: tuple[tuple[TokenLogprob, ...], ...]
    prompt_logprobs: tuple[tuple[TokenLogprob, ...], ...]
    start: int
    end: int
    failed: tuple[tuple[int, Exception], ...] = ()
    pooled: tuple[tuple[int, Tensor], ...] = ()
