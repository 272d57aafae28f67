"""What a sequence keeps of its keys and values and what its queries read: one policy a file, chosen by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from armillary.serve.kv_policies.h2o import H2O
from armillary.serve.kv_policies.infllm import InfLLM
from armillary.serve.kv_policies.minference import MInference
from armillary.serve.kv_policies.policy import Dense, KVPolicy, Options
from armillary.serve.kv_policies.quest import Quest
from armillary.serve.kv_policies.streaming import Streaming

__all__ = ["DENSE", "Dense", "KVPolicy", "Options", "build", "names"]

_POLICIES: Final[dict[str, Callable[[Options], KVPolicy]]] = {
    "dense": Dense,
    "streaming": Streaming,
    "h2o": H2O,
    "quest": Quest,
    "minference": MInference,
    "infllm": InfLLM,
}
DENSE: Final = Dense(Options(block_size=16, max_batch_tokens=512, sinks=0, window=0, budget=0, dense_layers=0))


def names() -> tuple[str, ...]:
    return tuple(_POLICIES)


def build(name: str, options: Options) -> KVPolicy:
    """The policy of that name. Raises InputError, naming the option, when it cannot be so."""
    return _POLICIES[name](options)
