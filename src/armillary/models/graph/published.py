"""Published architectures by name, each with where its values are from."""

from __future__ import annotations

import difflib
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from armillary.core.errors import NotFoundError
from armillary.models.graph.architecture import Architecture, Latent, Mixture


@dataclass(frozen=True, slots=True)
class Published:
    """`parameters` as its publisher states them (exact, or rounded; 0: not stated). `confirmed`: a copy of the primary source was read."""

    architecture: Architecture
    source: str
    confirmed: bool
    parameters: int


@functools.cache
def published() -> Mapping[str, Published]:
    """All of them, by name."""
    document = read_table()
    families = document["families"]
    return {name: _read(name, dict(raw), families) for name, raw in document["decoders"].items()}


def architecture(name: str) -> Architecture:
    """The architecture of that name. Raises NotFoundError with the closest ones."""
    found = published().get(name.lower())
    if found is None:
        close = difflib.get_close_matches(name.lower(), published(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(published())}"
        raise NotFoundError(f"no published architecture is called {name[:80]!r}", hint)
    return found.architecture


@functools.cache
def read_table() -> dict[str, Any]:
    """The packaged table, as written."""
    return tomllib.loads(resources.files("armillary.models.graph").joinpath("published.toml").read_text(encoding="utf-8"))


def _read(name: str, raw: dict[str, Any], families: Mapping[str, Mapping[str, Any]]) -> Published:
    source, confirmed, parameters = raw.pop("source"), raw.pop("confirmed"), raw.pop("parameters")
    shape = {**(families[raw.pop("extends")] if "extends" in raw else {}), **raw}
    mixture, latent, window = shape.pop("mixture", None), shape.pop("latent", None), shape.pop("window", None)
    model = Architecture(
        name=name,
        mixture=None if mixture is None else Mixture(**mixture),
        latent=None if latent is None else Latent(**latent),
        windows=() if window is None else (window,) * shape["num_layers"],
        **shape,
    )
    return Published(model, source, confirmed, parameters)
