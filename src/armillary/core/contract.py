"""The contract between the four words: work goes to a policy, which makes a schedule, which an executor carries out."""

from __future__ import annotations

from typing import Protocol, TypeVar

State_contra = TypeVar("State_contra", contravariant=True)
Schedule_co = TypeVar("Schedule_co", covariant=True)
Plan_contra = TypeVar("Plan_contra", contravariant=True)
Outcome_co = TypeVar("Outcome_co", covariant=True)


class Policy(Protocol[State_contra, Schedule_co]):
    """Pure code: the same state gives the same schedule. No device, socket, clock or global RNG."""

    name: str

    def step(self, state: State_contra) -> Schedule_co: ...


class Executor(Protocol[Plan_contra, Outcome_co]):
    """Carries out what it is given, for real or in virtual time. Never decides."""

    def run(self, plan: Plan_contra) -> Outcome_co: ...
