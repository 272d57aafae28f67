"""The layer of chosen neurons: in any order the sum over them, and with all of them the dense layer."""

import pytest
import torch
from torch.nn import functional

from armillary.core.errors import InputError
from armillary.kernels.activations import ACTIVATIONS
from armillary.kernels.active_rows import active_rows, reference_active_rows
from armillary.kernels.gated import activate


def weights(neurons, d, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, d, generator=generator) for rows in (tokens, neurons, neurons, neurons)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("neurons", "d", "tokens"), [(7, 16, 1), (65, 80, 3), (200, 192, 1), (33, 24, 2)])
def test_equals_the_dense_layer_with_the_other_neurons_zeroed(activation, neurons, d, tokens):
    x, gate, up, down = weights(neurons, d, tokens)
    x = x / d**0.5
    rows = torch.randperm(neurons, generator=torch.Generator().manual_seed(1))[: neurons // 2]
    kept = torch.zeros(neurons, dtype=torch.float64)
    kept[rows] = 1
    inner = activate(functional.linear(x.double(), gate.double()), activation) * functional.linear(x.double(), up.double()) * kept
    exact = inner @ down.double()
    for found in (active_rows(x, rows, gate, up, down, activation), reference_active_rows(x, rows, gate, up, down, activation)):
        torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1e-4)
    assert torch.equal(active_rows(x, rows[:0], gate, up, down, activation), torch.zeros_like(x))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_neurons_that_a_relu_leaves_at_zero_change_no_bit_and_a_nan_stays():
    x, gate, up, down = weights(64, 32, 1)
    fires = ((x @ gate.T)[0] > 0).nonzero()[:, 0]
    assert torch.equal(active_rows(x, fires, gate, up, down), active_rows(x, torch.arange(64), gate, up, down))
    gate[fires[0], 3] = torch.nan
    assert active_rows(x, fires, gate, up, down).isnan().all()
    with pytest.raises(InputError, match="of 64 neurons"):
        active_rows(x, torch.tensor([64]), gate, up, down)
