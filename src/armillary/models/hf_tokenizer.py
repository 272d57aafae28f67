"""The tokenizer's part of a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import processors

from armillary.core.errors import NotFoundError

if TYPE_CHECKING:
    from armillary.models.tokenizer import Tokenizer

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def write_tokenizer(tokenizer: Tokenizer | str | Path, folder: Path) -> None:
    """Writes `tokenizer` (or copies the tokenizer files of a folder) so that `transformers` encodes alike."""
    if isinstance(tokenizer, str | Path):
        source = Path(tokenizer)
        if not (source / "tokenizer.json").is_file():
            raise NotFoundError(f"{source} has no tokenizer.json", "give a folder that has one")
        if source.resolve() != folder.resolve():
            for name in FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)
        return
    (folder / "tokenizer.json").write_text(json.dumps(_with_ends(tokenizer), ensure_ascii=False), "utf-8")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for key, token in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos)):
        if token is not None:
            config[key] = tokenizer.backend.id_to_token(token)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, "utf-8")


def _with_ends(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json with a post-processor for bos and eos where the tokenizer adds them itself, as those from GGUF do."""
    backend = tokenizer.backend
    raw: dict[str, Any] = json.loads(backend.to_str())
    bos = tokenizer.bos if tokenizer.add_bos else None
    eos = tokenizer.eos if tokenizer.add_eos else None
    around = backend.encode("a", add_special_tokens=True).ids
    if (bos is None or around[:1] == [bos]) and (eos is None or around[-1:] == [eos]):
        return raw
    ends = [backend.id_to_token(token) if token is not None else None for token in (bos, eos)]
    before, after = ([f"{token}"] if token else [] for token in ends)
    template = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=[(text, token) for text, token in zip(ends, (bos, eos), strict=True) if text is not None and token is not None],
    )
    described: dict[str, Any] = json.loads(template.__getstate__())
    raw["post_processor"] = described
    return raw
