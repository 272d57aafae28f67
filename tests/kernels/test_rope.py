import torch

from armillary.kernels.rope import apply_rope, rope_angles

FREQUENCIES = 10_000.0 ** (-torch.arange(0, 8, 2) / 8)


def rotate(x, positions, dtype=torch.float32):
    return apply_rope(x, x, *rope_angles(positions, FREQUENCIES, 1.0, dtype))[0]


def test_is_multiplication_by_a_complex_phase():
    x, positions = torch.randn(5, 3, 8, dtype=torch.float64), torch.tensor([0, 1, 7, 100, 3])
    pairs = torch.complex(x[..., :4], x[..., 4:])
    turned = pairs * torch.polar(torch.ones(5, 1, 4, dtype=torch.float64), positions[:, None, None] * FREQUENCIES.double())
    assert torch.allclose(rotate(x, positions, torch.float64), torch.cat((turned.real, turned.imag), -1), atol=1e-4)


def test_products_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 8)
    products = [(rotate(q, torch.tensor([i + 9])) * rotate(k, torch.tensor([i]))).sum() for i in (0, 1, 50)]
    assert torch.allclose(torch.stack(products), products[0].expand(3), atol=1e-4)


def test_far_positions_keep_their_angle_in_bfloat16():
    cos, _ = rope_angles(torch.tensor([8190, 8191]), FREQUENCIES, 1.0, torch.bfloat16)
    assert cos[0, 0, 0] != cos[1, 0, 0]
