"""`armillary data`: text into token shards, what is in them, near duplicates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from armillary.cli.settings import Json

data = App(name="data")

Texts = Annotated[
    tuple[str, ...],
    Parameter(help="A corpus of `armillary data list`, or files and folders: .txt, .jsonl, .parquet, Hugging Face folders."),
]
Field = Annotated[str, Parameter(help="The field of a record that holds the text.")]
Threshold = Annotated[float, Parameter(help="Jaccard similarity of 8-character shingles from which two texts are near duplicates.")]


@data.default
@data.command(name="list")
def list_corpora(*, json: Json = False) -> None:
    """The corpora that have a name, and which of them are on this machine."""
    from armillary.cli.terminal import print_json, table
    from armillary.core.paths import cache_dir
    from armillary.core.units import format_bytes
    from armillary.data.corpora import corpora

    known = [(corpus, cache_dir() / "corpora" / corpus.name) for corpus in corpora().values()]
    if json:
        print_json(
            [
                {"name": c.name, "title": c.title, "licence": c.licence, "files": c.files, "bytes": c.bytes, "cached": path.is_dir()}
                for c, path in known
            ]
        )
        return
    table(
        ("name", "texts", "licence", "files", "size", "on this machine"),
        [
            (c.name, c.title, c.licence, f"{c.files:,}", format_bytes(c.bytes), path if path.is_dir() else "fetched at first use")
            for c, path in known
        ],
    )
    print("armillary data prepare NAME --train-bpe 4096 --out DIR makes token shards of one; files and folders work wherever a name does.")


@data.command(name="prepare")
def prepare(
    texts: Texts,
    /,
    *,
    out: Annotated[Path, Parameter(help="The folder to make: tokenizer/, train/ and validation/.")],
    tokenizer: Annotated[
        str | None, Parameter(help="Tokenize as this model does: a name of `armillary models`, a .gguf file, a model or tokenizer folder.")
    ] = None,
    train_bpe: Annotated[int | None, Parameter(help="Learn a byte-level BPE vocabulary of this size from the training texts.")] = None,
    validation: Annotated[float, Parameter(help="Share of the text held out, whole documents.")] = 0.1,
    seed: Annotated[int, Parameter(help="Decides which documents are held out.")] = 0,
    dedup: Annotated[float | None, Parameter(help="Keep only the first of near duplicates at or above this Jaccard similarity.")] = None,
    split: Annotated[str | None, Parameter(help="Of folders, only the files of this split: train, validation or test.")] = None,
    chat: Annotated[
        bool, Parameter(negative=(), help="The records are conversations: render them, and learn the assistant's part only.")
    ] = False,
    field: Annotated[
        str | None, Parameter(help="The field of a record that holds the text (default: text, or messages with --chat).")
    ] = None,
    json: Json = False,
) -> None:
    """Make token shards of texts or chats: one folder that `armillary train` reads."""
    from armillary.cli.terminal import print_json, table
    from armillary.core.errors import InputError
    from armillary.core.units import format_bytes
    from armillary.data.prepare import prepare_chats, prepare_text

    if (tokenizer is None) == (train_bpe is None):
        raise InputError("the vocabulary is not settled", "give either --tokenizer MODEL or --train-bpe SIZE")
    if chat and (tokenizer is None or dedup is not None):
        raise InputError(
            "chats are rendered with a model's own template, one by one", "give --tokenizer MODEL, and no --train-bpe or --dedup"
        )
    with _progress() as progress:
        files = _files(texts, split, progress)
        reads = None if tokenizer is None else _tokenizer(tokenizer, progress)
        shared: dict[str, Any] = {"validation": validation, "seed": seed, "name": " ".join(texts), "progress": progress}
        if chat and reads is not None:
            made = prepare_chats(files, out, tokenizer=reads, field=field or "messages", **shared)
        else:
            made = prepare_text(files, out, tokenizer=reads, vocabulary=train_bpe, field=field or "text", duplicates_from=dedup, **shared)
    parts = {"train": made.train} | ({} if made.validation is None else {"validation": made.validation})
    removed = len(made.duplicates.removed) if made.duplicates else 0
    if json:
        print_json(
            {
                "folder": str(out),
                "vocabulary": made.tokenizer.vocab_size,
                "tokenizer": made.train.tokenizer,
                "near_duplicates_removed": removed,
                "empty": made.empty,
                **{name: {"documents": m.documents, "tokens": m.tokens, "fingerprint": m.fingerprint} for name, m in parts.items()},
            }
        )
        return
    table(
        ("split", "documents", "tokens", "size"),
        [(name, f"{m.documents:,}", f"{m.tokens:,}", format_bytes(sum(f.bytes for f in m.shards))) for name, m in parts.items()],
    )
    if removed:
        print(f"{removed:,} near duplicates were left out.")
    if made.empty:
        print(f"{made.empty:,} empty texts were left out.")
    print(f"{out}: a vocabulary of {made.tokenizer.vocab_size:,}, tokenizer identity {made.train.tokenizer[:12]}")


@data.command(name="inspect")
def inspect(
    folder: Annotated[Path, Parameter(help="A folder that `armillary data prepare` made, or one split of it.")],
    /,
    *,
    show: Annotated[int, Parameter(help="Show the beginnings of this many documents of each split.")] = 1,
    json: Json = False,
) -> None:
    """What a folder of token shards holds, after checking every byte of it."""
    from armillary.cli.terminal import print_json, table
    from armillary.core.errors import NotFoundError
    from armillary.core.units import format_bytes
    from armillary.data.shard_manifest import MANIFEST
    from armillary.data.shards import TokenShards
    from armillary.data.tokenizer_identity import require_tokenizer
    from armillary.models.tokenizer import Tokenizer

    splits = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    if not splits and not (folder / MANIFEST).is_file():
        raise NotFoundError(f"{folder} holds no token shards", "make them with: armillary data prepare")
    opened = {name: TokenShards.open(folder, name) for name in splits} or {folder.name: TokenShards.open(folder)}
    beside = next((place for place in (folder / "tokenizer", folder.parent / "tokenizer") if (place / "tokenizer.json").is_file()), None)
    tokenizer = None if beside is None else Tokenizer.from_json(beside)
    if tokenizer is not None:
        for shards in opened.values():
            require_tokenizer(shards.tokenizer, tokenizer, str(shards.folder))
    facts: dict[str, dict[str, Any]] = {
        name: {
            "documents": shards.documents,
            "tokens": shards.tokens,
            "shortest": int(shards.lengths.min()),
            "median": int(sorted(shards.lengths.tolist())[shards.documents // 2]),
            "longest": int(shards.lengths.max()),
            "bytes": sum(file.bytes for file in shards.manifest.shards),
            "type": shards.manifest.dtype,
            "vocabulary": shards.vocab_size,
            "scored": "all" if shards.scored(0) is None else "flagged",
            "tokenizer": shards.tokenizer,
            "fingerprint": shards.fingerprint,
            "source": dict(shards.manifest.source),
        }
        for name, shards in opened.items()
    }
    if json:
        print_json(facts)
        return
    table(
        ("split", "documents", "tokens", "shortest", "median", "longest", "size", "vocabulary", "scored"),
        [
            (
                name, f"{f['documents']:,}", f"{f['tokens']:,}", f"{f['shortest']:,}", f"{f['median']:,}", f"{f['longest']:,}",
                format_bytes(f["bytes"]), f"{f['vocabulary']:,}", f["scored"],
            )
            for name, f in facts.items()
        ],
    )  # fmt: skip
    identity = next(iter(facts.values()))["tokenizer"]
    print(f"every file's SHA-256 is right; tokenizer identity {identity[:12]}{', the one beside it' if tokenizer else ''}")
    for name, shards in opened.items():
        for index in range(min(show, shards.documents) if tokenizer else 0):
            text = tokenizer.decode(shards.document(index)[:60].tolist()) if tokenizer else ""
            print(f"{name} {index}: {' '.join(text.split())[:160]}")


@data.command(name="dedup")
def dedup(
    texts: Texts,
    /,
    *,
    threshold: Threshold = 0.7,
    show: Annotated[int, Parameter(help="Show at most this many pairs.")] = 20,
    field: Field = "text",
    json: Json = False,
) -> None:
    """Find near duplicates among texts: MinHash and LSH find candidates, their exact similarity decides."""
    from armillary.cli.terminal import print_json, table
    from armillary.data.near_duplicates import candidate_probability, find_near_duplicates
    from armillary.data.readers import read_records
    from armillary.data.readers import texts as texts_of

    with _progress() as progress:
        records = list(read_records(_files(texts, None, progress)))
        found = find_near_duplicates(list(texts_of(records, field)), threshold=threshold, progress=progress)
    names = [record.where for record in records]
    pairs = sorted(found.pairs, key=lambda pair: -pair.similarity)
    if json:
        print_json(
            {
                "texts": len(records),
                "candidates": found.candidates,
                "pairs": [{"first": names[p.first], "second": names[p.second], "similarity": round(p.similarity, 4)} for p in pairs],
                "removed": [names[index] for index in found.removed],
            }
        )
        return
    table(("first", "second", "similarity"), [(names[p.first], names[p.second], f"{p.similarity:.3f}") for p in pairs[:show]])
    if len(pairs) > show:
        print(f"and {len(pairs) - show:,} more")
    reach = candidate_probability(threshold, found.bands, found.rows)
    print(
        f"{len(records):,} texts: {len(pairs):,} near duplicates in {len(found.groups):,} groups; {len(found.kept):,} are left when each keeps "
        f"its first. {found.candidates:,} pairs compared; {found.bands} bands of {found.rows} find a pair at {threshold:g} with probability {reach:.3f}."
    )


@data.command(name="autotune")
def autotune(
    texts: Texts,
    /,
    *,
    tokenizer: Annotated[str, Parameter(help="Tokenize as this model does: a name, a .gguf file, a model or tokenizer folder.")],
    step_ms: Annotated[float, Parameter(help="How long a training step takes, which the pipeline has to keep up with.")] = 50.0,
    batch: Annotated[int, Parameter(help="Texts a training step.")] = 8,
    steps: Annotated[int, Parameter(help="Training steps to run.")] = 64,
    threads: Annotated[int | None, Parameter(help="Most threads that the pipeline may use (default: one a core, at least 4).")] = None,
    trace: Annotated[Path | None, Parameter(help="Write what happened here, to be opened with `armillary trace`.")] = None,
    field: Field = "text",
    json: Json = False,
) -> None:
    """Read and tokenize texts beside a training step of a given length; tune the pipeline; name its bottleneck."""
    import os
    from dataclasses import asdict

    from armillary.cli.terminal import print_json, table
    from armillary.core.trace import Trace
    from armillary.data.executors.local import LocalExecutor
    from armillary.data.pipeline import AUTO, Pipeline
    from armillary.data.policies.autotune import COLUMNS, Limits
    from armillary.data.readers import read_records
    from armillary.data.readers import texts as texts_of

    with _progress() as progress:
        files = _files(texts, None, progress)
        backend = _tokenizer(tokenizer, progress).backend
    pipeline = (
        Pipeline.of(lambda: files, name="files")
        .interleave(lambda file: texts_of(read_records([file]), field), cycle=min(4, len(files)), parallelism=AUTO, name="read")
        .map(lambda text: backend.encode(text, add_special_tokens=False).ids, parallelism=AUTO, name="tokenize")
        .batch(batch)
        .prefetch(AUTO)
    )
    recorded = None if trace is None else Trace("input pipeline")
    executor, numbers, done, epoch = LocalExecutor(Limits(threads=threads or max(4, os.cpu_count() or 1)), recorded), dict[str, int](), 0, 0
    while True:
        begun = time.perf_counter()
        with executor.run(pipeline, epoch, numbers=numbers) as run:
            for _ in run:
                time.sleep(step_ms / 1e3)
                if done + run.outputs == steps:
                    break
        done += run.outputs
        measured, prediction = (time.perf_counter() - begun) / max(1, run.outputs) * 1e9, run.prediction()
        if done >= steps or not run.outputs:
            break
        numbers, epoch = run.tuned(), epoch + 1
    if recorded is not None and trace is not None:
        recorded.save(trace)
    if json:
        print_json({"numbers": run.numbers, "measured": measured, "stalled": run.stalled, **asdict(prediction)})
        return
    table(COLUMNS, prediction.table())
    print(f"chosen: {', '.join(f'{name} {number}' for name, number in run.numbers.items())}; the bottleneck is {prediction.bottleneck}")
    print(
        f"{done} steps in {epoch + 1} epochs; in the last, {run.outputs} of {measured / 1e6:.1f} ms (the model says {prediction.time / 1e6:.1f}), "
        f"{run.stalled:.1%} of it waiting for input"
    )


def _files(texts: tuple[str, ...], split: str | None, progress: Any) -> list[Path]:
    from armillary.core.errors import InputError, NotFoundError
    from armillary.data.corpora import corpora, corpus_files
    from armillary.data.readers import data_files, is_prepared

    if not texts:
        raise InputError("no texts are named", f"give files, folders, or corpora: {', '.join(corpora())}")
    found: list[Path] = []
    for name in texts:
        # What was prepared of a corpus may have its name: tokens are no texts.
        if name in corpora() and (not Path(name).exists() or is_prepared(Path(name))):
            found += corpus_files(name, progress)
        else:
            try:
                found += data_files([name], split)
            except NotFoundError as error:
                if "/" not in name and not Path(name).exists():
                    corpus_files(name)  # names the closest corpus
                raise error
    return found


def _tokenizer(name: str, progress: Any) -> Any:
    """The tokenizer of a model by name or path, or in a folder that holds nothing else."""
    from armillary.models import hub
    from armillary.models.gguf.reader import GGUFFile
    from armillary.models.tokenizer import Tokenizer

    if (Path(name) / "tokenizer.json").is_file() or Path(name).name == "tokenizer.json":
        return Tokenizer.from_json(name)
    path = hub.resolve(name, progress=progress)
    return Tokenizer.from_json(path) if path.is_dir() else Tokenizer.from_gguf(GGUFFile.open(path))


@contextmanager
def _progress() -> Iterator[Any]:
    """Downloads in bytes, everything else in documents; plain lines into a pipe."""
    from armillary.cli.terminal import byte_progress, note

    said: dict[str, float] = {}
    with byte_progress("data") as draw:

        def report(stage: str, done: int, total: int) -> None:
            now = time.monotonic()
            if stage in ("downloading", "unpacking", "checking"):
                draw(stage, done, total)
            elif stage not in said:
                said[stage] = now
                note(f"data: {stage} ...")
            elif now - said[stage] >= 5 and done < total:
                said[stage] = now
                note(f"data: {stage}, {done:,} of {total:,}")

        yield report
