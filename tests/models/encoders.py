"""A tiny random BERT as sentence-transformers lays a model out on disk."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import models, normalizers, pre_tokenizers, processors

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *"abcdefghijklmnopqrstuvwxyz",
    *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
    "the",
    "sun",
]


def tiny_bert(folder: Path, *, pooling: str = "mean", normalize: bool = True, **changes: object) -> Path:
    """Writes it to `folder`; `changes` go to its config."""
    torch.manual_seed(3)
    shape = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**{**shape, "max_position_embeddings": 40, **changes})
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    backend = tokenizers.Tokenizer(models.WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    backend.enable_truncation(8)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [{"idx": index, "type": f"sentence_transformers.models.{kind}"} for index, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    names = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({name: pooling == kind for kind, name in names.items()}))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    return folder


def reference(folder: Path, sequences: list[list[int]], *, pooling: str = "mean", normalize: bool = True) -> torch.Tensor:
    """transformers' BertModel on the same weights, one sequence at a time."""
    model = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = [model(torch.tensor([sequence])).last_hidden_state[0] for sequence in sequences]
    pooled = torch.stack([state.mean(0) if pooling == "mean" else state[0] for state in states])
    return torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled
