"""Where Armillary keeps what it can make or fetch again: models, built libraries."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from armillary.core.errors import InputError


def cache_dir(environment: Mapping[str, str] | None = None) -> Path:
    """The cache folder: `ARMILLARY_HOME`, else `XDG_CACHE_HOME/armillary`, else `~/.cache/armillary`.

    Always absolute; not created here (what writes into it creates it). `environment` defaults to `os.environ`.
    As the XDG base directory specification asks, a relative `XDG_CACHE_HOME` is ignored.
    """
    environment = os.environ if environment is None else environment
    home = environment.get("ARMILLARY_HOME", "")
    if home:
        path = Path(home).expanduser().absolute()
        if path.exists() and not path.is_dir():
            raise InputError(f"ARMILLARY_HOME is {path}, which is not a folder", "set it to a folder, or unset it", field="ARMILLARY_HOME")
        return path
    xdg = environment.get("XDG_CACHE_HOME", "")
    if xdg and Path(xdg).is_absolute():
        return Path(xdg) / "armillary"
    return Path.home() / ".cache" / "armillary"
