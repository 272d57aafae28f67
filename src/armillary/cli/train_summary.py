"""What a reader is told of a training run: what it is before it starts, and what came out of it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from armillary.train.build import Run
    from armillary.train.session import Session
    from armillary.web.report import Metric


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
        *(
            f"mixture {name}: {part['documents']:,} documents an epoch, {part['passes']:.3g} passes, {part['share_of_tokens']:.1%} of the tokens"
            for name, part in run.sources()["train"].get("mixture", {}).items()
        ),
        f"step: {config.batch.rows} rows of {config.batch.length} tokens in {passes} micro-batches; {config.steps:,} steps",
        f"optimizer: {config.optimizer.name}, learning rate {config.optimizer.options()['lr']:g}, {config.schedule.name} schedule, {config.precision}",
        *([f"layout: {layout}, {layout.world} ranks"] if layout.world > 1 else []),
        *(
            [
                "packing: conversations are cut where rows end, and go on without what came before; data.packing = 'documents' keeps them whole"
            ]
            if config.data.packing == "concat" and run.train.scored(0) is not None
            else []
        ),
    ]


def memory_lines(run: Run) -> list[str]:
    """What a step's tensors will take, predicted before the first one; what a layout shares between ranks is not predicted, and said."""
    from collections import Counter

    from armillary.train.build import predict_memory
    from armillary.train.parallel.layout import Layout

    layout = Layout.parse(run.config.layout)
    lines = [f"{name:<11} {size:>8}  {meaning}" for name, size, meaning in predict_memory(run.config, run.decoder.config).table()]
    levels = Counter(run.plan)
    if levels.keys() != {"none"}:
        lines.append("checkpointing: " + ", ".join(f"{level} in {count} blocks" for level, count in levels.items()))
    shares = f", on a rank that shares nothing with the others (what {layout} saves and adds is not predicted)" if layout.world > 1 else ""
    return [f"predicted memory of tensors{shares}:", *(f"  {line}" for line in lines)]


def check_memory(run: Run) -> None:
    """Raises CapacityError when a step of one process on the CPU would take more memory than there is: the system would end it without a word."""
    import torch

    from armillary.core.errors import CapacityError
    from armillary.core.units import format_bytes
    from armillary.serve.kv_pool import available_memory
    from armillary.train.build import predict_memory

    free = available_memory()
    if free is None or run.parallel.world > 1 or torch.cuda.is_available():
        return
    prediction = predict_memory(run.config, run.decoder.config)
    more = prediction.peak - prediction.parameters  # those are there already
    if more > free:
        raise CapacityError(
            f"a step would take {format_bytes(more)} beside the weights; {format_bytes(free)} of memory are free",
            "lower batch.micro_rows or batch.length, or let blocks keep less (memory.checkpointing)",
            field="batch.micro_rows",
        )


def finish(session: Session, json: bool = False) -> None:
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
    llm = LLM(str(session.folder / MODEL), kv_memory=64_000_000, max_running=1, weight_cache="off")  # one run, one start: nothing to keep
    answer = llm.generate([tuple(opening)], SamplingParams(max_tokens=min(tokens, room), temperature=0.8, seed=0))[0]
    return f"{run.tokenizer.decode(opening)}{answer.text}"


def _print_line(value: dict[str, Any]) -> None:
    import json

    print(json.dumps(value), flush=True)
