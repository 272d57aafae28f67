"""A peft folder (`adapter_config.json`, `adapter_model.safetensors`) as low-rank terms for a decoder. No pickle is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from armillary.core.errors import FormatError, InputError
from armillary.kernels.cpu_library import PARTS
from armillary.kernels.low_rank import LowRank
from armillary.models.config import ModelConfig
from armillary.models.file_stamp import FileStamp
from armillary.models.lora_config import CONFIG, WEIGHTS, projections, read_lora_config

DTYPES: Final = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class Adapter:
    """What `scale * B A` adds to a decoder's projections: `layers[i]` has one `LowRank` (or None) for each of `PARTS`.

    `files` are its config and its weights as they were before they were read.
    """

    layers: tuple[tuple[LowRank | None, ...], ...]
    files: tuple[FileStamp, ...] = ()

    @property
    def rank(self) -> int:
        """The largest of any projection."""
        return max((low.rank for layer in self.layers for low in layer if low is not None), default=0)

    @property
    def nbytes(self) -> int:
        return sum(low.nbytes for layer in self.layers for low in layer if low is not None)


def read_lora(folder: str | Path, config: ModelConfig, max_bytes: int | None = None) -> Adapter:
    """The adapter in a folder as peft saves it, for a model of `config`. Everything is checked before any weight is read.

    Raises as `read_lora_config`, and FormatError when the weights are damaged, of another model or no numbers.
    """
    found = read_lora_config(folder, config, max_bytes)
    return Adapter(_read(Path(folder) / WEIGHTS, found.projections, dict(projections(config)), config.num_layers), found.files)


def _read(
    path: Path, wanted: Mapping[str, tuple[int, float]], shapes: Mapping[str, tuple[int, int]], num_layers: int
) -> tuple[tuple[LowRank | None, ...], ...]:
    expected = {
        f"base_model.model.{name}.lora_{side}.weight": [rank, shapes[name][1]] if side == "A" else [shapes[name][0], rank]
        for name, (rank, _) in wanted.items()
        for side in "AB"
    }
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = set(file.keys())
            if extra := sorted(found - expected.keys()):
                raise InputError(
                    f"{WEIGHTS} has the tensor {extra[0][:200]!r}, which {CONFIG} does not name or which is not carried out ({len(extra)} such)",
                    f"serve plain LoRA of {', '.join(PARTS)}",
                )
            if missing := [name for name in expected if name not in found]:
                raise FormatError(f"tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are)", "fetch the adapter again")
            for name, shape in expected.items():
                part = file.get_slice(name)
                if list(part.get_shape()) != shape:
                    raise FormatError(
                        f"tensor {name} has shape {list(part.get_shape())}, {shape} is what the model and {CONFIG} say",
                        "give an adapter of this model",
                    )
                if part.get_dtype() not in DTYPES:
                    raise FormatError(f"tensor {name} is {part.get_dtype()}", f"an adapter's weights are {', '.join(sorted(DTYPES))}")

            def tensor(name: str) -> Tensor:
                values = torch.empty(expected[name]).copy_(file.get_tensor(name))  # the file may change; what was read may not
                if not torch.isfinite(values).all():
                    raise FormatError(f"tensor {name} has NaN or infinite values", "check the adapter")
                return values

            def low(name: str, scale: float) -> LowRank:
                at = f"base_model.model.{name}"
                return LowRank(tensor(f"{at}.lora_A.weight"), tensor(f"{at}.lora_B.weight"), scale)

            lows = {name: low(name, scale) for name, (_, scale) in wanted.items()}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise FormatError(f"{path.name} is not a whole safetensors file ({str(error)[:100]})", "fetch the file again") from error
    parts = [lows.get(name) for name in shapes]
    return tuple(tuple(parts[layer * len(PARTS) : (layer + 1) * len(PARTS)]) for layer in range(num_layers))
