"""Tensor parallelism: a vocabulary that is never gathered, the bytes of two all-reduces a layer, and shards that are slices of the whole."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from armillary.train.loss import plain_cross_entropy
from armillary.train.microbatch import IGNORED
from armillary.train.parallel.curve import FAMILIES, global_batch, on_simulated_ranks, small_decoder
from armillary.train.parallel.layout import Layout
from armillary.train.parallel.local_tensor import by_rank, local_ranks, rank_values
from armillary.train.parallel.mesh import build_mesh
from armillary.train.parallel.parallelize import parallelize
from armillary.train.parallel.rank_threads import run_ranks
from armillary.train.parallel.tp import apply_tensor_parallel
from armillary.train.parallel.vocabulary import vocabulary_parallel_cross_entropy
from armillary.train.parallel.volume import tensor_parallel_layer_bytes, vocabulary_parallel_loss_bytes
from armillary.train.parallel.wire import WireCounter

BASE = FAMILIES["llama"]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [4, 1000])
@pytest.mark.parametrize("vocabulary", [12, 13])
def test_the_split_loss_and_its_gradients_are_those_of_the_whole(softcap, chunk, vocabulary):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 6, generator=generator), torch.randn(vocabulary, 6, generator=generator)
    targets = torch.randint(0, vocabulary, (9,), generator=generator)
    targets[[2, 5]] = IGNORED
    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = plain_cross_entropy(*whole, targets, softcap)
    (expected * 0.5).backward()
    ranks, rows = 3, -(-vocabulary // 3)

    def work(rank):
        mine = [hidden.clone().requires_grad_(), weight[rank * rows : (rank + 1) * rows].clone().requires_grad_()]
        loss = vocabulary_parallel_cross_entropy(*mine, targets, rank * rows, dist.group.WORLD, softcap, chunk)
        (loss * 0.5).backward()
        dist.all_reduce(mine[0].grad)
        return loss.detach(), mine[0].grad, mine[1].grad

    results = run_ranks(ranks, work)
    for loss, grad_hidden, _ in results:
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(grad_hidden, whole[0].grad)
    torch.testing.assert_close(torch.cat([grad for _, _, grad in results]), whole[1].grad)


def traffic(layers, tp, sequence_parallel, tokens, vocabulary=BASE.vocab_size):
    """Collectives of one forward and backward of a model with `layers` layers."""
    config = replace(BASE, num_layers=layers, vocab_size=vocabulary)
    decoder, batch = small_decoder(config), global_batch(0, vocabulary, 1, alike=True)[0]
    assert len(batch.tokens) >= tokens
    with local_ranks(tp) as mode:
        parallel = parallelize(on_simulated_ranks(decoder, mode), Layout(tp=tp, sequence_parallel=sequence_parallel))

        def everywhere(tensor):
            return by_rank(mode, lambda _: tensor[:tokens].clone())

        attend = type(batch.attend)((4, tokens - 4))
        with WireCounter() as wire:
            parallel.loss_sum(everywhere(batch.tokens), everywhere(batch.positions), everywhere(batch.targets), attend).backward()
    return wire


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_layer_sends_two_all_reduces_forward_and_two_backward_and_sequence_parallelism_the_same(sequence_parallel):
    tp, tokens = 4, 8
    one, two = (traffic(layers, tp, sequence_parallel, tokens) for layers in (1, 2))
    assert two.sent - one.sent == 2 * tensor_parallel_layer_bytes(tokens, BASE.hidden_size, tp, 4)
    kinds = {"all_gather", "reduce_scatter"} if sequence_parallel else {"all_reduce"}
    extra = {c.operation for c in two.collectives[: len(two.collectives) - len(one.collectives)]}
    assert extra <= kinds | {"all_reduce"}


def test_what_the_vocabulary_sends_does_not_grow_with_it():
    """Embedding: an all-reduce of [T, hidden]. Loss: 12 bytes a token, and hidden's gradient. Never logits [T, vocabulary]."""
    tp, tokens = 4, 8
    ends = {vocabulary: traffic(1, tp, False, tokens, vocabulary).sent for vocabulary in (56, 4000)}
    assert ends[56] == ends[4000]
    layer = 2 * tensor_parallel_layer_bytes(tokens, BASE.hidden_size, tp, 4)
    embedding = head_gradient = tensor_parallel_layer_bytes(tokens, BASE.hidden_size, tp, 4) / 2
    assert ends[56] == layer + embedding + head_gradient + vocabulary_parallel_loss_bytes(tokens, tp)
    wire = traffic(1, tp, False, tokens, 4000)
    assert max(collective.bytes for collective in wire.collectives) == tokens * BASE.hidden_size * 4 < tokens * 4000 * 4


@pytest.mark.parametrize("family", ["everything", "qwen3"])
def test_shards_are_slices_of_the_whole_model_under_its_own_names(family):
    config = replace(FAMILIES[family], vocab_size=53)
    whole = dict(small_decoder(config).named_parameters())
    decoder, tp = small_decoder(config), 4
    with local_ranks(tp) as mode:
        on_simulated_ranks(decoder, mode)
        apply_tensor_parallel(decoder, build_mesh(Layout(tp=tp)).tp, False)
        assert [name for name, _ in decoder.named_parameters()] == list(whole)
        for name, parameter in decoder.named_parameters():
            assert isinstance(parameter, DTensor)
            (placement,) = parameter.placements
            parts = rank_values(parameter.to_local().detach())
            if placement.is_replicate():
                assert all(torch.equal(part, whole[name]) for part in parts)
            else:
                assert torch.equal(torch.cat(parts, dim=placement.dim), whole[name])
        assert (decoder.lm_head.weight is decoder.embed_tokens.weight) == config.tie_embeddings
        # Everything of size is split; only vectors and too few key/value heads are whole.
        replicated = [name for name, parameter in decoder.named_parameters() if parameter.placements[0].is_replicate()]
        kept = ("norm.weight", "o_proj.bias", "down_proj.bias", "k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias")
        assert all(name.endswith(kept) for name in replicated)
