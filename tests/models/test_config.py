import dataclasses

import pytest

from armillary.core.errors import InputError
from armillary.models.config import ModelConfig

SMOLLM2 = ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, tie_embeddings=True)


def test_smollm2_in_numbers():
    assert SMOLLM2.parameters() == 134_515_008
    assert SMOLLM2.kv_bytes_per_token() == 46_080
    assert SMOLLM2.scale == 1 / 8


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_kv_heads": 2}, "9 query heads cannot share 2"),
        ({"head_dim": 63}, "even"),
        ({"windows": (4, None)}, "2 values for 30 layers"),
    ],
)
def test_a_config_that_is_no_model_is_refused(change, named):
    with pytest.raises(InputError, match=named):
        dataclasses.replace(SMOLLM2, **change)


def test_window_of_a_layer():
    assert SMOLLM2.window(7) is None
    assert dataclasses.replace(SMOLLM2, windows=(None, 8) * 15).window(7) == 8
