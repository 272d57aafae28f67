"""Each optimizer beside an independent one: torch's, transformers', float64, or the paper's lines."""

import pytest
import torch
from torch import nn

from armillary.train.config import OptimizerConfig
from armillary.train.optimizers.adafactor import Adafactor
from armillary.train.optimizers.adamw import AdamW
from armillary.train.optimizers.choose import factory
from armillary.train.optimizers.lion import Lion
from armillary.train.optimizers.muon import Muon, newton_schulz

SHAPES = [(7, 12), (12, 7), (5,), (1, 9)]


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def race(ours, theirs, steps=20):
    """Both take the same gradients, whose size varies by five orders of magnitude; yields the pairs of parameters after each step."""
    generator = torch.Generator().manual_seed(1)
    mine, others = ([p for group in optimizer.param_groups for p in group["params"]] for optimizer in (ours, theirs))
    for step in range(steps):
        for a, b in zip(mine, others, strict=True):
            a.grad = torch.randn(a.shape, generator=generator) * 10.0 ** (step % 6 - 4)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
        yield zip(mine, others, strict=True)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs_bit_for_bit(fused, decay):
    options = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay}
    theirs = torch.optim.AdamW(parameters(), **options, fused=fused, foreach=False)
    for pairs in race(AdamW(parameters(), **options, fused=fused), theirs):
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("scale_parameter", [False, True])
def test_adafactor_is_transformers(beta1, scale_parameter):
    transformers = pytest.importorskip("transformers.optimization", reason="the peer")
    options = {"lr": 1e-2, "beta1": beta1, "scale_parameter": scale_parameter, "weight_decay": 0.1}
    theirs = transformers.Adafactor(parameters(), **options, relative_step=False)
    for pairs in race(Adafactor(parameters(), **options), theirs):
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_lion_is_the_papers_algorithm_2():
    ours, plain = Lion(parameters(), lr=1e-3, weight_decay=0.3), [p.detach().double() for p in parameters()]
    momentum = [torch.zeros_like(p) for p in plain]
    generator = torch.Generator().manual_seed(2)
    mine = ours.param_groups[0]["params"]
    for _ in range(15):
        for index, parameter in enumerate(mine):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradient = parameter.grad.double()
            update = (0.9 * momentum[index] + 0.1 * gradient).sign()
            plain[index] -= 1e-3 * (update + 0.3 * plain[index])
            momentum[index] = 0.99 * momentum[index] + 0.01 * gradient
        ours.step()
    for parameter, expected in zip(mine, plain, strict=True):
        torch.testing.assert_close(parameter.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32), (1, 8)])
def test_newton_schulz_is_the_same_polynomial_in_float64_and_nearly_orthogonal(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    exact, made = newton_schulz(matrix.double()), newton_schulz(matrix)
    torch.testing.assert_close(made.double(), exact, rtol=0, atol=2e-5)
    # Against the decomposition: each singular value went through a x + b x^3 + c x^5 five times, its vectors stayed.
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (s.norm() + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(exact, u @ s.diag() @ v, rtol=0, atol=1e-9)
    assert 0.5 < s.min() <= s.max() < 1.2


def test_muon_takes_steps_of_adamws_size_and_follows_its_formula():
    matrix = nn.Parameter(torch.zeros(64, 128))
    optimizer = Muon([{"params": [matrix]}], lr=1e-2)
    torch.manual_seed(0)
    matrix.grad = torch.randn(64, 128)
    optimizer.step()
    # m = 0.05 g and u = 0.95 m + 0.05 g: the same direction as g, which is all that orthogonalisation keeps.
    torch.testing.assert_close(matrix.detach(), -1e-2 * 0.2 * 128**0.5 * newton_schulz(matrix.grad), rtol=1e-4, atol=1e-6)
    assert matrix.detach().square().mean().sqrt() == pytest.approx(0.2e-2, rel=0.2)


def test_muons_momentum_is_torchs():
    ours = Muon([{"params": parameters()[:2]}], lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.Muon(parameters()[:2], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for pairs in race(ours, theirs):
        for a, b in pairs:  # torch orthogonalises in bfloat16: three digits
            torch.testing.assert_close(a, b, rtol=0, atol=1e-2 * 0.2 * 12**0.5 * 0.03 * 20)
    for a, b in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(ours.state[a]["momentum"], theirs.state[b]["momentum_buffer"], rtol=1e-6, atol=0)


def named():
    return [
        ("embed_tokens.weight", nn.Parameter(torch.ones(9, 4))),
        ("layers.0.mlp.down_proj.weight", nn.Parameter(torch.ones(4, 6))),
        ("norm.weight", nn.Parameter(torch.ones(4))),
        ("frozen", nn.Parameter(torch.ones(4, 4), requires_grad=False)),
    ]


def test_vectors_are_not_decayed_and_frozen_ones_left_out():
    made = factory(OptimizerConfig(name="adamw", lr=1.0, weight_decay=0.25))(named())
    assert [(group["weight_decay"], len(group["params"])) for group in made.param_groups] == [(0.25, 2), (0.0, 1)]


def test_muon_leaves_embeddings_and_vectors_to_adamw():
    made = factory(OptimizerConfig(name="muon", lr=1.0))(named())
    kinds = {(group["algorithm"], tuple(p.shape)) for group in made.param_groups for p in group["params"]}
    assert kinds == {("adamw", (9, 4)), ("muon", (4, 6)), ("adamw", (4,))}


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_a_saved_state_continues_bit_for_bit(name):
    config = OptimizerConfig(name=name, lr=1e-2)
    runs = []
    for interrupted in (False, True):
        model = named()
        optimizer = factory(config)(model)
        generator = torch.Generator().manual_seed(3)
        for step in range(6):
            if interrupted and step == 3:
                state = optimizer.state_dict()
                optimizer = factory(config)(model)
                optimizer.load_state_dict(state)
            for _, parameter in model[:3]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        runs.append(model)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*runs, strict=True))
