"""The step's laws: one denominator, whatever the cut; what stops a run; what a checkpoint is given."""

import pytest
import torch
from tiny import decoder, documents, pack, trainer

from armillary.core.errors import ArmillaryError
from armillary.kernels.attention import CausalAttend
from armillary.train.microbatch import IGNORED
from armillary.train.trainer import Hooks


@pytest.mark.parametrize("cut", [[8], [4, 4], [1] * 8, [1, 7], [5, 2, 1]])
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradients(cut):
    docs = documents()
    whole = trainer([pack(docs)], clip_norm=None)
    reference = whole.step([pack(docs)])
    parts, start = [], 0
    for size in cut:
        parts.append(pack(docs[start : start + size]))
        start += size
    other = trainer(parts, clip_norm=None)
    result = other.step(parts)
    assert (result.scored, result.tokens, result.attended) == (reference.scored, reference.tokens, reference.attended)
    assert result.loss == pytest.approx(reference.loss, abs=2e-6)
    for a, b in zip(whole.parameters, other.parameters, strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=2e-6, rtol=0)


def test_the_loss_is_the_mean_over_scored_targets():
    docs = documents()
    model = decoder()
    total = torch.zeros(())
    for ids, targets in docs:
        logits = model(ids, torch.arange(len(ids)), CausalAttend([len(ids)]))
        total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    expected = total / sum(int((targets != IGNORED).sum()) for _, targets in docs)
    assert trainer([pack(docs)], model).step([pack(docs)]).loss == pytest.approx(expected.item(), abs=2e-6)


def test_a_batch_without_targets_changes_nothing_but_decay():
    docs = [(ids, torch.full_like(targets, IGNORED)) for ids, targets in documents(2)]
    result = trainer([pack(docs)]).step([pack(docs)])
    assert (result.loss, result.gradient_norm, result.scored) == (0.0, 0.0, 0)


def test_saved_before_evaluated_and_at_the_end():
    happened = []

    class Log:
        def save(self, step, state):
            happened.append(("save", step, sorted(state)))

        def failed(self):
            return False

        def leaving(self):
            pytest.fail("no error ended it")

        def wait(self):
            happened.append(("wait",))

    hooks = Hooks(evaluate=lambda step: happened.append(("evaluate", step)), evaluate_every=2, save_every=3)
    run = trainer([pack(documents(2))], steps=5, checkpoints=Log(), hooks=hooks)
    run.run()
    pieces = ["batches", "optimizer", "parallel", "progress", "rng"]
    assert happened == [
        ("save", 2, pieces),
        ("evaluate", 2),
        ("save", 3, pieces),
        ("save", 4, pieces),
        ("evaluate", 4),
        ("save", 5, pieces),
        ("wait",),
    ]


def test_a_stop_saves_and_ends_after_the_step():
    saved = []

    class Log:
        def save(self, step, state):
            saved.append(step)

        def failed(self):
            return False

        def leaving(self):
            pytest.fail("no error ended it")

        def wait(self):
            pass

    run = trainer([pack(documents(2))], steps=50, checkpoints=Log(), hooks=Hooks(stop=lambda: run.progress.step == 3))
    run.run()
    assert (saved, run.progress.step) == ([3], 3)


def test_the_clip_is_torchs():
    docs = documents()
    mine, theirs = trainer([pack(docs)], clip_norm=0.1), trainer([pack(docs)], clip_norm=None)
    result = mine.step([pack(docs)])
    theirs.step([pack(docs)])
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters, 0.1)
    assert result.gradient_norm == pytest.approx(norm.item(), rel=1e-6)
    for a, b in zip(mine.parameters, theirs.parameters, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=0, rtol=1e-6)


def test_weights_that_are_no_numbers_are_named_with_the_step():
    run = trainer([pack(documents(2))])
    run.step(run.batches.batch)
    with torch.no_grad():
        run.parallel.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ArmillaryError, match=r"step 2: the loss is nan.*layers\.1\.mlp\.down_proj\.weight and 0 others"):
        run.step(run.batches.batch)


def test_weights_that_have_grown_and_activations_that_overflow_are_told_apart():
    for size, compute, told in ((1e38, None, r"weights have grown out of bounds"), (300.0, torch.float16, "activations overflow")):
        run = trainer([pack(documents(2))])
        run.parallel.compute_dtype = compute
        with torch.no_grad():
            for weight in run.parallel.model.layers[1].mlp.parameters():
                weight.fill_(size)
        before = [p.clone() for p in run.parameters]
        with pytest.raises(ArmillaryError, match=f"step 1: .*{told}"):
            run.step(run.batches.batch)
        assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))  # nothing was updated
