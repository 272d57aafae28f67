"""FSDP2 as it is applied here: what it sends, and what a rank holds between forward and backward."""

import pytest
from torch.distributed.fsdp import FSDPModule

from armillary.train.parallel.curve import FAMILIES, global_batch, small_decoder
from armillary.train.parallel.launch import spawn
from armillary.train.parallel.layout import Layout
from armillary.train.parallel.parallelize import parallelize
from armillary.train.parallel.volume import zero_elements
from armillary.train.parallel.wire import WireCounter

CONFIG = FAMILIES["llama"]  # every size is even: two ranks pad nothing


def gathered(model):
    """Elements of the parameters that this rank holds whole."""
    return sum(p.numel() for p in model.parameters() if not hasattr(p, "device_mesh"))


def both_stages(rank):
    return {stage: one_step(rank, stage) for stage in (2, 3)}


def one_step(rank, zero_stage):
    parallel = parallelize(small_decoder(CONFIG), Layout(dp_shard=2, zero_stage=zero_stage))
    batch = global_batch(0, CONFIG.vocab_size, 2)[rank]
    with WireCounter() as wire, parallel.sync_gradients(True):
        loss = parallel.loss_sum(batch.tokens, batch.positions, batch.targets, batch.attend)
        between = gathered(parallel.model)
        loss.backward()
    assert all(isinstance(block, FSDPModule) for block in parallel.model.layers)
    return wire.by_operation(), wire.sent, between, gathered(parallel.model)


@pytest.mark.slow
def test_bytes_on_the_wire_and_parameters_between_the_passes():
    """ZeRO-3 sends 3 elements a parameter, less the root's second gather: it is used first in backward, so it stays. ZeRO-2 sends 2."""
    everything = CONFIG.parameters()
    root = 2 * CONFIG.vocab_size * CONFIG.hidden_size + CONFIG.hidden_size
    blocks = everything - root
    for zero_stage, (operations, sent, between, after) in spawn(2, both_stages)[0].items():
        again = blocks if zero_stage == 3 else 0
        assert operations == {"all_gather": 4 * (everything + again), "reduce_scatter": 4 * everything}
        assert sent == 4 * (zero_elements(everything, 2, 2) + again / 2)
        assert between == (root if zero_stage == 3 else everything)
        assert after == 0
