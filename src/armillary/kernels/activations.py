"""The activations of a gated feed-forward layer, by name. Without torch: a config is read before torch is loaded."""

from typing import Final, Literal, get_args

Activation = Literal["silu", "gelu_tanh", "relu"]
ACTIVATIONS: Final[tuple[Activation, ...]] = get_args(Activation)  # in the order of cpu/step.cpp's enum
