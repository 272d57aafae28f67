"""Errors that name the thing, the bound and the fix."""

from __future__ import annotations


class ArmillaryError(Exception):
    """What went wrong and what to do about it.

    `problem` names the thing and the bound; `fix` is an imperative the reader can follow;
    `field` is the request field or config key at fault, when there is one.
    """

    def __init__(self, problem: str, fix: str = "", *, field: str | None = None) -> None:
        super().__init__(f"{problem}: {fix}" if fix else problem)
        self.problem = problem
        self.fix = fix
        self.field = field


class InputError(ArmillaryError, ValueError):
    """The caller gave something out of bounds (HTTP 400)."""


class FormatError(InputError):
    """A file is not what it claims to be, or is damaged."""


class NotFoundError(ArmillaryError, LookupError):
    """A named thing does not exist (HTTP 404)."""


class CapacityError(ArmillaryError):
    """A bound on resources would be exceeded (HTTP 503)."""


class MissingDependencyError(ArmillaryError, ImportError):
    """An optional package or tool is not installed; the fix names the command that installs it."""
