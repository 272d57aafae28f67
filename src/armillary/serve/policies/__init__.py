"""Scheduler policies: a loop that forms batches, the order in which it considers the queue, and whom it preempts; each one file, chosen apart."""

from __future__ import annotations

from typing import Final

from armillary.core.errors import InputError, NotFoundError
from armillary.serve.policies import orders, victims
from armillary.serve.policies.orca import Orca
from armillary.serve.policies.request_level import RequestLevel
from armillary.serve.policies.sarathi import Sarathi
from armillary.serve.policies.vllm import VLLM
from armillary.serve.schedule import SchedulerPolicy

DEFAULT: Final = "sarathi"
_NAMES: Final = (DEFAULT, "vllm", "orca", "request-level")


def names() -> tuple[str, ...]:
    """The policies by name, the default first."""
    return _NAMES


def get(
    name: str,
    order: str = orders.DEFAULT,
    victim: str = victims.DEFAULT,
    max_wait: int | None = None,
    tbt_target: int | None = None,
) -> SchedulerPolicy:
    """The loop `name` over the queue in `order`, with the rule `victim` where blocks run out.

    Who has waited over `max_wait` ns goes first; `tbt_target` ns bounds the time between tokens. Raises NotFoundError for a name that does not
    exist, InputError for what the loop has no use for.
    """
    queue, rule = orders.get(order, max_wait), victims.get(victim)
    if tbt_target is not None and name != "sarathi":
        raise InputError(
            f"tbt_target bounds the chunks of prompts, and the policy '{name}' does not chunk them to a time",
            "use policy sarathi, or leave tbt_target out",
            field="tbt_target",
        )
    if victim != victims.DEFAULT and name in ("orca", "request-level"):
        raise InputError(
            f"the policy '{name}' reserves memory and never preempts, so it has no victims to choose",
            "use policy sarathi or vllm, or leave victim out",
            field="victim",
        )
    match name:
        case "sarathi":
            return Sarathi(queue, rule, tbt_target)
        case "vllm":
            return VLLM(queue, rule)
        case "orca":
            return Orca(queue)
        case "request-level":
            return RequestLevel(queue)
    fix = f"'{name}' is an order of the queue: --order {name}" if name in orders.NAMES else f"use one of: {', '.join(_NAMES)}"
    raise NotFoundError(f"no scheduler policy is called '{name}'", fix, field="policy")
