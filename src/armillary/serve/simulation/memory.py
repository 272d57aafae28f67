"""How many KV blocks a replica has beside everything else that lies on its devices."""

from __future__ import annotations

from armillary.core.errors import CapacityError
from armillary.core.units import format_bytes
from armillary.models.graph.cost import Deployment
from armillary.serve.config import EngineConfig


def kv_blocks(deployment: Deployment, config: EngineConfig, draft: Deployment | None = None) -> int:
    """Blocks of `config.block_size` tokens. A draft model has as many of its own; its weights lie here too, unless they are some of the model's.

    Raises CapacityError when not even one fits.
    """
    if draft is None:
        return deployment.kv_blocks(config.block_size)
    own = config.draft_model is not None
    room = [
        (deployment.usable - work.weight_bytes - own * beside.weight_bytes, work.kv_bytes_per_token + beside.kv_bytes_per_token)
        for work, beside in zip(deployment.works, draft.works, strict=True)
    ]
    blocks = min(left // token for left, token in room) // config.block_size
    if blocks < 1:
        raise CapacityError(
            f"beside {deployment.model.name} and the draft model {draft.model.name} {format_bytes(max(0, min(left for left, _ in room)))} "
            f"of a device are left, less than one KV block of {config.block_size} tokens for both",
            "use more devices, a smaller format or a smaller draft model",
            field="draft_model",
        )
    return blocks
