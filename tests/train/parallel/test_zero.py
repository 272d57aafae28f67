"""ZeRO's partition plan: the bytes that the paper says, and the same numbers to the last bit whatever the stage."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from armillary.train.optimizers.adamw import AdamW
from armillary.train.parallel.apply import TokenLoss
from armillary.train.parallel.curve import FAMILIES, global_batch, on_simulated_ranks, small_decoder
from armillary.train.parallel.layout import Layout
from armillary.train.parallel.local_tensor import by_rank, local_ranks, rank_values
from armillary.train.parallel.mesh import build_mesh
from armillary.train.parallel.rank_threads import run_ranks
from armillary.train.parallel.volume import zero_bytes, zero_elements
from armillary.train.parallel.wire import WireCounter
from armillary.train.parallel.zero import ZeroExecutor

adamw = partial(AdamW, lr=1e-2, fused=False)
RANKS = 3


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_seven_and_a_half_billion_parameters_on_64_ranks_hold_the_papers_bytes(stage):
    """Storages counted on fake tensors between backward and step, where weights, gradients and optimizer state are all there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
    try:
        with FakeTensorMode():
            model = nn.Sequential(*[nn.Linear(10_000, 10_000, bias=False, dtype=torch.bfloat16) for _ in range(75)])
            zero = ZeroExecutor(model, list(model), stage, lambda parts: AdamW(parts), 0, 64)
            inputs = torch.ones(1, 10_000, dtype=torch.bfloat16)
            model(inputs).sum().backward()
            zero.step()  # makes the optimizer's state
            model(inputs).sum().backward()
            assert sum(zero.state_bytes().values()) == zero_bytes(7_500_000_000, 64, stage)
    finally:
        dist.destroy_process_group()


def model(config=FAMILIES["everything"]):
    decoder = small_decoder(config)
    decoder.layers[0].mlp.down_proj.weight.requires_grad_(False)
    decoder.layers[1].input_layernorm.weight.requires_grad_(False)
    return TokenLoss(decoder)


def batches(steps=2):
    return [global_batch(step, 56, RANKS) for step in range(steps)]


def plain_run():
    """One process that adds up the micro-batches in rank order; the frozen stay frozen, the embedding is tied to the head."""
    module = model()
    optimizer = adamw([parameter for parameter in module.parameters() if parameter.requires_grad])
    losses = []
    for batch in batches():
        optimizer.zero_grad()
        parts = [module(part.tokens, part.positions, part.targets, part.attend) for part in batch]
        for part in parts:
            (part / 64).backward()
        optimizer.step()
        losses.append([float(part.detach()) for part in parts])
    return losses, {name: value.detach() for name, value in module.named_parameters()}


def rank_run(stage, rank):
    module = model()
    zero = ZeroExecutor(module, list(module.model.layers), stage, adamw, rank, RANKS)
    losses = []
    for batch in batches():
        part = batch[rank]
        loss = module(part.tokens, part.positions, part.targets, part.attend)
        (loss / 64).backward()
        zero.step()
        losses.append(float(loss.detach()))
    zero.gather_all()
    return losses, {name: value.detach().clone() for name, value in module.named_parameters()}, zero


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_equals_one_process_to_the_last_bit_with_odd_sizes_frozen_and_tied_parameters(stage):
    losses, parameters = plain_run()
    results = run_ranks(RANKS, partial(rank_run, stage))
    for rank, (rank_losses, rank_parameters, zero) in enumerate(results):
        assert rank_losses == [step[rank] for step in losses]
        assert rank_parameters.keys() == parameters.keys()
        assert all(torch.equal(rank_parameters[name], value) for name, value in parameters.items())
        assert zero.units[0][0].elements % RANKS == 0
    padded = sum(flat.elements for unit in results[0][2].units for flat in unit)
    assert padded > sum(value.numel() for value in parameters.values())  # odd sizes: something was padded


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_sends_the_formulas_elements(stage):
    ranks, config = 3, replace(FAMILIES["llama"], num_layers=1)
    decoder = small_decoder(config)
    batch = [global_batch(0, config.vocab_size, ranks, alike=True)[rank] for rank in range(ranks)]
    with local_ranks(ranks) as mode:
        module = TokenLoss(on_simulated_ranks(decoder, mode))
        mesh = build_mesh(Layout(dp_shard=ranks))
        optimizer = partial(torch.optim.AdamW, lr=1e-2, foreach=False)
        zero = ZeroExecutor(module, list(module.model.layers), stage, optimizer, mesh.world.get_local_rank(), ranks)
        tokens, positions, targets = (
            by_rank(mode, lambda rank, name=name: getattr(batch[rank], name).clone()) for name in ("tokens", "positions", "targets")
        )
        with WireCounter() as wire:
            module(tokens, positions, targets, batch[0].attend).backward()
            zero.step()
        padded = sum(flat.elements for unit in zero.units for flat in unit)
    assert wire.sent == 4 * zero_elements(padded, stage, ranks)


def test_a_parameter_that_backward_does_not_reach_counts_as_zero():
    with local_ranks(2) as mode:
        net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        for layer in net:
            layer.weight = nn.Parameter(by_rank(mode, lambda _: torch.eye(2)))
        mesh = build_mesh(Layout(dp_shard=2))
        zero = ZeroExecutor(net, [], 2, partial(torch.optim.SGD, lr=1.0), mesh.world.get_local_rank(), 2)
        functional.linear(by_rank(mode, lambda rank: torch.ones(1, 2) * (rank + 1)), net[0].weight).sum().backward()
        zero.step()
        assert torch.equal(rank_values(net[0].weight)[1], torch.eye(2) - 3)
        assert torch.equal(rank_values(net[1].weight)[1], torch.eye(2))
