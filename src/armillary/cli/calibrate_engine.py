"""`armillary calibrate --model`: what the engine's iterations cost on this machine, added to its profile."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from armillary.cli.settings import EngineFlags
    from armillary.cluster.profile import Profile
    from armillary.sim.costs.fitted import Fitted


def with_engine(profile: Profile, model: str, flags: EngineFlags, seconds: float) -> tuple[Profile, str, Fitted]:
    """The profile with one engine more (or again), the section's name, and the curves through it. Loads the model."""
    import os

    from armillary.cli.launch import check_fit
    from armillary.cli.settings import settle
    from armillary.cli.terminal import note, timed
    from armillary.cluster.machine import describe
    from armillary.cluster.others import Others
    from armillary.cluster.profile import QUIET_LOAD, QUIET_OTHERS
    from armillary.sim.costs.fitting import fit

    settled = settle(model, flags)
    check_fit(settled)
    with timed("loading PyTorch"):
        from armillary.models.load import load
        from armillary.serve import calibration
        from armillary.serve.llm import build_engine
    with timed(f"loading {model}"):
        loaded = load(model)
        engine = build_engine(loaded, settled.value.engine)
    load_before, others = os.getloadavg()[0], Others()
    said = [""]

    def tell(what: str, share: float) -> None:
        words = f"measuring {what}"
        if words != said[0]:
            said[0] = words
            note(f"{words} ...")

    with timed(f"measuring iterations of {model}") as done:
        samples = calibration.measure(engine, loaded.config.vocab_size, seconds=seconds, progress=tell)
        done(f"measured {len(samples)} iterations of {model}")
    taken_by_others = others.share(describe().logical_cores)
    disturbed = []
    if load_before > QUIET_LOAD:
        disturbed.append(f"load average {load_before:.2f} before")
    if taken_by_others is not None and taken_by_others > QUIET_OTHERS:
        disturbed.append(f"others took {taken_by_others:.0%} of the cores' time")
    known = calibration.identity(loaded.config, engine.config, engine.executor.threads)  # type: ignore[attr-defined]
    name = calibration.section(model, known)
    about = known | {"model": model, "taken": _now(), "disturbed": "; ".join(disturbed)}
    rows = calibration.rows_of(about, samples)
    changed = profile.model_copy(update={"engine": profile.engine | {name: rows}})
    return changed, name, fit(name, samples)


def curves(model: Fitted) -> dict[str, Any]:
    """What was found, for --json."""
    return {
        "tokens": dict(zip(model.tokens.at, model.tokens.values, strict=True)),
        "rows": dict(zip(model.rows.at, model.rows.values, strict=True)),
        "host": asdict(model.host),
        "errors": None if model.errors is None else asdict(model.errors),
    }


def print_curves(name: str, model: Fitted) -> None:
    """What an iteration costs, in a few lines."""
    from armillary.cli.terminal import table
    from armillary.core.units import format_duration
    from armillary.sim.batch import Batch

    prompts = [tokens for tokens in (16, 64, 128, 256, 512, 1024) if tokens <= model.tokens.at[-1]]
    table(
        ("", *(f"{tokens} tokens" for tokens in prompts)),
        [("a prompt", *(format_duration(model.iteration(Batch(((tokens, 0),), sampled=1))) for tokens in prompts))],
        title=f"{name}: an iteration takes",
    )
    counts = [count for count in (1, 4, 16, 64) if count <= model.rows.at[-1]]
    table(
        ("each after", *(f"{count} decode{'s' if count > 1 else ''}" for count in counts)),
        [
            (f"{cached} tokens", *(format_duration(model.iteration(Batch((), count, count * cached, count))) for count in counts))
            for cached in (128, 1024)
        ],
    )
    print(f"Beside the kernels: {format_duration(model.host.fixed)} and {format_duration(model.host.per_sequence)} a sequence.")
    print(f"Wrong by {model.errors}.")


def _now() -> str:
    import datetime

    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
