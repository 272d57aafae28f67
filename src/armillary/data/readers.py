"""Records out of files: text, JSON Lines, JSON, Parquet, Arrow, and folders as Hugging Face lays them out.

| file | records |
|---|---|
| `.txt`, `.md` (`.gz`) | one: `{"text": the whole file}` |
| `.jsonl`, `.ndjson` (`.gz`) | one a line, an object each |
| `.json` | one an element of a list of objects |
| `.parquet`, `.arrow` | one a row (needs pyarrow); Arrow as `datasets.save_to_disk` writes it, stream or file |

A folder gives its data files in the order of their names. A file belongs to the split that its name or its folder names, as on the
Hugging Face Hub (`train`, `validation` or `valid`, `dev`, `test`); without such a name it is `train`. The `configs` of a README are not
read: name the files instead.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from armillary.core.errors import FormatError, InputError, MissingDependencyError, NotFoundError

MAX_TEXT_BYTES: Final = 1 << 30  # one text file, unpacked
MAX_LINE_BYTES: Final = 64 << 20  # one line of JSON
MAX_JSON_BYTES: Final = 256 << 20  # one .json file, which is read whole
MAX_FILES: Final = 1_000_000
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_ROWS: Final = 256  # of Parquet, held at once
_KINDS: Final = {
    ".txt": "text", ".md": "text", ".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
_SPLITS: Final = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
                  "dev": "validation", "test": "test", "testing": "test", "eval": "test"}  # fmt: skip
_NOT_DATA: Final = {
    "dataset_info.json",
    "dataset_dict.json",
    "dataset_infos.json",
    "state.json",
    "README.md",
    "LICENSE.txt",
    "LICENSE.md",
    "manifest.json",
}


class Record(NamedTuple):
    """What one place of a file holds; `where` names it for messages: `chats.jsonl line 17`."""

    values: Mapping[str, Any]
    where: str


def data_files(paths: Iterable[str | Path], split: str | None = None) -> list[Path]:
    """The files to read, of each path in turn: itself, or the data files in a folder. `split` keeps those of one split.

    Raises `NotFoundError` for a path that is not there, for a folder without data files, and for a split that no file belongs to;
    `InputError` for a folder of prepared tokens and for a split that has no such name.
    """
    if split is not None and split not in _SPLITS:
        raise InputError(f"there is no split {split!r}", f"name one of {', '.join(dict.fromkeys(_SPLITS.values()))}", field="split")
    found: list[Path] = []
    for path in map(Path, paths):
        if is_prepared(path):
            raise InputError(f"{path} holds tokens that armillary data prepare made, not texts", "name the texts that it was made of")
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if _kind(file) and file.name not in _NOT_DATA and not _hidden(file, path)]
            inside = [file for file in inside if file.is_file()]
            if not inside:
                raise NotFoundError(f"{path} holds no data files", f"these are read: {', '.join(_KINDS)}")
            if split is not None:
                kept = [file for file in inside if split_of(file, path) == _SPLITS[split]]
                if not kept:
                    have = sorted({split_of(file, path) for file in inside})
                    raise NotFoundError(f"no file in {path} belongs to the split {split!r}", f"it has: {', '.join(have)}")
                inside = kept
            found += inside
        elif path.is_file():
            if not _kind(path):
                raise InputError(f"{path} is of no kind that is read", f"these are: {', '.join(_KINDS)}, .txt.gz, .jsonl.gz")
            found.append(path)
        else:
            raise NotFoundError(f"{path} does not exist", "give files or folders that are there")
        if len(found) > MAX_FILES:
            raise InputError(f"there are more than {MAX_FILES:,} files", "give fewer, or join them")
    return found


def is_prepared(folder: Path) -> bool:
    """Whether a folder is what `armillary data prepare` makes: its files are no texts, though some end in .json."""
    return (folder / "train" / "manifest.json").is_file() and (folder / "tokenizer" / "tokenizer.json").is_file()


def split_of(file: Path, folder: Path) -> str:
    """The split that a file's name, else one of its folders below `folder`, names; 'train' when none does."""
    for part in reversed(file.relative_to(folder).parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return "train"


def read_records(files: Iterable[Path]) -> Iterator[Record]:
    """The records of the files, in order, one held at a time. Raises `FormatError` naming the file and the line or row."""
    for file in files:
        kind = _kind(file)
        if kind == "text":
            yield Record({"text": _read_text(file)}, file.name)
        elif kind == "lines":
            yield from _read_lines(file)
        elif kind == "json":
            yield from _read_json(file)
        else:
            yield from _read_table(file, arrow=kind == "arrow")


def texts(records: Iterable[Record], field: str = "text") -> Iterator[str]:
    """The text in a field of each record. Raises `FormatError` naming the record that lacks it and what it has."""
    for record in records:
        value = record.values.get(field)
        if not isinstance(value, str):
            problem = f"has no field {field!r}" if field not in record.values else f"has {_named(value)} in {field!r}, not a text"
            names = ", ".join(sorted(map(str, record.values)))[:200]
            raise FormatError(f"{record.where} {problem}", f"name the field that holds the text; the record has: {names}")
        if not value.isascii() and _SURROGATE.search(value):
            raise FormatError(f"{record.where} has a lone surrogate in {field!r}, which is no character", "escape it as a surrogate pair")
        yield value


def _kind(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes[-1:] == [".gz"]:
        kind = _KINDS.get(suffixes[0]) if len(suffixes) == 2 else None
        return kind if kind in ("text", "lines") else None
    return _KINDS.get(suffixes[-1]) if suffixes else None


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb")  # type: ignore[return-value]


def _read_text(file: Path) -> str:
    raw = _bounded(file, MAX_TEXT_BYTES, "split it into several files, or into records of a .jsonl")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise FormatError(f"{file.name} line {line}: byte 0x{raw[error.start]:02x} is not UTF-8", "convert the file to UTF-8") from None


def _bounded(file: Path, limit: int, fix: str) -> bytes:
    with _open(file) as opened:
        try:
            raw = opened.read(limit + 1)
        except (OSError, EOFError) as error:
            raise FormatError(f"{file.name} cannot be unpacked ({error})", "fetch the file again") from error
    if len(raw) > limit:
        raise FormatError(f"{file.name} holds more than {limit:,} bytes", fix)
    return raw


def _read_lines(file: Path) -> Iterator[Record]:
    with _open(file) as opened:
        number = 0
        while True:
            number += 1
            where = f"{file.name} line {number}"
            try:
                line = opened.readline(MAX_LINE_BYTES + 1)
            except (OSError, EOFError) as error:
                raise FormatError(f"{where} cannot be unpacked ({error})", "fetch the file again") from error
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise FormatError(f"{where} has more than {MAX_LINE_BYTES:,} bytes", "split the record")
            if line.strip():
                yield Record(_object(_parse(line.rstrip(), where), where), where)


def _read_json(file: Path) -> Iterator[Record]:
    value = _parse(_bounded(file, MAX_JSON_BYTES, "write it as .jsonl, one object a line"), file.name)
    if not isinstance(value, list):
        raise FormatError(f"{file.name} holds {_named(value)}, not a list of objects", "write one object a line into a .jsonl")
    for number, item in enumerate(value):
        where = f"{file.name} item {number}"
        yield Record(_object(item, where), where)


def _parse(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: byte 0x{raw[error.start]:02x} at {error.start} is not UTF-8", "convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise FormatError(
            f"{where} is not JSON ({error.msg} at {place}column {error.colno})", "correct it, or fetch the file again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON ({str(error)[:100]})", "correct it, or fetch the file again") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{where} is {_named(value)}, not an object", 'write each record as {"text": ...} or {"messages": [...]}')
    return value


def _named(value: Any) -> str:
    """A JSON value's kind, in JSON's words."""
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def _read_table(file: Path, arrow: bool) -> Iterator[Record]:
    row = 0
    try:
        for batch in _arrow_batches(file) if arrow else _parquet_batches(file):
            for values in batch.to_pylist():
                yield Record(values, f"{file.name} row {row}")
                row += 1
    except (ValueError, TypeError, OSError, KeyError) as error:  # pyarrow's errors derive from these
        if isinstance(error, InputError):
            raise
        raise FormatError(f"{file.name} row {row}: {_first_line(error)}", "fetch the file again, or write it anew") from error


def _parquet_batches(file: Path) -> Iterator[Any]:
    parquet = _pyarrow("parquet")
    with parquet.ParquetFile(file) as opened:
        yield from opened.iter_batches(batch_size=_ROWS)


def _arrow_batches(file: Path) -> Iterator[Any]:
    ipc = _pyarrow("ipc")
    with file.open("rb") as opened:
        magic = opened.read(6)
        opened.seek(0)
        if magic == b"ARROW1":
            with ipc.open_file(opened) as reader:
                for index in range(reader.num_record_batches):
                    yield from _sliced(reader.get_batch(index))
        else:
            with ipc.open_stream(opened) as reader:
                for batch in reader:
                    yield from _sliced(batch)


def _sliced(batch: Any) -> Iterator[Any]:
    for start in range(0, batch.num_rows, _ROWS):
        yield batch.slice(start, _ROWS)


def _pyarrow(part: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"pyarrow.{part}")
    except ImportError as error:
        raise MissingDependencyError(
            "Parquet and Arrow files need pyarrow, which is not installed", "pip install 'armillary[data]'"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
