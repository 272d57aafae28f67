"""An input pipeline as data: a source and the operators that its elements pass, in order.

    pipeline = Pipeline.of(read_lines).map(parse, parallelism=AUTO).shuffle(1000, seed=0).batch(32).prefetch(AUTO)

Executors carry it out; what comes out, and in which order, is the same for every executor and every parallelism. `AUTO` leaves a number
to the autotuner (`policies.autotune`), which fills it in from measured costs: `pipeline.tuned({"map": 4, "prefetch": 2})`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal

from armillary.core.errors import InputError

AUTO: Final = None
"""In place of a parallelism or a depth: the autotuner decides."""
MAX_PARALLELISM: Final = 1024
MAX_BUFFER: Final = 1 << 24  # elements
Workers = Literal["thread", "process"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where elements come from: `open()` gives an iterable of the epoch's elements, the same each time.

    A resumed run skips what was read: at once when the iterable is a sequence, else by reading it again.
    """

    name: str
    open: Callable[[], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class Map:
    """`function` of every element. With a parallelism of 2 or more (or AUTO), by that many workers, one of which reads ahead.

    `ordered=False` passes on whatever is ready first: faster when costs vary, but such a run has no order to resume in.
    Threads help functions that wait or leave Python (NumPy, tokenizers, decoding, files); others need `workers="process"`, for which
    the function and the elements must be picklable.
    """

    name: str
    function: Callable[[Any], Any]
    parallelism: int | None = 1
    workers: Workers = "thread"
    ordered: bool = True


@dataclass(frozen=True, slots=True)
class Filter:
    """The elements for which `function` is true."""

    name: str
    function: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Interleave:
    """`function` turns each element into an iterable (a file into its lines); `cycle` of them are read in turns, `block` elements a turn.

    With a parallelism of 2 or more (or AUTO), that many of them are read at once, in the background.
    """

    name: str
    function: Callable[[Any], Iterable[Any]]
    cycle: int
    block: int = 1
    parallelism: int | None = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """`size` elements as one; the last may be smaller unless `drop_remainder`. `function` makes it of a list."""

    name: str
    size: int
    drop_remainder: bool = False
    function: Callable[[list[Any]], Any] = list


@dataclass(frozen=True, slots=True)
class Shuffle:
    """Each run of `window` elements in an order drawn from (seed, epoch, number of the window)."""

    name: str
    window: int
    seed: int


@dataclass(frozen=True, slots=True)
class Prefetch:
    """At most `depth` elements are made ahead of their use, by a thread of their own."""

    name: str
    depth: int | None = AUTO


Operator = Map | Filter | Interleave | Batch | Shuffle | Prefetch
_KNOBS: Final = {Map: "parallelism", Interleave: "parallelism", Prefetch: "depth"}
# What no parallelism may change, and so what a saved position depends on.
_ORDER: Final = ("name", "cycle", "block", "size", "drop_remainder", "window", "seed", "ordered")


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A source and its operators, each with a name of its own. Raises `InputError` for numbers out of bounds and for equal names."""

    source: Source
    operators: tuple[Operator, ...] = ()

    def __post_init__(self) -> None:
        names = [self.source.name, *(operator.name for operator in self.operators)]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"the pipeline has several operators named {repeated[0]!r}", "give each its own name")
        bounds = {
            "parallelism": MAX_PARALLELISM,
            "depth": MAX_BUFFER,
            "size": MAX_BUFFER,
            "window": MAX_BUFFER,
            "cycle": 4096,
            "block": MAX_BUFFER,
        }
        for operator in self.operators:
            for key, high in bounds.items():
                value = getattr(operator, key, None)
                if value is not None and not 1 <= value <= high:
                    raise InputError(
                        f"operator {operator.name!r} has {key} {value}, outside 1 .. {high:,}", "choose a number between", field=key
                    )
            if isinstance(operator, Map) and operator.workers not in ("thread", "process"):
                raise InputError(
                    f"operator {operator.name!r} has workers {operator.workers!r}", "use 'thread' or 'process'", field="workers"
                )

    @classmethod
    def of(cls, open: Callable[[], Iterable[Any]], name: str = "source") -> Pipeline:
        """A pipeline of the source alone. For a list: `Pipeline.of(lambda: values)`."""
        return cls(Source(name, open))

    def map(
        self,
        function: Callable[[Any], Any],
        *,
        parallelism: int | None = 1,
        workers: Workers = "thread",
        ordered: bool = True,
        name: str = "",
    ) -> Pipeline:
        return self.then(Map(name or self._fresh("map"), function, parallelism, workers, ordered))

    def filter(self, function: Callable[[Any], bool], *, name: str = "") -> Pipeline:
        return self.then(Filter(name or self._fresh("filter"), function))

    def interleave(
        self, function: Callable[[Any], Iterable[Any]], *, cycle: int, block: int = 1, parallelism: int | None = 1, name: str = ""
    ) -> Pipeline:
        return self.then(Interleave(name or self._fresh("interleave"), function, cycle, block, parallelism))

    def batch(self, size: int, *, drop_remainder: bool = False, function: Callable[[list[Any]], Any] = list, name: str = "") -> Pipeline:
        return self.then(Batch(name or self._fresh("batch"), size, drop_remainder, function))

    def shuffle(self, window: int, *, seed: int, name: str = "") -> Pipeline:
        return self.then(Shuffle(name or self._fresh("shuffle"), window, seed))

    def prefetch(self, depth: int | None = AUTO, *, name: str = "") -> Pipeline:
        return self.then(Prefetch(name or self._fresh("prefetch"), depth))

    def then(self, *operators: Operator) -> Pipeline:
        """This pipeline with more operators."""
        return replace(self, operators=(*self.operators, *operators))

    def knobs(self) -> dict[str, int | None]:
        """Every number that changes the speed and nothing else, by operator; None is AUTO."""
        return {operator.name: getattr(operator, key) for operator in self.operators if (key := _KNOBS.get(type(operator)))}

    def automatic(self) -> tuple[str, ...]:
        """The operators whose numbers the autotuner decides."""
        return tuple(name for name, value in self.knobs().items() if value is AUTO)

    def tuned(self, numbers: Mapping[str, int]) -> Pipeline:
        """This pipeline with numbers in place of its knobs. Raises `InputError` for an operator that has none."""
        if unknown := sorted(set(numbers) - set(self.knobs())):
            raise InputError(f"operator {unknown[0]!r} has no number to tune", f"these have: {', '.join(self.knobs()) or 'none'}")
        changed: list[Operator] = []
        for operator in self.operators:
            number = numbers.get(operator.name)
            if number is not None and isinstance(operator, Prefetch):
                operator = replace(operator, depth=number)
            elif number is not None and isinstance(operator, Map | Interleave):
                operator = replace(operator, parallelism=number)
            changed.append(operator)
        return replace(self, operators=tuple(changed))

    def order(self) -> list[dict[str, Any]]:
        """JSON data: what decides the order of the elements. Equal for pipelines that differ in tuning only."""
        described = [{"kind": "Source", "name": self.source.name}]
        for operator in self.operators:
            if not isinstance(operator, Prefetch):
                described.append(
                    {"kind": type(operator).__name__, **{f.name: getattr(operator, f.name) for f in fields(operator) if f.name in _ORDER}}
                )
        return described

    def _fresh(self, kind: str) -> str:
        taken = sum(operator.name.split(" ")[0] == kind for operator in self.operators)
        return f"{kind} {taken + 1}" if taken else kind
