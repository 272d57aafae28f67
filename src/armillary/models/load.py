"""One call from a name to everything that running a model takes: decoder, tokenizer, chat template, and a line that says what it is."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from armillary.core.errors import NotFoundError
from armillary.core.units import format_bytes
from armillary.models import hub
from armillary.models.chat_template import ChatTemplate
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.models.gguf.load import GGUFWeights
from armillary.models.gguf.reader import GGUFFile
from armillary.models.stored import DecoderWeights, FolderWeights, Weights
from armillary.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run. `chat_template` is None for a model that has none (a base model): it completes text only.

    `weights` are not read before they are needed: by `decoder`, or by whoever lays them out for serving.
    `description` is one line: name, architecture, parameters, stored types, context, licence, size.
    """

    name: str
    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    source_path: Path
    description: str
    dtype: torch.dtype = torch.float32

    @cached_property
    def decoder(self) -> Decoder:
        """The weights in a decoder, read at the first use; the same one from then on."""
        return self.weights.decoder(self.dtype)

    @property
    def current_weights(self) -> Weights:
        """Those of `decoder` once somebody has asked for it and may have changed it; until then those of the file."""
        return DecoderWeights(self.decoder) if "decoder" in self.__dict__ else self.weights


def load(name_or_path: str | Path, dtype: torch.dtype = torch.float32, progress: hub.Progress | None = None) -> LoadedModel:
    """Loads an alias (`smollm2`, pulled at first use), a `.gguf` file or a Hugging Face folder; `dtype` is that of its `decoder`.

    Raises `NotFoundError` (unknown name, with the closest one), `FormatError` (a damaged file), `InputError` (an unsupported model).
    """
    name = str(name_or_path)
    path = hub.resolve(name, progress=progress)
    if path.is_dir():
        return _from_folder(name, path, dtype)
    file = GGUFFile.open(path)
    tokenizer = Tokenizer.from_gguf(file)
    weights = GGUFWeights(file)
    stored: Counter[str] = Counter()
    for tensor in file.tensors.values():
        stored[tensor.type.name] += tensor.elements
    title, licence = file.metadata.get("general.name"), file.metadata.get("general.license")
    if name in hub.aliases():
        title, licence = hub.aliases()[name].title.split(",")[0], hub.aliases()[name].licence
    return _loaded(name, weights, tokenizer, path, dtype, _one_line(title, path.stem), stored, _one_line(licence, ""), file.size)


def _from_folder(name: str, folder: Path, dtype: torch.dtype) -> LoadedModel:
    weights = FolderWeights(folder)
    try:
        tokenizer = Tokenizer.from_json(folder)
    except NotFoundError as error:
        raise NotFoundError(f"{folder} has no tokenizer.json", "copy the tokenizer's files into the model's folder") from error
    stored = weights.stored()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return _loaded(name, weights, tokenizer, folder, dtype, folder.resolve().name, stored, "", size)


def _loaded(
    name: str,
    weights: Weights,
    tokenizer: Tokenizer,
    path: Path,
    dtype: torch.dtype,
    title: str,
    stored: Counter[str],
    licence: str,
    size: int,
) -> LoadedModel:
    config = weights.config
    tokenizer.limit_ids(config.vocab_size)
    template = ChatTemplate(tokenizer.chat_template, tokenizer) if tokenizer.chat_template else None
    if template is not None and (turn := template.end_of_turn()) is not None and turn not in tokenizer.stop_ids:
        warnings.warn(
            f"{title}: its chat template ends a turn with {tokenizer.token_text(turn)}, which the file does not list as an end of text; "
            "generation stops there too",
            stacklevel=3,
        )
        tokenizer.stop_ids |= {turn}
    total = sum(stored.values())
    kinds = ", ".join(f"{kind} {100 * count / total:.0f} %" for kind, count in stored.most_common() if count / total >= 0.005)
    facts = [
        f"{config.parameters() / 1e6:,.1f} M parameters",
        f"{config.num_layers} layers",
        f"stored as {kinds}" if len(stored) > 1 else f"stored as {next(iter(stored), 'nothing')}",
        f"context {config.max_context:,}",
        *([f"licence {licence}"] if licence else []),
        format_bytes(size),
        *([] if template else ["no chat template"]),
    ]
    return LoadedModel(name, config, weights, tokenizer, template, path, f"{title}: {config.architecture}, {', '.join(facts)}", dtype)


def _one_line(value: object, default: str) -> str:
    """Metadata for display: text only, one line, bounded."""
    return " ".join(value.split())[:80] if isinstance(value, str) and value.strip() else default
