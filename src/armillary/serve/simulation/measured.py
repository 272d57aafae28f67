"""This machine's own engine in virtual time: iterations cost what calibration measured, and the KV pool is what `serve` would make it."""

from __future__ import annotations

import warnings

from armillary.models.config import ModelConfig
from armillary.serve.config import EngineConfig
from armillary.serve.kv_pool import settle
from armillary.sim.costs import Fitted


def as_measured(config: EngineConfig, model: ModelConfig, cost: Fitted | None, memory: int) -> EngineConfig:
    """`config` with its KV pool and context settled as on a machine that has `memory` bytes beside the weights.

    Warns of iterations that may become larger than any that `cost` was measured of, where it was.
    """
    settled = settle(config, model, memory)
    if cost is None:
        return settled
    for what, asked, most in (
        ("tokens an iteration", settled.max_batch_tokens, cost.tokens.at[-1]),
        ("sequences in flight", settled.max_running, cost.rows.at[-1]),
    ):
        if asked > most:
            warnings.warn(f"the engine was measured with at most {most:,.0f} {what}: the curves are drawn on to {asked:,}", stacklevel=2)
    return settled
