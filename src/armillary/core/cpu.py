"""What CPU this is: its model and its instruction sets, as the operating system reports them."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def cpu_info() -> tuple[str, frozenset[str]]:
    """The model's name and the flags of the first CPU (Linux names, such as `avx512f`; empty where there is no /proc/cpuinfo)."""
    fields = _first_cpu()
    model = fields.get("model name") or platform.processor() or platform.machine()
    return model, frozenset((fields.get("flags") or fields.get("features") or "").split())  # arm64 calls them features


@lru_cache(maxsize=1)
def cpu_vendor() -> str:
    """As the CPU names its maker: `GenuineIntel`, `AuthenticAMD`; empty where that is not told."""
    return _first_cpu().get("vendor_id", "")


def _first_cpu() -> dict[str, str]:
    """What /proc/cpuinfo says of it, keys in lower case; nothing where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in text.partition("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip().lower()] = value.strip()
    return fields
