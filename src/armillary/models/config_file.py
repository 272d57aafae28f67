"""The config of a model on disk, read without its weights and without torch: what is wrong with a request for it is known at once."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from armillary.models.config import ModelConfig
from armillary.models.families import from_hf
from armillary.models.fields import Fields, read_json

MAX_CONFIG_BYTES: Final = 16 * 1024 * 1024


def read_config(path: str | Path) -> ModelConfig:
    """The model that a `.gguf` file, or a folder's config.json, describes; ids in generation_config.json that end a text are added.

    Raises NotFoundError without a config.json, InputError for a model that this version cannot run, FormatError for a bad value.
    """
    path = Path(path)
    if path.is_file():
        from armillary.models.gguf.metadata import gguf_config
        from armillary.models.gguf.reader import GGUFFile

        return gguf_config(GGUFFile.open(path))
    raw = read_json(path / "config.json", MAX_CONFIG_BYTES)
    generation = path / "generation_config.json"
    if generation.is_file():
        more = Fields(read_json(generation, MAX_CONFIG_BYTES), generation.name).token_ids("eos_token_id")
        own = Fields(raw, "config.json").token_ids("eos_token_id")
        if more:
            raw = {**raw, "eos_token_id": list(dict.fromkeys([*own, *more]))}
    return from_hf(raw)
