"""Mixed precision: what fp16 loses without a scale, and the scaler's laws (Micikevicius et al. 2018)."""

import pytest
import torch
from tiny import Repeat, decoder, documents, pack

from armillary.core.errors import ArmillaryError
from armillary.train.optimizers.adamw import AdamW
from armillary.train.parallel.apply import Single
from armillary.train.precision import SMALLEST_SCALE, LossScaler, unscale_
from armillary.train.schedules import Schedule
from armillary.train.trainer import Trainer


def test_an_fp16_sum_of_ones_stops_at_2048():
    total = torch.zeros((), dtype=torch.float16)
    for _ in range(4096):
        total += torch.ones((), dtype=torch.float16)
    assert total == 2048  # swamping: 2048 + 1 has no fp16 of its own
    assert torch.ones(4096, dtype=torch.float16).float().sum() == 4096


def test_a_small_gradient_survives_only_with_a_loss_scale():
    def gradient(scale):
        weight = torch.zeros((), requires_grad=True)
        loss = weight.half() * 2.0**-26
        torch.autograd.backward(loss.float() * scale)
        return weight.grad.item() / scale

    assert gradient(1.0) == 0.0  # 2^-26 is below fp16's smallest, 2^-24
    assert gradient(2.0**10) == 2.0**-26


class Overflow(Single):
    """fp16 whose gradients overflow at the given passes."""

    def __init__(self, model, at):
        super().__init__(model, torch.float16)
        self.at, self.count = at, 0

    def loss_sum(self, *arguments):
        loss = super().loss_sum(*arguments)
        self.count += 1
        return loss * 1e30 if self.count in self.at else loss


def half_precision(at=(), steps=10, **scaler):
    batch = [pack(documents(4))]
    return Trainer(
        Overflow(decoder(), at),
        lambda named: AdamW([p for _, p in named], lr=1e-2),
        Schedule("constant", steps),
        Repeat(batch),
        scaler=LossScaler(**scaler),
    )


def test_a_forced_overflow_leaves_everything_as_it_was_and_halves_the_scale():
    run = half_precision(at={3}, scale=1024.0)
    for _ in range(2):
        assert not run.step(run.batches.batch).skipped
    weights = [p.clone() for p in run.parameters]
    state = {k: [v.clone() for v in run.optimizer.state[p].values()] for k, p in enumerate(run.parameters)}
    result = run.step(run.batches.batch)
    assert (result.skipped, result.loss_scale, run.scaler.scale) == (True, 1024.0, 512.0)
    assert all(torch.equal(a, b) for a, b in zip(weights, run.parameters, strict=True))
    for k, p in enumerate(run.parameters):
        assert all(torch.equal(a, b) for a, b in zip(state[k], run.optimizer.state[p].values(), strict=True))
    assert not run.step(run.batches.batch).skipped
    assert run.progress.step == 4


def test_the_scale_grows_after_the_interval_and_an_overflow_restarts_the_count():
    scaler = LossScaler(scale=8.0, interval=3)
    for overflowed in (False, False, True, False, False, False, False):
        scaler.update(overflowed)
    assert (scaler.scale, scaler.clean_steps) == (8.0, 1)


@pytest.mark.parametrize("saved_at", [0, 1, 2, 3, 5])
def test_the_scalers_state_survives_a_resume(saved_at):
    events = [False, False, False, True, False, False, False, False]
    whole, resumed = LossScaler(scale=64.0, interval=2), LossScaler(scale=64.0, interval=2)
    for index, event in enumerate(events):
        if index == saved_at:
            state = resumed.state_dict()
            resumed = LossScaler(interval=2)
            resumed.load_state_dict(state)
        whole.update(event)
        resumed.update(event)
    assert whole == resumed


def test_the_scaler_is_torchs():
    ours = LossScaler(scale=2.0**8, interval=4)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=4)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for event in [False] * 5 + [True] + [False] * 9 + [True, True] + [False] * 4:
        weight.grad = torch.full((3,), float("inf") if event else 1.0)
        theirs.scale(torch.ones(()))
        theirs.step(optimizer)
        theirs.update()
        ours.update(event)
        assert ours.scale == theirs.get_scale()


def test_unscaling_says_whether_all_is_finite():
    a, b = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    a.grad, b.grad = torch.full((4,), 8.0), torch.full((4,), 2.0)
    assert unscale_([a, b], 4.0)
    assert (a.grad[0], b.grad[0]) == (2.0, 0.5)
    b.grad[2] = float("nan")
    assert not unscale_([a, b], 4.0)


def test_one_rank_with_an_overflow_makes_all_skip():
    run = half_precision()
    run.parallel.any_rank = lambda flag: True  # another rank says so
    before = [p.clone() for p in run.parameters]
    assert run.step(run.batches.batch).skipped
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))


def test_overflows_without_end_are_an_error():
    run = half_precision(at=range(100), scale=4 * SMALLEST_SCALE)
    with pytest.raises(ArmillaryError, match=r"step 3: fp16 gradients overflow even with a loss scale"):
        run.run()


@pytest.mark.parametrize(("dtype", "scaler", "near"), [(torch.bfloat16, None, 0.02), (torch.float16, LossScaler(), 0.005)])
def test_half_precision_follows_the_fp32_curve_on_fp32_masters(dtype, scaler, near):
    curves = []
    for compute in (None, dtype):
        batch = [pack(documents(8))]
        run = Trainer(
            Single(decoder(), compute),
            lambda named: AdamW([p for _, p in named], lr=3e-3),
            Schedule("constant", 30),
            Repeat(batch),
            scaler=scaler if compute else None,
        )
        curves.append([run.step(batch).loss for _ in range(30)])
        assert {p.dtype for p in run.parameters} == {torch.float32} == {p.grad.dtype for p in run.parameters}
    assert curves[0][-1] < curves[0][0] - 0.5
    for exact, half in zip(*curves, strict=True):
        assert half == pytest.approx(exact, abs=near * exact)
