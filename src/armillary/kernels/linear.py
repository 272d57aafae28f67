"""Linear layers that read the same input: named apart for training and files, one call for the block that uses them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class FusedLinear(nn.Module):
    """Several projections of one input, e.g. q, k and v. `forward(x [..., in])` gives one tensor a name, in order.

    Every projection stays its own `nn.Linear` child under its name, so checkpoints, optimisers, LoRA and
    tensor parallelism see it; serving replaces the whole module by one packed product with the same `forward`.
    """

    def __init__(self, names: Sequence[str], in_features: int, out_features: Sequence[int], bias: bool = False) -> None:
        super().__init__()
        self.names = tuple(names)
        self.in_features = in_features
        self.out_features = tuple(out_features)
        for name, size in zip(self.names, self.out_features, strict=True):
            self.add_module(name, nn.Linear(in_features, size, bias=bias))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._modules[name](x) for name in self.names)  # type: ignore[misc]
