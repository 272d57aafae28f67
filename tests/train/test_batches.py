"""Rows to micro-batches: nothing scored is lost, nothing else is computed."""

import copy
import itertools

import numpy as np
import pytest
import torch
from tiny import decoder, trainer

from armillary.core.errors import InputError
from armillary.data.batches import BatchStream
from armillary.train.batches import RowBatches, rows_of_a_rank
from armillary.train.config import BatchConfig
from armillary.train.evaluate import evaluate
from armillary.train.microbatch import IGNORED, MicroBatch, from_rows
from armillary.train.parallel.apply import Single
from armillary.train.parallel.layout import Layout
from armillary.train.parallel.parallelize import parallelize
from armillary.train.parallel.rank_threads import run_ranks


class Documents:
    """A `Source` of random documents in memory."""

    tokenizer, fingerprint, vocab_size = "t", "f", 61

    def __init__(self, count=40, seed=0):
        generator = np.random.default_rng(seed)
        self.ids = [generator.integers(0, 61, generator.integers(2, 40)).astype(np.uint16) for _ in range(count)]
        self.lengths = np.array([len(ids) for ids in self.ids])

    def order(self, seed, epoch, shuffle=True):
        return np.random.default_rng([seed, epoch]).permutation(len(self.ids)) if shuffle else np.arange(len(self.ids))

    def document(self, index, begin=0, end=None):
        return self.ids[index][begin:end]

    def scored(self, index, begin=0, end=None):
        return None


@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_flat_micro_batches_hold_every_scored_target_and_no_padding(packing):
    batches = RowBatches(Documents(), BatchConfig(rows=8, micro_rows=2, length=48), packing=packing)
    twin = RowBatches(Documents(), BatchConfig(rows=8, micro_rows=8, length=48), packing=packing)
    for _ in range(5):
        parts, rows = next(batches), next(twin.stream)
        assert len(parts) == 4
        assert sum(part.scored for part in parts) == rows.scored
        for part in parts:
            ends = torch.tensor(part.lengths).cumsum(0)
            for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
                assert part.positions[start:end].tolist() == list(range(end - start))
                assert bool((part.targets[start:end] != IGNORED).any())


def test_the_padding_that_is_left_out_changed_nothing():
    rows = next(RowBatches(Documents(), BatchConfig(rows=6, micro_rows=6, length=48), packing="documents").stream)
    part = from_rows(rows.tokens, rows.targets, rows.positions)
    assert len(part.tokens) < rows.tokens.numel()
    model = decoder()
    total = 0.0
    for line in range(6):  # each row alone, padding and all
        starts = [*(rows.positions[line] == 0).nonzero().flatten().tolist(), 48]
        lengths = tuple(b - a for a, b in itertools.pairwise(starts))
        whole = MicroBatch(rows.tokens[line], rows.targets[line], rows.positions[line], lengths)
        total += Single(model).loss_sum(whole.tokens, whole.positions, whole.targets, whole.attend).item()
    assert Single(model).loss_sum(part.tokens, part.positions, part.targets, part.attend).item() == pytest.approx(total, rel=1e-6)


def test_rows_that_score_nothing_still_make_a_micro_batch():
    part = from_rows(torch.zeros(2, 4, dtype=torch.int64), torch.full((2, 4), IGNORED), torch.arange(4).expand(2, 4))
    assert (part.lengths, part.scored) == ((4,), 0)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_read_what_one_reads(world):
    batch = BatchConfig(rows=8, micro_rows=2, length=32)
    one = RowBatches(Documents(), batch)
    ranks = [RowBatches(Documents(), batch, rank=rank, world=world) for rank in range(world)]
    for _ in range(3):
        whole = torch.cat([part.tokens for part in next(one)])
        assert torch.equal(whole, torch.cat([part.tokens for rank in ranks for part in next(rank)]))


def test_sizes_that_do_not_divide_are_named():
    with pytest.raises(InputError, match=r"batch.rows = 9 does not divide among 2"):
        rows_of_a_rank(BatchConfig(rows=9, micro_rows=3), 2)
    with pytest.raises(InputError, match=r"12 rows a rank .* no multiple of batch.micro_rows = 5"):
        rows_of_a_rank(BatchConfig(rows=24, micro_rows=5), 2)


def test_training_learns_and_evaluation_is_the_plain_mean():
    source, model = Documents(4), decoder()
    before = evaluate(Single(model), source, rows=4, length=48, batches=1000)
    total, count = 0.0, 0
    for row in BatchStream(source, rows=1, length=48, epochs=1, shuffle=False):
        part = from_rows(row.tokens, row.targets, row.positions)
        logits = model(part.tokens, part.positions, part.attend)
        total += torch.nn.functional.cross_entropy(logits, part.targets, ignore_index=IGNORED, reduction="sum").item()
        count += part.scored
    # Rows cut documents at other places when shuffled, so the loss is near, not equal; the number of targets is the same.
    assert (before.tokens, before.loss) == (count, pytest.approx(total / count, rel=0.02))
    assert before.perplexity == pytest.approx(61, rel=0.3)  # a model that knows nothing
    run = trainer([], model, steps=30)
    run.batches = RowBatches(source, BatchConfig(rows=4, micro_rows=2, length=48))
    run.run()
    assert evaluate(run.parallel, source, rows=4, length=48, batches=1000).loss < before.loss - 1


@pytest.mark.parametrize("rows", [2, 4, 6])
def test_an_evaluation_reads_the_same_rows_on_any_number_of_ranks(rows):
    """Also where the rows do not divide among the ranks, and where there are fewer rows than ranks."""

    model = decoder()

    def work(_):
        parallel = parallelize(copy.deepcopy(model), Layout(dp_replicate=3), replicas="buckets")
        return evaluate(parallel, Documents(), rows=rows, length=32, batches=4)

    one = evaluate(Single(model), Documents(), rows=rows, length=32, batches=4)
    for result in run_ranks(3, work):
        assert (result.tokens, result.loss) == (one.tokens, pytest.approx(one.loss, rel=1e-6))
