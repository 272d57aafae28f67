"""Tiny random models, and the plainest way to continue a prompt with one."""

import copy

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers
from tokenizers import models as backends

from armillary.kernels.attention import CausalAttend
from armillary.models.chat_template import ChatTemplate
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.models.load import LoadedModel
from armillary.models.stored import DecoderWeights
from armillary.models.tokenizer import Tokenizer

VOCABULARY = 97
PLAIN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_context": 256,
}
FAMILIES = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"qk_norm": True, "num_kv_heads": 1},
    "mistral": {"windows": (7, 7)},
    "gemma2": {"windows": (5, None), "attention_softcap": 4.0, "logit_softcap": 20.0, "sandwich_norms": True, "norm_offset": 1.0},
}


def tiny(family="llama", seed=0, **changes):
    """A decoder with weights large enough for its logits to lie well apart."""
    torch.manual_seed(seed)
    decoder = Decoder(ModelConfig(architecture=family, **{**PLAIN, **FAMILIES[family], **changes}))
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return decoder.eval()


def logits_of(decoder, tokens):
    """[len(tokens), vocab] by one plain pass over the whole sequence."""
    with torch.no_grad():
        return decoder(torch.tensor(tokens), torch.arange(len(tokens)), CausalAttend([len(tokens)]))


def greedy(decoder, prompt, count):
    """`count` tokens by recomputing everything in float64 for each, and the smallest gap between the best two logits."""
    exact, known, gap = copy.deepcopy(decoder).double(), list(prompt), float("inf")
    for _ in range(count):
        best = logits_of(exact, known)[-1].topk(2)
        gap = min(gap, (best.values[0] - best.values[1]).item())
        known.append(best.indices[0].item())
    return known[len(prompt) :], gap


def loaded(decoder, template=None):
    """The decoder with a tokenizer of single bytes (those below VOCABULARY - 1), and an end-of-text token."""
    letters = {chr(i): i for i in range(VOCABULARY - 1)}
    backend = Backend(backends.WordLevel({**letters, "<end>": VOCABULARY - 1}, unk_token="<end>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    pieces = [bytes([i]) for i in range(VOCABULARY - 1)] + [b"<end>"]
    end = VOCABULARY - 1
    tokenizer = Tokenizer(backend, pieces, eos=end, stop_ids=[end], special_ids=[end], tokens=[*letters, "<end>"])
    chat = None if template is None else ChatTemplate(template, tokenizer)
    return LoadedModel("tiny", decoder.config, DecoderWeights(decoder), tokenizer, chat, None, "a tiny random model")
