"""What a container may use: the CPU and memory limits of this process's control groups, versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 2**60  # version 1 says "no limit" as a number of pages near 2^63


@dataclass(frozen=True, slots=True)
class Limits:
    """None means no limit. `cpus` is CPU seconds a second; `memory` is bytes."""

    cpus: float | None = None
    memory: int | None = None


def cgroup_limits(root: Path = Path("/")) -> Limits:
    """The tightest limits on the way from this process's group up to the root group (`root` is where /proc and /sys are)."""
    cpus: list[float] = []
    memory: list[int] = []
    for folder in _folders(root):
        match _words(folder / "cpu.max"):
            case [quota, period] if quota.isdecimal() and period.isdecimal() and int(period):
                cpus.append(int(quota) / int(period))
        match _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us"):
            case [quota], [period] if quota.isdecimal() and period.isdecimal() and int(period):  # "-1" is no limit
                cpus.append(int(quota) / int(period))
        for name in ("memory.max", "memory.limit_in_bytes"):
            match _words(folder / name):
                case [size] if size.isdecimal() and int(size) < _UNLIMITED:
                    memory.append(int(size))
    return Limits(min(cpus, default=None), min(memory, default=None))


def _folders(root: Path) -> Iterator[Path]:
    """The folders of the process's groups and of their ancestors; in a container, the part of the path that is mounted."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names = [controllers, *controllers.split(",")] if controllers else ["", "unified"]
        if controllers and not {"cpu", "memory"}.intersection(names):
            continue
        for name in dict.fromkeys(names):
            base = mount / name
            group = Path(path.lstrip("/"))
            for part in (group, *group.parents):
                if ".." not in part.parts and (base / part).is_dir():
                    yield base / part


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return []
