"""A run's weights as a Hugging Face folder or a GGUF file, read back as serving reads it before it gets its name."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

from armillary.core.config import resolve
from armillary.core.errors import FormatError, InputError, NotFoundError
from armillary.kernels.attention import CausalAttend
from armillary.models.decoder import Decoder
from armillary.models.gguf.writer import write_gguf
from armillary.models.hf import save_hf
from armillary.models.load import load
from armillary.models.tokenizer import Tokenizer
from armillary.train.build import open_model
from armillary.train.checkpoint import newest
from armillary.train.checkpoint_state import load_weights
from armillary.train.config import TrainConfig
from armillary.train.session import CHECKPOINTS, CONFIG

Format = Literal["hf", "gguf"]
PROBE_TOKENS: Final = 64
TOLERANCE: Final[dict[str, float]] = {"F32": 1e-5, "F16": 0.01, "BF16": 0.1, "Q8_0": 0.1, "Q4_0": 0.7}
"""How far logits may move, as a share of their own spread (root mean squares): above it the file is wrong, not rounded. Another model's: 1.4."""

_HF_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_GGUF_TYPES: Final = ("F32", "F16", "Q8_0", "Q4_0")


@dataclass(frozen=True, slots=True)
class Exported:
    """A file or folder that was read back. `difference`: largest |logit - logit before|; `relative`: root mean square over the logits' own."""

    path: Path
    difference: float
    relative: float
    tokens: int


def trained_model(run: Path) -> tuple[Decoder, Tokenizer, int]:
    """Model, tokenizer and step of a run's newest checkpoint. Raises NotFoundError when it has none."""
    config = resolve(TrainConfig, file=run / CONFIG).value
    checkpoint = newest(run / CHECKPOINTS)
    if checkpoint is None:
        raise NotFoundError(f"{run} has no checkpoint yet", "wait for its first one (checkpoint.every)")
    tokenizer, decoder = open_model(config)
    step = load_weights(checkpoint, decoder)
    return decoder, tokenizer, step


def export(decoder: Decoder, tokenizer: Tokenizer, path: Path, to: Format, stored: str = "F32") -> Exported:
    """Writes `path`, which must not exist, and checks the logits of what was read back. Raises FormatError (and leaves nothing) when they differ.

    stored: how matrices are kept; hf: F32, F16, BF16; gguf: F32, F16, Q8_0, Q4_0.
    """
    allowed = tuple(_HF_DTYPES) if to == "hf" else _GGUF_TYPES
    if stored not in allowed:
        raise InputError(f"{to} cannot store {stored} here", f"choose one of {', '.join(allowed)}", field="stored")
    if path.exists():
        raise InputError(f"{path} exists", "choose another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part" + (".gguf" if to == "gguf" else ""))
    try:
        if to == "hf":
            save_hf(decoder, part, tokenizer, dtype=_HF_DTYPES[stored], overwrite=True)
        else:
            write_gguf(decoder, part, stored, tokenizer)
        exported = _compare(decoder, load(part).decoder, path)
        if not exported.relative <= TOLERANCE[stored]:
            raise FormatError(
                f"{path} reads back as another model: its logits differ by {exported.relative:.2g} of their spread, "
                f"{stored} allows {TOLERANCE[stored]:g}",
                "this is a defect of the writer: report it with the model's config.json",
            )
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True) if to == "hf" else part.unlink(missing_ok=True)
    return exported


def _compare(before: Decoder, after: Decoder, path: Path) -> Exported:
    """Both models' logits on the same tokens, drawn from the whole vocabulary."""
    count = min(PROBE_TOKENS, before.config.max_context)
    tokens = torch.randint(0, before.config.vocab_size, (count,), generator=torch.Generator().manual_seed(0))
    one, two = _logits(before, tokens), _logits(after, tokens)
    difference = two - one
    return Exported(path, float(difference.abs().max()), float(difference.norm() / one.sub(one.mean(-1, keepdim=True)).norm()), count)


@torch.no_grad()
def _logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    positions = torch.arange(len(tokens))
    logits: Tensor = decoder(tokens, positions, CausalAttend([len(tokens)]))
    return logits.double()
