"""The drafter that a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from armillary.core.clock import Clock
from armillary.core.errors import InputError
from armillary.serve.kv_pool import kv_bytes_per_token
from armillary.serve.speculation.adaptive import Adaptive
from armillary.serve.speculation.draft_model import DraftModel
from armillary.serve.speculation.layers import kept_layers
from armillary.serve.speculation.ngram import NGram

if TYPE_CHECKING:
    from collections.abc import Callable

    from armillary.models.load import LoadedModel
    from armillary.serve.config import EngineConfig
    from armillary.serve.executors.forward import Forward


def load_draft(config: EngineConfig, target: LoadedModel) -> LoadedModel | None:
    """The draft model that `config` names, if any. Raises InputError when it does not fit the target."""
    if config.draft_model is None:
        return None
    from armillary.models.load import load

    draft = load(config.draft_model)
    check_fits(target, draft)
    return draft


def draft_bytes_per_token(config: EngineConfig, target: LoadedModel, draft: LoadedModel | None) -> int:
    """What a token takes in the draft's own KV pool; 0 where nothing keeps one."""
    if config.speculate == "layers":
        layers = len(kept_layers(target.config.num_layers, config.draft_layers))
        return kv_bytes_per_token(target.config, config.kv_dtype) // target.config.num_layers * layers
    return 0 if draft is None else kv_bytes_per_token(draft.config, config.kv_dtype)


def build_drafter(
    config: EngineConfig,
    target: LoadedModel,
    forward: Forward,
    draft: LoadedModel | None,
    draft_forward: Callable[[LoadedModel], Forward],
    clock: Clock | None,
) -> Adaptive | None:
    """None when nothing is drafted. `forward` is the target's; `draft_forward` makes the draft model's, with as many KV blocks."""
    if config.speculate == "off":
        return None
    if config.speculate == "ngram":
        return Adaptive(NGram(), config.draft_tokens, clock)
    if draft is None:
        name, drafting, context = (
            "layers",
            forward.with_layers(kept_layers(target.config.num_layers, config.draft_layers)),
            target.config.max_context,
        )
    else:
        name, drafting, context = draft.name, draft_forward(draft), draft.config.max_context
    assert config.kv_blocks is not None
    model = DraftModel(
        name,
        drafting,
        num_blocks=config.kv_blocks,
        block_size=config.block_size,
        context=context,
        seed=config.seed,
        deterministic=config.deterministic,
    )
    return Adaptive(model, config.draft_tokens, clock)


def check_fits(target: LoadedModel, draft: LoadedModel) -> None:
    """Raises InputError unless a token means the same to both models."""
    if target.config.vocab_size != draft.config.vocab_size:
        raise InputError(
            f"the draft model '{draft.name}' has {draft.config.vocab_size:,} tokens, '{target.name}' {target.config.vocab_size:,}",
            "use a draft model of the same family",
            field="draft_model",
        )
    for token in range(0, target.config.vocab_size, max(1, target.config.vocab_size // 997)):
        if target.tokenizer.token_text(token) != draft.tokenizer.token_text(token):
            raise InputError(
                f"token {token} is {target.tokenizer.token_text(token)!r} to '{target.name}' and {draft.tokenizer.token_text(token)!r} to '{draft.name}'",
                "use a draft model with the same tokenizer",
                field="draft_model",
            )
