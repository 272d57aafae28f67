"""What a KV policy makes of a deployment: bytes beside each token, layers that read everything, keys that an iteration reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

from armillary.core.errors import InputError
from armillary.models.graph.cost import Deployment
from armillary.serve.config import EngineConfig
from armillary.serve.kv_policies import KVPolicy
from armillary.serve.kv_policies.reading import reading
from armillary.serve.schedule import Plan, Reason
from armillary.sim.batch import Read

_EVERYTHING = 1 << 40  # a window that hides nothing: of layers that a policy leaves alone


@dataclass(frozen=True, slots=True)
class Kept:
    """What `kv` reads of heads of `head_dim`, whose key and value take `token_bytes`."""

    kv: KVPolicy
    head_dim: int
    token_bytes: int

    def read(self, plan: Plan) -> Read:
        """Of a whole plan, in one layer. What is read to decide counts as the keys and values that are as many bytes."""
        pairs = keys = decoded = beside_prompts = beside_decodes = 0
        for entry in plan.schedule.entries:
            found = reading(self.kv, entry.count, entry.start, self.head_dim, prompt=entry.reason is not Reason.DECODE)
            if entry.count == 1 and (entry.start or entry.reason is Reason.DECODE):
                decoded += found.keys
                beside_decodes += found.beside
            else:
                pairs += found.pairs
                keys += found.keys
                beside_prompts += found.beside
        return Read(pairs, keys + beside_prompts // self.token_bytes, decoded + beside_decodes // self.token_bytes)


def kept(deployment: Deployment, config: EngineConfig) -> Kept | None:
    """How much `config` reads; None where all is read. Raises InputError for a model whose cache has no keys and values of heads."""
    if config.kv_policy == "dense":
        return None
    model = deployment.model
    if model.latent is not None:
        raise InputError(
            f"kv_policy {config.kv_policy} keeps and reads keys and values of heads, and {model.name} caches a latent",
            "simulate with --kv-policy dense",
            field="kv_policy",
        )
    return Kept(config.kv, model.head_dim, deployment.precision.kv_bytes(2 * model.head_dim))


def attending(deployment: Deployment, config: EngineConfig) -> Deployment:
    """`deployment`, of whose layers those that the KV policy leaves alone are told from the others. Layers with a window of their own keep it."""
    model, dense = deployment.model, config.kv.seen.dense_layers
    if not dense:
        return deployment
    own = model.windows or (None,) * model.num_layers
    windows = tuple(_EVERYTHING if window is None and layer < dense else window for layer, window in enumerate(own))
    return replace(deployment, model=replace(model, windows=windows))


def beside_bytes(deployment: Deployment, config: EngineConfig) -> int:
    """Bytes of a token beside its key and value, in one layer of a device."""
    model, tensor = deployment.model, deployment.layout.tensor_parallel
    return 0 if config.kv_policy == "dense" else max(1, model.num_kv_heads // tensor) * config.kv.beside(model.head_dim)
