"""`armillary train`: pre-train a new model, or fine-tune one, from a TOML file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from armillary.core.config import Resolved
    from armillary.train.build import Run
    from armillary.train.config import TrainConfig
    from armillary.train.session import Session
    from armillary.web.report import Metric


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
    finish(session, resolved, json)
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
    from armillary.train.parallel.launch import launched

    with launched() as rank:
        yield rank


def _on_ray(resolved: Resolved[TrainConfig], runs: Path, resume: Path | None, json: bool) -> None:
    """The same command on every rank; after a loss it goes on in the folder that the first attempt made."""
    from armillary.cli.terminal import note
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
        finish(session, resolved)

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
    session.view = progress.choose(heading(session), config.steps, json)
    try:
        session.go()
    finally:
        session.view.close()
    return session


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


def heading(session: Session) -> str:
    """What is trained, in a few words."""
    from armillary.core.units import format_count

    run = session.run
    parameters = format_count(run.decoder.config.parameters())
    return f"fine-tuning {run.config.model}" if run.config.model else f"pre-training a model of {parameters} parameters"


def describe(run: Run) -> list[str]:
    """The run in lines, before it starts."""
    from armillary.core.units import format_count
    from armillary.train.parallel.layout import Layout

    config = run.config
    shape = run.decoder.config
    layout = Layout.parse(config.layout)
    passes = -(-config.batch.rows // layout.dp // config.batch.micro_rows)
    total, have = run.tokens_per_step * config.steps, int(run.train.lengths.sum())
    return [
        f"model: {shape.architecture}, {format_count(shape.parameters())} parameters, {shape.num_layers} layers of {shape.hidden_size}, "
        f"vocabulary {shape.vocab_size:,}, context {shape.max_context:,}",
        f"data: {have:,} tokens in {run.train.lengths.size:,} documents; {total:,} will be read, {total / have:.2g} passes",
        f"step: {config.batch.rows} rows of {config.batch.length} tokens in {passes} micro-batches; {config.steps:,} steps",
        f"optimizer: {config.optimizer.name}, learning rate {config.optimizer.options()['lr']:g}, {config.schedule.name} schedule, {config.precision}",
        *([f"layout: {layout}, {layout.world} ranks"] if layout.world > 1 else []),
    ]


def memory_lines(run: Run) -> list[str]:
    """What a step's tensors will take, predicted before the first one; what a layout shares between ranks is not predicted, and said."""
    from collections import Counter

    from armillary.train.build import checkpointing_plan, predict_memory
    from armillary.train.parallel.layout import Layout

    layout = Layout.parse(run.config.layout)
    lines = [f"{name:<11} {size:>8}  {meaning}" for name, size, meaning in predict_memory(run.config, run.decoder.config).table()]
    levels = Counter(checkpointing_plan(run.config, run.decoder.config))
    if levels.keys() != {"none"}:
        lines.append("checkpointing: " + ", ".join(f"{level} in {count} blocks" for level, count in levels.items()))
    shares = f", on a rank that shares nothing with the others (what {layout} saves and adds is not predicted)" if layout.world > 1 else ""
    return [f"predicted memory of tensors{shares}:", *(f"  {line}" for line in lines)]


def finish(session: Session, resolved: Resolved[TrainConfig], json: bool = False) -> None:
    """Sample from the saved model, write the report, print the result."""
    from armillary import __version__
    from armillary.cli.terminal import table
    from armillary.cluster.machine import describe as describe_machine
    from armillary.train.session import CONFIG, MODEL, TRACE
    from armillary.web.train_report import write_train_report

    if not session.readings:
        return
    metrics = training_metrics(session)
    text = sample(session)
    machine = describe_machine()
    facts = {
        **dict(line.split(": ", 1) for line in describe(session.run)),
        "machine": f"{machine.cpu}, {machine.physical_cores} cores" + (f", {machine.gpus[0].name}" if machine.gpus else ", no GPU"),
        "software": f"armillary {__version__}, torch {machine.torch}, Python {machine.python}, {machine.system}",
        "time": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }
    title = heading(session)
    last = session.readings[-1]
    write_train_report(
        session.readings,
        [(step, result.loss) for step, result in session.evaluations],
        session.trace,
        metrics,
        session.folder / "report.html",
        title=title[:1].upper() + title[1:],
        lead=f"{last.step:,} steps, {last.tokens:,} tokens",
        facts=facts,
        config=(session.folder / CONFIG).read_text(encoding="utf-8"),
        sample=text,
    )
    if json:
        end = {
            "event": "end",
            "run": str(session.folder),
            "interrupted": session.interrupted,
            "metrics": {m.name: m.value for m in metrics},
            "sample": text,
        }
        _print_line(end)
        return
    if text:
        print(f"\n{text}\n")
    table(("", "", ""), [(metric.name, metric.value, metric.meaning) for metric in metrics])
    print(
        f"\nreport  {session.folder / 'report.html'}\ntrace   {session.folder / TRACE} (opens in ui.perfetto.dev)\n"
        f"model   {session.folder / MODEL} (armillary serve {session.folder / MODEL})",
        flush=True,
    )


def training_metrics(session: Session) -> list[Metric]:
    """The result's table: what, how much, and what it means."""
    from armillary.core.units import S, format_bytes, format_count, format_duration
    from armillary.web.report import Metric

    readings, first, last = session.readings, session.readings[0], session.readings[-1]
    seconds = sum(reading.seconds for reading in readings)
    tail = readings[-max(1, len(readings) // 10) :]
    rows = [
        Metric(
            "training loss",
            f"{sum(r.loss for r in tail) / len(tail):.4f}",
            f"nats a token over the last {len(tail)} steps; the first was {first.loss:.4f}",
        ),
    ]
    if len(session.evaluations) >= 2:
        (_, before), (step, after) = session.evaluations[0], session.evaluations[-1]
        rows.append(
            Metric(
                "held-out perplexity",
                f"{after.perplexity:.2f}",
                f"on {after.tokens:,} tokens that were not trained on, after {step:,} steps; before training {before.perplexity:,.2f}",
            )
        )
    rows += [
        Metric("steps", f"{last.step:,}", f"in {format_duration(seconds * S)}"),
        Metric("tokens", f"{last.tokens:,}", "read by the model, targets and context alike"),
        Metric("speed", f"{format_count(round(sum(r.tokens_per_second for r in tail) / len(tail)))} tok/s", "mean over the last steps"),
    ]
    if last.mfu is not None and last.hfu is not None:
        rows.append(
            Metric("MFU", f"{100 * last.mfu:.1f} %", "the model's arithmetic (PaLM's formula) over the measured peak of matrix products")
        )
        if last.hfu != last.mfu:
            rows.append(Metric("HFU", f"{100 * last.hfu:.1f} %", "with the activations that were computed again"))
    rows += [
        Metric("memory", format_bytes(max(r.memory for r in readings)), "the most that the process held after a step"),
        Metric("waiting for data", f"{100 * last.waited:.2f} %", "of the last steps' time"),
    ]
    skipped = sum(reading.skipped for reading in readings)
    if skipped:
        rows.append(Metric("skipped steps", f"{skipped:,}", "fp16 gradients overflowed; nothing was updated"))
    return rows


def sample(session: Session, tokens: int = 80) -> str:
    """How the saved model continues the first words of a held-out document: the folder, read back as `serve` reads it."""
    from armillary.serve.llm import LLM
    from armillary.serve.request import SamplingParams
    from armillary.train.session import MODEL

    run = session.run
    source = run.validation or run.train
    opening = source.document(0)[:12].tolist()
    room = run.decoder.config.max_context - len(opening)
    if room < 1:
        return ""
    llm = LLM(str(session.folder / MODEL), kv_memory=64_000_000, max_running=1)
    answer = llm.generate([tuple(opening)], SamplingParams(max_tokens=min(tokens, room), temperature=0.8, seed=0))[0]
    return f"{run.tokenizer.decode(opening)}{answer.text}"


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
    from armillary.cli.terminal import print_json
    from armillary.core.config import to_toml
    from armillary.train.build import build

    run = build(resolved.value, dry=True)
    lines = [*describe(run), *memory_lines(run)]
    if json:
        print_json({"lines": lines, "config": resolved.value.model_dump(mode="json"), "provenance": dict(resolved.provenance)})
        return
    print("\n".join([*lines, "", to_toml(resolved.value, resolved.provenance)]))


def _print_line(value: dict[str, Any]) -> None:
    import json

    print(json.dumps(value), flush=True)
