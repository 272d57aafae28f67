"""The stream: nothing lost, nothing seen twice, masks true, and one global order on any number of ranks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import fields
from itertools import islice

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from armillary.core.errors import InputError
from armillary.data.batches import IGNORE, Batch, BatchStream, Packing
from armillary.data.mixture import Mixture, Part
from armillary.data.shards import TokenShards

Shards = Callable[..., TokenShards]
LENGTHS = [1, 2, 17, 5, 40, 3, 9, 26, 1, 12]
PACKINGS = pytest.mark.parametrize("packing", ["concat", "documents"])


@pytest.fixture
def shards(make_shards: Shards) -> TokenShards:
    return make_shards(LENGTHS)


def rows(batches: Iterable[Batch]) -> list[tuple[tuple[int, ...], ...]]:
    """Every row of every batch with all its fields, as something that can be compared."""
    return [tuple(tuple(getattr(b, f.name)[r].tolist()) for f in fields(Batch)) for b in batches for r in range(b.tokens.shape[0])]


def one_epoch(shards: TokenShards, packing: Packing, **options: int) -> list[Batch]:
    return list(BatchStream(shards, packing=packing, epochs=1, **{"rows": 3, "length": 8, "seed": 5, **options}))


@PACKINGS
def test_every_pair_of_neighbours_is_scored_exactly_once_an_epoch(shards: TokenShards, packing: Packing) -> None:
    expected = Counter(pair for d in range(shards.documents) for pair in zip(shards.document(d), shards.document(d)[1:], strict=False))
    seen: Counter[tuple[int, int]] = Counter()
    for batch in one_epoch(shards, packing):
        scored = batch.targets != IGNORE
        seen.update(zip(batch.tokens[scored].tolist(), batch.targets[scored].tolist(), strict=True))
    assert seen == expected


@PACKINGS
def test_documents_and_positions_describe_the_segments(shards: TokenShards, packing: Packing) -> None:
    texts = {tuple(shards.document(d).tolist()) for d in range(shards.documents)}
    for batch in one_epoch(shards, packing):
        for line in range(3):
            document, target = batch.documents[line], batch.targets[line]
            assert document[0] == 0
            assert set(document.diff().tolist()) <= {0, 1}
            for number in document.unique():
                here = document == number
                tokens = batch.tokens[line][here].tolist()
                assert batch.positions[line][here].tolist() == list(range(len(tokens)))
                # A scored position's target is the next token of the same document.
                inner = target[here][:-1]
                kept = inner != IGNORE
                assert torch.equal(inner[kept], batch.tokens[line][here][1:][kept])
                if kept.any():  # a stretch of one document, not of two
                    assert any(tuple(tokens) == text[i : i + len(tokens)] for text in texts for i in range(len(text)))


def test_concat_reads_every_token_once_an_epoch(shards: TokenShards) -> None:
    total = sum(LENGTHS)
    stream = BatchStream(shards, rows=1, length=8, seed=5)
    assert stream.rows_in_epoch(0) == -(-total // 8)
    (line,) = one_epoch(shards, "concat", rows=1, length=total)
    expected = Counter(token for d in range(shards.documents) for token in shards.document(d).tolist())
    assert Counter(line.tokens[0].tolist()) == expected
    assert line.documents[0].max() == shards.documents - 1


def test_whole_documents_stay_whole(shards: TokenShards) -> None:
    packed = rows(one_epoch(shards, "documents", length=39))
    inputs = {tuple(shards.document(d)[:-1].tolist()) for d in range(shards.documents) if LENGTHS[d] > 1}
    found = set()
    for tokens, targets, _, documents in packed:
        for number in set(documents):
            segment = tuple(t for t, d, y in zip(tokens, documents, targets, strict=True) if d == number and y != IGNORE)
            found |= {segment} - {()}
    assert found == inputs


@PACKINGS
@given(seed=st.integers(0, 2**63 - 1), world=st.integers(1, 4), local=st.integers(1, 3), length=st.integers(1, 50))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_world_reads_the_same_global_sequence(
    shards: TokenShards, packing: Packing, seed: int, world: int, local: int, length: int
) -> None:
    def stream(rows: int, rank: int, world: int) -> BatchStream:
        return BatchStream(shards, rows=rows, length=length, seed=seed, packing=packing, rank=rank, world=world)

    alone = rows(islice(stream(1, 0, 1), 6 * world * local))
    ranks = [stream(local, rank, world) for rank in range(world)]
    together = [row for step in zip(*(islice(r, 6) for r in ranks), strict=True) for row in rows(step)]
    assert together == alone


@PACKINGS
@given(first=st.integers(1, 4), second=st.integers(1, 4), steps=st.integers(0, 9))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_resumes_at_another_world_where_it_stopped(shards: TokenShards, packing: Packing, first: int, second: int, steps: int) -> None:
    def stream(rank: int, world: int) -> BatchStream:
        return BatchStream(shards, rows=2, length=7, seed=1, packing=packing, rank=rank, world=world)

    whole = rows(islice(stream(0, 1), steps * first + 6 * second))
    before = [stream(rank, first) for rank in range(first)]
    for one in before:
        rows(islice(one, steps))
    states = [json.dumps(one.state_dict()) for one in before]
    assert len(set(states)) == 1  # one global position, whoever saves it
    after = [stream(rank, second) for rank in range(second)]
    for one in after:
        one.load_state_dict(json.loads(states[0]))
    rest = [row for step in zip(*(islice(a, 6) for a in after), strict=True) for row in rows(step)]
    assert rest == whole[2 * steps * first :]


@PACKINGS
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_a_bounded_epoch_gives_every_rank_as_many_batches(shards: TokenShards, packing: Packing, world: int) -> None:
    ranks = [one_epoch(shards, packing, rank=rank, world=world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    blank = (0,) * 8, (IGNORE,) * 8, tuple(range(8)), (0,) * 8
    together = [row for step in zip(*ranks, strict=True) for row in rows(step)]
    count = BatchStream(shards, rows=1, length=8, seed=5, packing=packing).rows_in_epoch(0)
    assert sorted(together[:count]) == sorted(rows(one_epoch(shards, packing, rows=1)))
    assert together[count:] == [blank] * (len(together) - count)


def test_epochs_differ_and_repeat_by_seed(shards: TokenShards) -> None:
    def order(seed: int) -> list[object]:
        stream = BatchStream(shards, rows=1, length=8, seed=seed)
        return rows(islice(stream, 2 * stream.rows_in_epoch(0)))

    half = len(order(1)) // 2
    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1)[:half] != order(1)[half:]
    unshuffled = BatchStream(shards, rows=1, length=117, shuffle=False, epochs=1)
    assert rows(unshuffled)[0][0][:116] == tuple(int(t) for d in range(10) for t in shards.document(d))


def test_flags_decide_which_targets_count(make_shards: Shards) -> None:
    shards = make_shards(LENGTHS, flags=True)
    expected = sum(int(shards.scored(d)[1:].sum()) for d in range(shards.documents))
    batches = one_epoch(shards, "documents")
    assert sum(batch.scored for batch in batches) == expected
    assert all(t % 3 == 0 for batch in batches for t in batch.targets[batch.targets != IGNORE].tolist())


def test_another_sequence_is_not_resumed(shards: TokenShards, make_shards: Shards) -> None:
    state = BatchStream(shards, rows=1, length=8, seed=1).state_dict()
    BatchStream(shards, rows=4, length=8, seed=1, rank=1, world=2).load_state_dict(state)
    other = make_shards([5, 6], name="other")
    for stream, named in (
        (BatchStream(shards, rows=1, length=8, seed=2), "seed 1, not 2"),
        (BatchStream(shards, rows=1, length=9, seed=1), "length 8, not 9"),
        (BatchStream(shards, rows=1, length=8, seed=1, packing="documents"), "packing 'concat', not 'documents'"),
        (BatchStream(other, rows=1, length=8, seed=1), "source "),
    ):
        with pytest.raises(InputError, match=f"belongs to other data: {named}"):
            stream.load_state_dict(state)
    with pytest.raises(InputError, match="row 99 of an epoch of 15"):
        BatchStream(shards, rows=1, length=8, seed=1).load_state_dict(state | {"row": 99})


def test_sizes_out_of_bounds_are_named(shards: TokenShards, make_shards: Shards) -> None:
    with pytest.raises(InputError, match="rows is 0"):
        BatchStream(shards, rows=0, length=8)
    with pytest.raises(InputError, match="rank 2 is outside a world of 2"):
        BatchStream(shards, rows=1, length=8, rank=2, world=2)
    with pytest.raises(InputError, match="packing 'dense' is not known"):
        BatchStream(shards, rows=1, length=8, packing="dense")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="nothing to predict"):
        next(BatchStream(make_shards([1, 1], name="ones"), rows=1, length=8, packing="documents"))


def test_a_mixture_draws_what_it_resolved(make_shards: Shards) -> None:
    long, short = make_shards([20] * 12, name="long"), make_shards([5] * 16, name="short")
    mixture = Mixture([Part("long", long, weight=3), Part("short", short, weight=1)])
    # 240 tokens at three quarters: the epoch has 320, of which short gives 80, all of it.
    assert {name: part["documents"] for name, part in mixture.resolved.items()} == {"long": 12, "short": 16}
    assert [part["share_of_tokens"] for part in mixture.resolved.values()] == [0.75, 0.25]
    half = Mixture([Part("long", long, fraction=0.5), Part("short", short, count=40)])
    assert [part["passes"] for part in half.resolved.values()] == [0.5, 2.5]
    drawn = [half.order(9, epoch) for epoch in range(2)]
    assert all(len(order) == 46 for order in drawn)
    # Two epochs read the half twice: each document once; and forty of sixteen twice: each five times.
    assert Counter(i for order in drawn for i in order.tolist()) == Counter(dict.fromkeys(range(12), 1) | dict.fromkeys(range(12, 28), 5))
    assert half.part_of(11) == "long"
    assert half.document(12).tolist() == short.document(0).tolist()


@PACKINGS
def test_a_mixture_resumes_as_shards_do(make_shards: Shards, packing: Packing) -> None:
    mixture = Mixture([Part("a", make_shards(LENGTHS, name="a"), fraction=0.7), Part("b", make_shards([4, 30, 9], name="b"), count=7)])

    def stream(rows: int, rank: int = 0, world: int = 1) -> BatchStream:
        return BatchStream(mixture, rows=rows, length=6, seed=3, packing=packing, rank=rank, world=world)

    whole = rows(islice(stream(1), 120))
    start = stream(2)
    assert rows(islice(start, 20)) == whole[:40]
    ranks = [stream(2, rank, 4) for rank in range(4)]
    for one in ranks:
        one.load_state_dict(start.state_dict())
    assert [row for step in zip(*(islice(r, 10) for r in ranks), strict=True) for row in rows(step)] == whole[40:]


def test_a_mixture_of_strangers_is_refused(make_shards: Shards, tmp_path: object) -> None:
    a, flagged = make_shards([3], name="a"), make_shards([3], name="b", flags=True)
    with pytest.raises(InputError, match="give one of weight, fraction and count"):
        Mixture([Part("a", a)])
    with pytest.raises(InputError, match="mix chats with chats"):
        Mixture([Part("a", a, count=1), Part("b", flagged, count=1)])
    with pytest.raises(InputError, match="comes to 1,001 of its 1 documents"):
        Mixture([Part("a", a, count=1001)])
    with pytest.raises(InputError, match="names a part twice"):
        Mixture([Part("a", a, count=1), Part("a", a, count=1)])
