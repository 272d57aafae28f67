"""Scheduler policies: one a file, each a pure function from the engine's state to a schedule."""

from __future__ import annotations

from collections.abc import Callable

from armillary.core.errors import NotFoundError
from armillary.serve.policies.orca import Orca
from armillary.serve.policies.request_level import RequestLevel
from armillary.serve.policies.sarathi import Sarathi
from armillary.serve.policies.vllm import VLLM
from armillary.serve.schedule import SchedulerPolicy

DEFAULT = "sarathi"
_POLICIES: dict[str, Callable[[], SchedulerPolicy]] = {"sarathi": Sarathi, "vllm": VLLM, "orca": Orca, "request-level": RequestLevel}


def names() -> tuple[str, ...]:
    """The policies by name, the default first."""
    return tuple(_POLICIES)


def get(name: str) -> SchedulerPolicy:
    """A policy by name. Raises NotFoundError."""
    if name not in _POLICIES:
        raise NotFoundError(f"no scheduler policy is called '{name}'", f"use one of: {', '.join(_POLICIES)}", field="policy")
    return _POLICIES[name]()
