import math

import pytest
import torch

from armillary.core.errors import InputError
from armillary.models.config import RopeConfig
from armillary.models.rope import Rope, attention_scaling, inverse_frequencies

PLAIN = 10_000.0 ** (-torch.arange(0, 64, 2) / 64)


def wavelengths(frequencies):
    return 2 * math.pi / frequencies


def test_default_is_a_geometric_series():
    torch.testing.assert_close(inverse_frequencies(RopeConfig(), 64), PLAIN)


def test_linear_divides_positions():
    linear, plain = Rope(RopeConfig(kind="linear", factor=4.0), 64), Rope(RopeConfig(), 64)
    torch.testing.assert_close(linear(torch.tensor([8, 400]), torch.float32)[0], plain(torch.tensor([2, 100]), torch.float32)[0])


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    scaled = inverse_frequencies(RopeConfig(kind="llama3", factor=8.0, original_context=1024), 64)
    short, long = wavelengths(PLAIN) < 1024 / 4, wavelengths(PLAIN) > 1024
    torch.testing.assert_close(scaled[short], PLAIN[short])
    torch.testing.assert_close(scaled[long], PLAIN[long] / 8)
    between = scaled[~short & ~long] / PLAIN[~short & ~long]
    assert len(between) > 2
    assert ((between > 1 / 8) & (between < 1)).all()
    assert (between.diff() < 0).all()


def test_yarn_keeps_fast_dimensions_and_stretches_slow_ones():
    rope = RopeConfig(kind="yarn", factor=16.0, original_context=2048)
    scaled = inverse_frequencies(rope, 64)
    turns = 2048 / wavelengths(PLAIN)
    torch.testing.assert_close(scaled[turns > 64], PLAIN[turns > 64])
    torch.testing.assert_close(scaled[turns < 0.5], PLAIN[turns < 0.5] / 16)
    assert attention_scaling(rope) == pytest.approx(0.1 * math.log(16) + 1)  # Peng et al. 2023, eq. 22


def test_yarn_temperature_from_mscales_or_given():
    rope = RopeConfig(kind="yarn", factor=16.0, original_context=2048, mscale=0.5, mscale_all_dim=2.0)
    assert attention_scaling(rope) == pytest.approx((0.05 * math.log(16) + 1) / (0.2 * math.log(16) + 1))
    assert attention_scaling(RopeConfig(kind="yarn", factor=16.0, original_context=2048, attention_factor=0.7)) == 0.7
    assert attention_scaling(RopeConfig(kind="llama3", factor=16.0, original_context=2048)) == 1.0


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_scaling_without_a_trained_context_is_refused(kind):
    with pytest.raises(InputError, match="original_context"):
        inverse_frequencies(RopeConfig(kind=kind, factor=2.0), 64)


def test_frequencies_do_not_depend_on_a_default_device():
    with torch.device("meta"):
        frequencies = inverse_frequencies(RopeConfig(), 64)
    torch.testing.assert_close(frequencies, PLAIN)
