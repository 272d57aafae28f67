"""A model's weights where they lie, read when they are asked for: what serving lays out for its kernels without a decoder between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from armillary.kernels.packed_weight import Blocks
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.models.file_stamp import FileStamp
from armillary.models.hf import load_hf
from armillary.models.weights import hf_name, hf_parameters


class Weights(Protocol):
    """The weights of one model by their Hugging Face names (of a tied head: the embedding's)."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def files(self) -> Sequence[FileStamp]:
        """The files that say what the weights are, as they were before any was read; none when only memory does."""
        ...

    def kind(self, name: str) -> str:
        """How it is stored: GGUF's name of the type, or "float"."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Its values, in whatever floating point costs least. None of the caller's to change."""
        ...

    def blocks(self, name: str) -> Blocks | None:
        """A matrix as the file stores it, in the order of rows that the decoder has; None unless the kernels take its type so."""
        ...

    def release(self, name: str) -> None:
        """Nobody will ask for it again: memory that nothing else needs may go."""
        ...

    def decoder(self, dtype: torch.dtype) -> Decoder:
        """All of them in a decoder that computes and trains."""
        ...


class DecoderWeights:
    """`Weights` of a decoder that somebody holds."""

    files: Sequence[FileStamp] = ()

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._parameters = hf_parameters(decoder)
        linears = {f"{name}.weight": module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
        self._linears = {hf_name(name): module for name, module in linears.items()}

    @property
    def config(self) -> ModelConfig:
        return self._decoder.config

    def kind(self, name: str) -> str:
        return "float"

    def tensor(self, name: str) -> Tensor:
        return self._parameters[name].detach()

    def blocks(self, name: str) -> Blocks | None:
        return None

    def decoder(self, dtype: torch.dtype) -> Decoder:
        """The decoder itself, whatever `dtype`."""
        return self._decoder

    def release(self, name: str) -> None:
        """Empties the linear layer whose weight it is (an embedding stays): the decoder computes no longer."""
        layer = self._linears.get(name)
        if layer is not None:
            layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
            self._parameters.pop(name, None)


class FolderWeights(DecoderWeights):
    """`Weights` of a Hugging Face folder, memory-mapped. Raises as `load_hf`."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(path for path in folder.iterdir() if path.name.endswith((".safetensors", ".safetensors.index.json")))
        self.files = tuple(FileStamp.of(path) for path in paths)
        self._folder = folder
        super().__init__(load_hf(folder))

    def release(self, name: str) -> None:
        """The file keeps it, and the mapping costs nothing."""

    def stored(self) -> Counter[str]:
        """How many numbers there are of each type."""
        count: Counter[str] = Counter()
        for parameter in self._decoder.parameters():
            count[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
        return count

    def decoder(self, dtype: torch.dtype) -> Decoder:
        return load_hf(self._folder).to(dtype)
