"""Linear layers for inference on a CPU: weights laid out once for the library that is fastest on this machine.

`torch.nn.functional.linear` lays its weight out anew at every call. oneDNN and MKL both can keep a weight in their own
layout instead; which of them wins depends on the processor (oneDNN on AMD Zen 5, MKL on an Intel server), so it is measured
once a machine, on one shape at a few batch sizes, and remembered in the user's cache. Arithmetic stays float32: a library
that answers less exactly (a bfloat16 mode, say) is not a candidate.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from armillary.core.errors import InputError
from armillary.core.paths import cache_dir
from armillary.kernels.linear import FusedLinear

Product = Callable[[Tensor], Tensor]
SHAPE = (1536, 576)  # [out, in] that is timed: SmolLM2's MLP, small enough for all of it to take a quarter of a second
BATCHES = (1, 8, 32, 128)  # tokens that are timed: decoding alone and in company, a chunk of a prompt
TOLERANCE = 1e-6  # largest error relative to the largest result; float32 sums of 576 products stay below 3e-7


def _torch(weight: Tensor, bias: Tensor | None) -> Product:
    return lambda x: functional.linear(x, weight, bias)


def _mkl(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, BATCHES[-1])
    # The op asks for the plain weight too, but only for its shape as long as the stated batch size is the real one.
    shape = weight.new_empty(1).expand(weight.shape)
    product = torch.ops.mkl._mkl_linear
    return lambda x: product(x, packed, shape, bias, x.numel() // x.shape[-1])


def _onednn(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)  # one layout serves every batch size
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, packed, bias, "none", [], "")


LIBRARIES: Mapping[str, Callable[[Tensor, Tensor | None], Product]] = {"torch": _torch, "mkl": _mkl, "onednn": _onednn}


class PackedLinear(nn.Module):
    """x @ weight.T + bias with `weight` [out, in] in `library`'s own layout. No gradients, no state_dict.

    Holds no reference to `weight` itself unless the library is "torch"; the layout takes as many bytes.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, library: str | None = None) -> None:
        super().__init__()
        library = choose_library() if library is None else library
        if library not in LIBRARIES:
            raise InputError(f"no library '{library}' for linear layers", f"choose one of {', '.join(LIBRARIES)}")
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            library = "torch"
        self.library = library
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes
        with torch.inference_mode():
            self._product = LIBRARIES[library](weight.detach(), None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]. Runs in inference mode whatever the caller's mode."""
        with torch.inference_mode():
            return self._product(x)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, library={self.library}"


class PackedFusedLinear(nn.Module):
    """A `FusedLinear` as one wide product. Same `forward`; the results are views of one tensor."""

    def __init__(self, parts: FusedLinear, library: str | None = None) -> None:
        super().__init__()
        weights = [parts.get_parameter(f"{name}.weight").detach() for name in parts.names]
        biases = [part.bias.detach() for part in parts.children() if isinstance(part, nn.Linear) and part.bias is not None]
        self.names, self.out_features = parts.names, parts.out_features
        self.product = PackedLinear(torch.cat(weights), torch.cat(biases) if biases else None, library)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = self.product(x).split(self.out_features, -1)
        return parts


def pack(model: nn.Module, library: str | None = None, keep: Sequence[str] = ()) -> int:
    """Replace every `FusedLinear` and `nn.Linear` below `model` in place by its packed form; returns the packed bytes.

    The model then serves but does not train. A weight that nothing else holds is freed as soon as it is packed, so memory
    grows by one weight at most; a tied head keeps the embedding's table beside its packed copy. `keep` names modules left alone.
    """
    library = choose_library() if library is None else library
    total = 0
    for prefix, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            full = f"{prefix}.{name}" if prefix else name
            if full in keep or isinstance(module, FusedLinear):
                continue
            packed: PackedFusedLinear | PackedLinear
            if isinstance(child, FusedLinear):
                packed = PackedFusedLinear(child, library)
                total += packed.product.nbytes
            elif isinstance(child, nn.Linear):
                packed = PackedLinear(child.weight, child.bias, library)
                total += packed.nbytes
            else:
                continue
            setattr(module, name, packed)
    return total


def choose_library(cache: Path | None = None) -> str:
    """The library for this machine, torch build and thread count: from the cache, else measured (about 0.2 s) and kept.

    `cache` is the file to keep it in (default: the user's cache folder); a file that cannot be read or written is done without.
    """
    path = cache_dir() / "linear.json" if cache is None else cache
    key = f"{_processor()} | torch {torch.__version__} | {torch.get_num_threads()} threads"
    known: dict[str, str] = {}
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {str(k): str(v) for k, v in content.items()} if isinstance(content, dict) else {}
    if known.get(key) not in LIBRARIES:
        timings = measure()
        # Each batch size counts alike: the product of times, not their sum, which the largest batch would decide.
        known[key] = min(timings, key=lambda name: torch.tensor(timings[name]).log().sum().item())
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
                json.dump(known, file, indent=1)
            os.replace(file.name, path)
    return known[key]


def measure(shape: tuple[int, int] = SHAPE, batches: Sequence[int] = BATCHES, budget: float = 0.015) -> dict[str, list[float]]:
    """Best time in seconds of each usable library at each batch size; `budget` seconds of trying for each."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    inputs = [torch.randn(batch, shape[1], generator=generator) for batch in batches]
    exact = inputs[-1].double() @ weight.double().T
    timings: dict[str, list[float]] = {}
    for name, make in LIBRARIES.items():
        try:
            with torch.inference_mode():
                product = make(weight, None)
                if (product(inputs[-1]) - exact).abs().max() > TOLERANCE * exact.abs().max():
                    continue
                timings[name] = [_best(product, x, budget) for x in inputs]
        except (RuntimeError, AttributeError, NotImplementedError):  # torch built without this library
            continue
    return timings or {"torch": [1.0]}


def _best(product: Product, x: Tensor, budget: float) -> float:
    best, deadline = float("inf"), time.perf_counter() + budget
    product(x)
    while True:
        begin = time.perf_counter()
        product(x)
        end = time.perf_counter()
        best = min(best, end - begin)
        if end >= deadline:
            return best


def _processor() -> str:
    """What tells one kind of processor from another: model name, else the architecture."""
    with suppress(OSError):
        fields: dict[str, str] = {}
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
        if "model name" in fields:
            return " ".join(fields.get(name, "") for name in ("model name", "cpu family", "model", "stepping"))
    return platform.processor() or platform.machine()
