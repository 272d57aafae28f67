"""`armillary train`: pre-train a new model, or fine-tune one, from a TOML file."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from armillary.core.config import Resolved
    from armillary.train.config import TrainConfig
    from armillary.train.session import Session


def train(
    *config: Annotated[
        str, Parameter(allow_leading_hyphen=True, help="A TOML file, then any key as a flag: --optimizer.lr 3e-4. --keys lists them.")
    ],
    runs: Annotated[Path, Parameter(help="Where the run's folder goes.")] = Path("runs"),
    deepspeed: Annotated[Path | None, Parameter(help="A DeepSpeed JSON: what both have is taken over, the rest refused by name.")] = None,
    resume: Annotated[
        Path | None, Parameter(help="Go on with this run (of a folder of runs: the newest) from its last checkpoint.")
    ] = None,
    dry_run: Annotated[bool, Parameter(negative=(), help="Say what would be trained, and stop.")] = False,
    ray: Annotated[
        bool, Parameter(negative=(), help="Run the layout's ranks as Ray actors; a lost one costs the steps since the last checkpoint.")
    ] = False,
    list_keys: Annotated[
        bool, Parameter(name="--keys", negative=(), help="List every key with its default and meaning, and stop.")
    ] = False,
    json: Annotated[
        bool, Parameter(name="--json", negative=(), show_default=False, help="A JSON object a line on stdout: steps, evaluations, the end.")
    ] = False,
) -> int:
    """Pre-train a new model, or fine-tune one, from a TOML file.

    The run's folder under --runs gets config.toml (with where each value came from), metrics.jsonl, checkpoints/, trace.json, report.html
    and model/, which `armillary serve` takes. Ctrl-C ends the run after the current step and saves it; --resume goes on, bit for bit.
    """
    from armillary.cli.main import INTERRUPTED
    from armillary.cli.terminal import note
    from armillary.cli.train_summary import finish
    from armillary.core.run_folder import check_runs

    if list_keys:
        _print_keys(json)
        return 0
    file = Path(config[0]) if config and not config[0].startswith("-") else None
    if resume is not None:
        resume = _settle_resume(resume, file, deepspeed)
    resolved = settle_training(file or (resume and _config_of(resume)), config[file is not None :], deepspeed)
    if dry_run:
        _dry_run(resolved, json)
        return 0
    check_runs(runs)
    if ray:
        _on_ray(resolved, runs, resume, json)
        return 0
    with _rank() as rank:
        if rank > 0:
            _follow(resolved, runs, resume)
            return 0
        session = train_session(resolved, runs, json, resume)
    with _naming(session.folder):
        finish(session, json)
    if session.interrupted:
        note(
            f"interrupted after {session.run.trainer.progress.step:,} of {resolved.value.steps:,} steps; armillary train --resume {session.folder} goes on"
        )
        return INTERRUPTED
    return 0


@contextmanager
def _rank() -> Iterator[int]:
    """This process's rank, within the process group that a launcher's environment describes; 0 without one."""
    if "WORLD_SIZE" not in os.environ:  # PyTorch is loaded later, where the reader is told of it
        yield 0
        return
    from armillary.cli.terminal import note
    from armillary.train.parallel.launch import JOIN_SECONDS, launched

    def missed() -> None:
        told = {name: os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        note(
            "rank {RANK} of {WORLD_SIZE} waits for the others at {MASTER_ADDR}:{MASTER_PORT}".format(**told)
            + f", at most {JOIN_SECONDS:g} s ..."
        )

    waiting = threading.Timer(5, missed)
    waiting.daemon = True
    waiting.start()
    try:
        with launched() as rank:
            waiting.cancel()
            yield rank
    finally:
        waiting.cancel()


def _on_ray(resolved: Resolved[TrainConfig], runs: Path, resume: Path | None, json: bool) -> None:
    """The same command on every rank; after a loss it goes on in the folder that the first attempt made."""
    from armillary.cli.terminal import note
    from armillary.cli.train_summary import finish
    from armillary.core.errors import InputError
    from armillary.train.parallel.layout import Layout
    from armillary.train.parallel.ray import run_on_ray
    from armillary.train.session import CONFIG

    if json:
        raise InputError(
            "--json with --ray: Ray puts a prefix before each line of a rank", "read metrics.jsonl in the run's folder", field="json"
        )
    here, runs = Path.cwd(), runs.resolve()
    before = set(runs.glob("*"))

    def work(attempt: int) -> None:
        os.chdir(here)  # paths in the configuration are relative to where the command was given
        made = [folder for folder in sorted(runs.glob("*")) if folder not in before and (folder / CONFIG).is_file()]
        folder = made[-1] if attempt and made else resume
        with _rank() as rank:
            if rank > 0:
                _follow(resolved, runs, folder)
                return
            session = train_session(resolved, runs, resume=folder)
        finish(session)

    run_on_ray(Layout.parse(resolved.value.layout).world, work, tell=note)


def _follow(resolved: Resolved[TrainConfig], runs: Path, resume: Path | None) -> None:
    """The run of a rank other than 0: the same without a word, in the folder that rank 0 names."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        train_session(resolved, runs, resume=resume)


def settle_training(file: Path | None, words: Sequence[str] = (), deepspeed: Path | None = None) -> Resolved[TrainConfig]:
    """Default < file < DeepSpeed's JSON < environment < flag. `words` are `--a.b value` or `--a.b=value`."""
    from armillary.core.config import Resolved, resolve
    from armillary.train.config import TrainConfig

    flags = _parse(words)
    if deepspeed is None:
        return resolve(TrainConfig, file=file, flags=flags)
    from armillary.cli.terminal import note
    from armillary.train.deepspeed import read_deepspeed

    imported = read_deepspeed(deepspeed, int(os.environ.get("WORLD_SIZE", "1")))
    for line in imported.notes:
        note(f"{deepspeed}: {line}")
    settled = resolve(TrainConfig, file=file, flags={**imported.flags, **flags})
    origin = {key: f"file {deepspeed}" if key in imported.flags and key not in flags else told for key, told in settled.provenance.items()}
    return Resolved(settled.value, origin)


def train_session(resolved: Resolved[TrainConfig], runs: Path, json: bool = False, resume: Path | None = None) -> Session:
    """Train in a new folder under `runs`, or go on in `resume`, telling the reader everything on the way. It then holds all but the report."""
    from armillary.cli.terminal import byte_progress, note, timed
    from armillary.cli.train_summary import check_memory, describe, heading, memory_lines
    from armillary.models import hub
    from armillary.train import progress

    config = resolved.value
    if config.model is not None:
        with byte_progress(config.model) as report:
            hub.resolve(config.model, progress=report)
    with timed("loading PyTorch") as done:
        import torch

        from armillary.cluster.measure import measure
        from armillary.train.parallel.agreement import gathered
        from armillary.train.session import open_session

        done("loaded PyTorch")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with timed("measuring this machine's arithmetic") as done:
        ranks = len(gathered(None))  # all at the same time: those of one machine share its cores
        peak = measure(0.4).gemm
        whose = "this machine multiplies" if ranks == 1 else f"beside {ranks - 1} others, this rank multiplies"
        done(f"{whose} matrices at {peak / 1e9:.0f} GFLOP/s: the peak that MFU is a share of")
    with timed("opening the model and the data") as done:
        session = open_session(resolved, runs, peak=peak, resume=resume)
        done("opened the model and the data")
    for line in describe(session.run):
        note(line)
    for line in memory_lines(session.run):
        note(line)
    note(f"run {session.folder}" + (f", from step {session.run.trainer.progress.step:,} on" if resume else ""))
    made = session.run.trainer.progress.step
    if made >= config.steps:
        note(
            f"nothing is left to train: {made:,} of {config.steps:,} steps are made (--steps asks for more); the model and the report are written anew"
        )
    else:
        check_memory(session.run)
        note("scoring held-out text, then the first step ..." if session.evaluates_first else "the first step ...")
    session.view = progress.choose(heading(session), config.steps, json)
    try:
        with _naming(session.folder):
            session.go()
    finally:
        session.view.close()
    return session


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """A disk that fills up while a run writes is told with the run's folder and how the run goes on."""
    from armillary.core.errors import CapacityError

    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CapacityError(
            f"{folder} could not be written ({error.strerror})", f"free disk space, then: armillary train --resume {folder}"
        ) from error


def _settle_resume(resume: Path, file: Path | None, deepspeed: Path | None) -> Path:
    from armillary.core.errors import InputError
    from armillary.train.session import find_run

    if file is not None or deepspeed is not None:
        raise InputError(
            f"--resume takes the configuration of its run, and {file or deepspeed} is given too",
            "leave it out; flags may change single keys",
        )
    return find_run(resume)


def _config_of(run: Path) -> Path:
    from armillary.train.session import CONFIG

    return run / CONFIG


def _parse(words: Sequence[str]) -> dict[str, Any]:
    """`--a.b value` and `--a.b=value` as dotted keys and typed values."""
    from armillary.core.config import from_text
    from armillary.core.errors import InputError
    from armillary.train.config import TrainConfig

    flags: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise InputError(f"{word!r} is no key", "write --key value, such as --optimizer.lr 3e-4")
        key, given, text = word[2:].partition("=")
        if not given:
            if not rest:
                raise InputError(f"{word} has no value", f"write {word} VALUE")
            text = rest.pop(0)
        key = key.replace("-", "_")
        value = from_text(TrainConfig, key, text)
        flags[key] = "none" if value is None else value  # given, and not the same as left out
    return flags


def _print_keys(json: bool) -> None:
    from armillary.cli.terminal import print_json, table
    from armillary.core.config import documented_keys
    from armillary.train.config import TrainConfig

    rows = documented_keys(TrainConfig)
    if json:
        print_json([{"key": key, "default": default, "meaning": meaning} for key, default, meaning in rows])
    else:
        table(("key", "default", "meaning"), [(key, "none" if default is None else default, meaning) for key, default, meaning in rows])


def _dry_run(resolved: Resolved[TrainConfig], json: bool) -> None:
    """The run in lines and its configuration, without a step and without a folder."""
    from armillary.cli.terminal import print_json, timed
    from armillary.cli.train_summary import describe, memory_lines
    from armillary.core.config import to_toml

    with timed("loading PyTorch, the model and the data") as done:
        from armillary.train.build import build

        run = build(resolved.value, dry=True)
        lines = [*describe(run), *memory_lines(run)]
        done("loaded PyTorch, the model and the data, predicted the memory of a step")
    if json:
        print_json({"lines": lines, "config": resolved.value.model_dump(mode="json"), "provenance": dict(resolved.provenance)})
        return
    print("\n".join([*lines, "", to_toml(resolved.value, resolved.provenance)]))
