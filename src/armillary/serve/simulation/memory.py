"""How many KV blocks a replica has beside everything else that lies on its devices."""

from __future__ import annotations

from armillary.core.errors import CapacityError
from armillary.core.units import format_bytes
from armillary.models.graph.cost import Deployment
from armillary.serve.config import EngineConfig
from armillary.serve.simulation.kept import beside_bytes


def kv_blocks(deployment: Deployment, config: EngineConfig, draft: Deployment | None = None, reserved: int = 0) -> int:
    """Blocks of `config.block_size` tokens, with what the KV policy keeps beside each. A draft model has as many of its own; its weights lie here
    too, unless they are some of the model's. `reserved` bytes of each device are others'.

    Raises CapacityError when not even one fits.
    """
    more = beside_bytes(deployment, config)
    if draft is None and not more and not reserved:
        return deployment.kv_blocks(config.block_size)
    room = [
        (
            deployment.usable - work.weight_bytes - reserved,
            work.kv_bytes_per_token + more * len(work.layout.layers(work.model.num_layers, work.stage)),
        )
        for work in deployment.works
    ]
    if draft is not None:
        own = config.draft_model is not None
        room = [
            (left - own * beside.weight_bytes, token + beside.kv_bytes_per_token)
            for (left, token), beside in zip(room, draft.works, strict=True)
        ]
    blocks = min(left // token for left, token in room) // config.block_size
    if blocks < 1:
        beside = f"{deployment.model.name} and the draft model {draft.model.name}" if draft is not None else deployment.model.name
        raise CapacityError(
            f"beside {beside} {format_bytes(max(0, min(left for left, _ in room)))} of a device are left, less than one KV block of "
            f"{config.block_size} tokens",
            "use more devices, a smaller format, a smaller draft model or fewer adapters",
            field="layout",
        )
    return blocks


def pool(deployment: Deployment, config: EngineConfig, draft: Deployment | None = None, reserved: int = 0) -> int:
    """Blocks of a replica's KV pool: as many as are asked for, or as `kv_memory` of all its devices together holds; else all that fit.

    Raises CapacityError for more than fit, and for memory that not even one fits in.
    """
    room, asked = kv_blocks(deployment, config, draft, reserved), config.kv_blocks
    if asked is None and config.kv_memory is not None:
        more = beside_bytes(deployment, config)
        devices = [work.kv_bytes_per_token + more * len(work.layout.layers(work.model.num_layers, work.stage)) for work in deployment.works]
        devices += [work.kv_bytes_per_token for work in draft.works] if draft is not None else []
        block = sum(devices) * deployment.layout.tensor_parallel * config.block_size
        asked = config.kv_memory // block
        if not asked:
            raise CapacityError(
                f"kv_memory {format_bytes(config.kv_memory)} is less than one KV block of {config.block_size} tokens, {format_bytes(block)}",
                "give more, or leave it out for all that the devices have",
                field="kv_memory",
            )
    if asked is None:
        return room
    if asked > room:
        raise CapacityError(
            f"a KV pool of {asked:,} blocks of {config.block_size} tokens is asked for, and beside the weights {room:,} fit",
            "give fewer, leave it out for all that fit, or use more devices",
            field="kv_blocks" if config.kv_blocks is not None else "kv_memory",
        )
    return asked
