"""The bucket plan is the one that torch's DDP makes, and its executor sums what autograd left."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from armillary.train.parallel.curve import FAMILIES, layout_curve, single_curve, small_decoder
from armillary.train.parallel.ddp import BucketedAllReduce, BucketPlan, bucket_plan
from armillary.train.parallel.launch import spawn
from armillary.train.parallel.layout import Layout
from armillary.train.parallel.local_tensor import by_rank, local_ranks, rank_values
from armillary.train.parallel.volume import ddp_bytes
from armillary.train.parallel.wire import WireCounter

MIB = 1 << 20


def test_a_bucket_closes_with_the_parameter_that_fills_it_and_the_first_is_small():
    plan = BucketPlan.of([(size * MIB, torch.float32) for size in (10, 20, 1, 26, 3)], [4, 3, 2, 1, 0])
    assert [bucket.parameters for bucket in plan.buckets] == [(4,), (3,), (2, 1, 0)]
    assert [bucket.launch_after for bucket in plan.buckets] == [4, 3, 0]
    assert [bucket.bytes // MIB for bucket in plan.buckets] == [3, 26, 31]


def test_dtypes_do_not_share_a_bucket():
    plan = BucketPlan.of([(8, torch.float32), (4, torch.bfloat16), (8, torch.float32)], [2, 1, 0])
    assert [bucket.parameters for bucket in plan.buckets] == [(2, 0), (1,)]


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("sizes", [[3, 5, 7, 11, 2, 13, 1], [300, 1, 1, 1, 600, 200, 100], [1000] * 9])
@pytest.mark.parametrize("caps", [(1000, 10_000), (4000, 4096), (10**9, 10**9), (1, 1)])
def test_the_plan_is_that_of_torch_ddp(sizes, caps, monkeypatch):
    """After its first iteration DDP orders buckets by when gradients came: of a chain, last layer first."""
    first, cap = caps
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", first)
    widths = [size for pair in itertools.pairwise(sizes) for size in pair]
    chain = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in zip(widths[::2], widths[1::2], strict=True)])
    wrapped = DistributedDataParallel(chain, bucket_cap_mb=cap / MIB)
    seen = []

    def record(_, bucket):
        seen.append(tuple(id(parameter) for parameter in bucket.parameters()))
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    wrapped.register_comm_hook(None, record)
    for _ in range(2):
        seen.clear()
        wrapped(torch.randn(2, sizes[0])).sum().backward()
    parameters = list(chain.parameters())
    plan = bucket_plan(parameters, first, cap)
    assert [sorted(bucket) for bucket in seen] == [sorted(id(parameters[i]) for i in bucket.parameters) for bucket in plan.buckets]


def test_the_executor_sums_over_ranks_and_sends_the_formulas_bytes():
    ranks = 4
    with local_ranks(ranks) as mode:
        weights = [nn.Parameter(by_rank(mode, lambda _, n=n: torch.ones(n))) for n in (3, 5, 7)]
        unused = nn.Parameter(by_rank(mode, lambda _: torch.ones(2)))
        frozen = nn.Parameter(by_rank(mode, lambda _: torch.ones(4)), requires_grad=False)
        plan = BucketPlan.of([(4 * n, torch.float32) for n in (3, 5, 7, 2)], [3, 2, 1, 0], first=20, cap=32)
        buckets = BucketedAllReduce([*weights, unused, frozen], dist.group.WORLD, plan)
        data = by_rank(mode, lambda rank: torch.tensor(float(rank + 1)))
        with WireCounter() as wire:
            for last in (False, True):  # two micro-batches, one exchange
                with buckets.around_backward(last):
                    sum((weight * data).sum() for weight in weights).backward()
        for weight in weights:
            for gradient in rank_values(weight.grad):
                assert torch.equal(gradient, torch.full_like(gradient, 2.0 * (1 + 2 + 3 + 4)))
        assert all(not value.any() for value in rank_values(unused.grad))
        assert frozen.grad is None
        assert wire.sent == ddp_bytes(4 * (3 + 5 + 7 + 2), ranks)


def count_ddp(rank):
    """Bytes that two ranks' real DDP sends for one step's gradients (the count of bytes is a rank's own)."""
    from armillary.train.parallel.curve import global_batch
    from armillary.train.parallel.parallelize import parallelize

    config = FAMILIES["llama"]
    parallel = parallelize(small_decoder(config), Layout(dp_replicate=2))
    batch = global_batch(0, config.vocab_size, 2)[rank]
    for _ in range(3):  # the second also broadcasts the order in which DDP rebuilds its buckets
        with WireCounter() as wire, parallel.sync_gradients(True):
            parallel.loss_sum(batch.tokens, batch.positions, batch.targets, batch.attend).backward()
    bits = layout_curve(Layout(dp_replicate=2), config, microbatches=2)
    return wire.sent, bits


@pytest.mark.slow
def test_two_real_ranks_of_torch_ddp_send_the_formulas_bytes_and_keep_the_bits():
    sent, curve = spawn(2, count_ddp)[0]
    config = FAMILIES["llama"]
    assert sent == ddp_bytes(4 * config.parameters(), 2)
    assert curve.same_bits(single_curve(config, microbatches=2))  # a + b = b + a: the order of reduction is fixed
