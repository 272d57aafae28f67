"""A machine's profile: what `armillary calibrate` measured on it, as a JSON file that cost models and clusters read."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from armillary.cluster.device import Device, Link, Node, Provenance
from armillary.cluster.machine import Machine
from armillary.core.config import Config
from armillary.core.errors import FormatError, InputError, NotFoundError
from armillary.core.paths import cache_dir

VERSION: Final = 1
MAX_BYTES: Final = 16_000_000
QUIET_LOAD: Final = 0.5  # load average before, above which others were at work
QUIET_OTHERS: Final = 0.05  # share of the cores' time that others took meanwhile

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**48)]


class Identity(Config):
    """What tells one machine from another as far as speed goes."""

    cpu: str
    system: str
    isa: tuple[str, ...]
    physical_cores: int
    usable_cores: float
    memory: int | None
    torch: str | None

    @classmethod
    def of(cls, machine: Machine) -> Identity:
        return cls(
            cpu=machine.cpu,
            system=machine.system,
            isa=machine.isa,
            physical_cores=machine.physical_cores,
            usable_cores=machine.usable_cores,
            memory=machine.memory_total,
            torch=machine.torch,
        )


class ProductRate(Config):
    """x [m, k] times a weight [n, k] transposed; m = 1 is a matrix-vector product."""

    library: str  # torch, or ours (PackedWeight)
    dtype: str  # of the weight; activations and sums are fp32
    threads: Count
    m: Count
    n: Count
    k: Count
    seconds: Positive  # best of several

    @property
    def flops(self) -> float:
        """FLOP/s: 2 m n k over the time."""
        return 2 * self.m * self.n * self.k / self.seconds


class MemoryRate(Config):
    """A buffer far larger than the caches. A copy's bandwidth counts what is read and what is written."""

    operation: Literal["read", "write", "copy"]
    threads: Count
    size: Count  # bytes of the buffer
    bandwidth: Positive  # B/s


class Transfer(Config):
    """One message of `size` bytes, one way (half of a round trip)."""

    size: Count
    seconds: Positive


class LinkRate(Config):
    """Two processes of this machine: over TCP on the loopback interface, or through shared memory (copied in and out)."""

    name: Literal["loopback", "shared-memory"]
    transfers: tuple[Transfer, ...] = Field(min_length=1)

    @property
    def latency(self) -> int:
        """ns of the smallest message."""
        return round(min(self.transfers, key=lambda each: each.size).seconds * 1e9)

    @property
    def bandwidth(self) -> float:
        """B/s of the message that goes fastest."""
        return max(each.size / each.seconds for each in self.transfers)

    def link(self, source: str) -> Link:
        where = {key: Provenance(source) for key in ("bandwidth", "latency")}
        return Link(self.name, f"{self.name} between two processes", self.bandwidth, self.latency, where)


class Profile(Config):
    """Everything measured at once. `engine`: iterations of serving engines, by name (`serve.calibration`)."""

    version: Literal[1] = 1
    machine: Identity
    taken: str  # UTC, ISO 8601
    seconds: Positive  # that measuring took
    load_before: float
    load_after: float  # measuring raises it, too
    others: float | None  # share of the cores' time that other processes took meanwhile
    products: tuple[ProductRate, ...] = ()
    memory: tuple[MemoryRate, ...] = ()
    links: tuple[LinkRate, ...] = ()
    engine: dict[str, tuple[dict[str, float | str], ...]] = Field(default_factory=dict)

    @property
    def disturbances(self) -> tuple[str, ...]:
        """Why the figures may be too low; empty when the machine was quiet."""
        found = []
        if self.load_before > QUIET_LOAD:
            found.append(f"the load average was {self.load_before:.2f} before")
        if self.others is not None and self.others > QUIET_OTHERS:
            found.append(f"other processes took {self.others:.0%} of the cores' time meanwhile")
        return tuple(found)

    @property
    def source(self) -> str:
        """How a figure from here is quoted."""
        quiet = "quiet" if not self.disturbances else "; ".join(self.disturbances)
        return f"measured: {self.machine.cpu}, {self.taken} ({quiet})"

    def differs(self, machine: Machine) -> tuple[str, ...]:
        """In what `machine` is another than the one that was measured; empty when it is the same."""
        ours, theirs = self.machine, Identity.of(machine)
        fields = ("cpu", "isa", "physical_cores", "usable_cores", "torch")
        return tuple(
            f"{name.replace('_', ' ')}: {getattr(ours, name)}, now {getattr(theirs, name)}"
            for name in fields
            if getattr(ours, name) != getattr(theirs, name)
        )

    def product(self, dtype: str, m: int, library: str | None = None) -> ProductRate:
        """The fastest product of weights of `dtype` by m tokens. Raises InputError for what was not measured."""
        found = [rate for rate in self.products if rate.dtype == dtype and rate.m == m and library in (None, rate.library)]
        if not found:
            have = ", ".join(sorted({f"{rate.dtype} by {rate.m}" for rate in self.products})) or "nothing"
            raise InputError(f"the profile has no product of {dtype} weights by {m} tokens", f"it has {have}; run armillary calibrate")
        return max(found, key=lambda rate: rate.flops)

    def device(self, name: str = "this", parts: int = 1) -> Device:
        """This machine, or one of so many equal `parts` of it, as a device of a cluster: its peaks are the best that was measured, so both efficiencies are 1."""
        flops: dict[str, float] = {}
        for rate in self.products:
            flops[rate.dtype] = max(rate.flops, flops.get(rate.dtype, 0.0))
        reads = [rate.bandwidth for rate in self.memory if rate.operation == "read"]
        if not flops or not reads or self.machine.memory is None:
            raise InputError("the profile lacks products, memory reads or the size of the memory", "run armillary calibrate again, whole")
        source = Provenance(self.source, confirmed=not self.disturbances)
        measured = dict.fromkeys(("memory", "bandwidth", *(f"flops.{dtype}" for dtype in flops)), source)
        flops = {dtype: peak / parts for dtype, peak in flops.items()}
        memory, bandwidth = self.machine.memory // parts, max(reads) / parts
        return Device(name, self.machine.cpu, "this machine", "cpu", flops, memory, bandwidth, provenance=measured)

    def node(self, name: str = "this", parts: int = 1) -> Node:
        """This machine as a node of one device, or of as many as it has cores: engines that share it. They meet in its memory.

        Raises InputError for more parts than cores.
        """
        title = f"{self.machine.cpu}, measured {self.taken}"
        if parts == 1:
            return Node(name, title, self.device(name), 1, "none", None)
        cores = max(1, int(self.machine.usable_cores))
        if not 1 <= parts <= cores:
            raise InputError(f"{parts} parts of a machine with {cores} cores", f"give 1 to {cores}", field="cluster")
        links = {one.name: one for one in self.links}
        one = links.get("shared-memory", links.get("loopback"))
        part = self.device(f"{name}/{parts}", parts)
        link = None if one is None else one.link(self.source)
        return Node(f"{parts}x{name}", f"{title}, in {parts} parts", part, parts, "none" if link is None else "mesh", link)

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.model_dump(mode="json"), indent=1) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)


def spelled(text: str) -> tuple[Path, int] | None:
    """The profile that `[COUNTx]PATH.json` names and in how many parts its machine is seen; None for what names no profile."""
    if not text.endswith(".json"):
        return None
    match = re.fullmatch(r"([0-9]{1,4})x(.+)", text)
    return (Path(text), 1) if match is None or Path(text).exists() else (Path(match[2]), int(match[1]))


def default_path() -> Path:
    """Where `calibrate` writes unless told otherwise: profile.json in the cache folder."""
    return cache_dir() / "profile.json"


def load(path: Path | None = None) -> Profile:
    """A profile. Raises NotFoundError (with the command that makes one), FormatError (with the key at fault)."""
    path = default_path() if path is None else path
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise NotFoundError(f"cannot read the profile {path} ({error.strerror})", f"run armillary calibrate --output {path}") from error
    if len(content) > MAX_BYTES:
        raise FormatError(f"the profile {path} is over {MAX_BYTES:,} bytes", "is it a profile?")
    try:
        values: Any = json.loads(content)
        return Profile.model_validate(values)
    except (ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise FormatError(f"{path} is not JSON: {error}", "run armillary calibrate again") from error
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if where == "version":
            raise FormatError(f"{path} is a profile of another version than {VERSION}", "run armillary calibrate again") from error
        raise FormatError(
            f"{path}: {where or 'the profile'}: {first['msg'][:200]}", "run armillary calibrate again", field=where
        ) from error
