"""A packed weight changes the speed of a product, not its value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from armillary.core.errors import InputError
from armillary.kernels import packed_linear
from armillary.kernels.linear import FusedLinear
from armillary.kernels.packed_linear import LIBRARIES, PackedFusedLinear, PackedLinear, choose_library, measure, pack

USABLE = sorted(measure(shape=(32, 16), batches=(1, 4), budget=0.0))


@pytest.mark.parametrize("library", USABLE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (96, 64), (960, 576)])
def test_equals_the_exact_product(library: str, bias: bool, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, offset = torch.randn(shape), torch.randn(shape[0]) if bias else None
    layer = PackedLinear(weight, offset, library)
    assert layer.library == library
    assert layer.nbytes == weight.nbytes
    for batch in (1, 2, 8, 33, 200):  # one packing serves every batch size
        x = torch.randn(batch, shape[1])
        exact = functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
        torch.testing.assert_close(layer(x).double(), exact, atol=2e-6 * shape[1], rtol=0)


@pytest.mark.parametrize("library", USABLE)
def test_strided_rows_and_more_dimensions(library: str) -> None:
    torch.manual_seed(0)
    weight, wide = torch.randn(24, 16), torch.randn(3, 5, 40)
    x = wide[..., 8:24]
    torch.testing.assert_close(PackedLinear(weight, None, library)(x), functional.linear(x, weight), atol=1e-5, rtol=0)


@pytest.mark.parametrize("library", USABLE)
@pytest.mark.parametrize("bias", [False, True])
def test_fused_equals_its_parts(library: str, bias: bool) -> None:
    torch.manual_seed(0)
    parts = FusedLinear(("q", "k", "v"), 48, (48, 16, 16), bias)
    x = torch.randn(9, 48)
    with torch.inference_mode():
        for ours, theirs in zip(PackedFusedLinear(parts, library)(x), parts(x), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_pack_replaces_every_linear_layer_and_frees_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 8)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)])
            self.two = FusedLinear(("a", "b"), 8, (4, 6))
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.table(tokens)
            for block in self.blocks:
                x = block(x)
            return torch.cat([*self.two(x), self.head(x)], -1)

    torch.manual_seed(0)
    model, tokens = Model(), torch.tensor([1, 2, 9])
    with torch.inference_mode():
        before = model(tokens)
        assert pack(model, USABLE[0]) == 4 * (3 * 64 + 80 + 80)
        torch.testing.assert_close(model(tokens), before, atol=1e-6, rtol=0)
    assert [name for name, _ in model.named_parameters()] == ["table.weight"]


def test_choice_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "deeper" / "linear.json", []
    monkeypatch.setattr(packed_linear, "measure", lambda: calls.append(1) or {"torch": [2.0, 2.0], "mkl": [1.0, 1.0], "onednn": [0.9, 9.0]})
    assert [choose_library(path) for _ in range(3)] == ["mkl"] * 3
    assert len(calls) == 1
    assert list(json.loads(path.read_text()).values()) == ["mkl"]
    path.write_text("{ damaged")
    assert choose_library(path) == "mkl"
    assert len(calls) == 2


def test_measurement_leaves_out_what_fails_or_is_inexact(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weight: torch.Tensor, bias: torch.Tensor | None) -> packed_linear.Product:
        raise RuntimeError("not built")

    def rounded(weight: torch.Tensor, bias: torch.Tensor | None) -> packed_linear.Product:
        low = weight.bfloat16().float()
        return lambda x: functional.linear(x, low)

    monkeypatch.setattr(packed_linear, "LIBRARIES", {"torch": LIBRARIES["torch"], "broken": broken, "rounded": rounded})
    assert list(measure(budget=0.0)) == ["torch"]


def test_unknown_library_is_refused() -> None:
    with pytest.raises(InputError, match="no library 'blas'"):
        PackedLinear(torch.zeros(2, 2), library="blas")


def test_other_types_fall_back_to_torch() -> None:
    weight = torch.randn(6, 4).bfloat16()
    layer = PackedLinear(weight, None, USABLE[0])
    assert layer.library == "torch"
    x = torch.randn(3, 4).bfloat16()
    assert torch.equal(layer(x), functional.linear(x, weight))
