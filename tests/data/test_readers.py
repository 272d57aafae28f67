"""Readers: every layout gives the same records; what is wrong is named by file and line."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from armillary.core.errors import FormatError, InputError, MissingDependencyError, NotFoundError
from armillary.data import readers
from armillary.data.readers import data_files, read_records, split_of, texts

ROWS = [{"text": "one", "id": 1}, {"text": "zwei ü\n🙂", "id": 2}, {"text": "", "id": 3}]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """The rows in the format that the file's name says."""
    kind = "".join(path.suffixes)
    if kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind.startswith((".jsonl", ".ndjson")):
        raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(raw) if kind.endswith(".gz") else raw)
    else:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(rows)
        if kind == ".parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=2)
        else:
            make = pyarrow.ipc.new_file if path.stem.startswith("file") else pyarrow.ipc.new_stream
            with make(path, table.schema) as writer:
                writer.write_table(table)
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.ndjson", "a.parquet", "stream.arrow", "file.arrow"])
def test_every_layout_gives_the_same_records(name: str, tmp_path: Path) -> None:
    records = list(read_records([write(tmp_path / name, ROWS)]))
    assert [dict(record.values) for record in records] == ROWS
    assert list(texts(records)) == ["one", "zwei ü\n🙂", ""]
    assert all(record.where.startswith(name) for record in records)


def test_a_text_file_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffün\n\nzwei".encode())
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"three"))
    assert list(texts(read_records(data_files([tmp_path])))) == ["ün\n\nzwei", "three"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl line 2 is not JSON \(Expecting value at column 9\)"),
        (b'{"text": "a"}\n\n["b"]\n', r"a\.jsonl line 3 is a list, not an object"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl line 2: byte 0xff at 10 is not UTF-8"),
        (b'{"text": "a"}\n{"content": "b", "id": 1}\n', r"a\.jsonl line 2 has no field 'text'.*the record has: content, id"),
        (b'{"text": 7}\n', r"a\.jsonl line 1 has a number in 'text', not a text"),
        (b'{"text": "\\ud800"}\n', r"a\.jsonl line 1 has a lone surrogate"),
        (b"[" * 100_000, r"a\.jsonl line 1 is not JSON"),
    ],
)
def test_a_wrong_line_is_named(raw: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(raw)
    with pytest.raises(FormatError, match=message):
        list(texts(read_records([tmp_path / "a.jsonl"])))


def test_bounds_hold_before_anything_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_LINE_BYTES", "MAX_TEXT_BYTES", "MAX_JSON_BYTES"):
        monkeypatch.setattr(readers, name, 1000)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * 10_000_000))
    with pytest.raises(FormatError, match=r"bomb\.jsonl\.gz line 1 has more than 1,000 bytes"):
        list(read_records([tmp_path / "bomb.jsonl.gz"]))
    for name in ("bomb.txt.gz", "big.txt", "big.json"):
        raw = b"a" * 10_000
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        with pytest.raises(FormatError, match=f"{name} holds more than 1,000 bytes"):
            list(read_records([tmp_path / name]))


def test_damaged_archives_and_tables_are_named(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(FormatError, match=r"cut\.jsonl\.gz line \d+ cannot be unpacked"):
        list(read_records([tmp_path / "cut.jsonl.gz"]))
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"PAR1 no such thing")
        with pytest.raises(FormatError, match=f"{name} row 0: "):
            list(read_records([tmp_path / name]))
    (tmp_path / "latin.txt").write_bytes("first\nzwölf".encode("latin-1"))
    with pytest.raises(FormatError, match=r"latin\.txt line 2: byte 0xf6 is not UTF-8"):
        list(read_records([tmp_path / "latin.txt"]))


def test_a_hub_folder_is_read_by_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train-00001-of-00002", "train-00000-of-00002", "validation-00000-of-00001"):
        write(tmp_path / "data" / f"{name}.parquet", [{"text": name}])
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "old.jsonl", ROWS)
    assert list(texts(read_records(data_files([tmp_path], "train")))) == ["train-00000-of-00002", "train-00001-of-00002"]
    assert list(texts(read_records(data_files([tmp_path], "valid")))) == ["validation-00000-of-00001"]
    assert len(data_files([tmp_path])) == 3
    with pytest.raises(NotFoundError, match=r"no file in .* belongs to the split 'test'.*it has: train, validation"):
        data_files([tmp_path], "test")


def test_what_datasets_saves_to_disk_is_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write(tmp_path / split / "data-00000-of-00001.arrow", [{"text": split}])
        (tmp_path / split / "state.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert list(texts(read_records(data_files([tmp_path], "test")))) == ["test"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("training_set.jsonl", "train"),
        ("my-dev.jsonl", "validation"),
        ("test/0.parquet", "test"),
        ("latest.jsonl", "train"),
        ("a.txt", "train"),
    ],
)
def test_a_files_split_is_in_its_name(name: str, split: str) -> None:
    assert split_of(Path("/d") / name, Path("/d")) == split


def test_paths_that_hold_no_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        data_files([tmp_path / "nothing"])
    with pytest.raises(NotFoundError, match="holds no data files"):
        data_files([tmp_path])
    (tmp_path / "a.pickle").write_bytes(b"")
    with pytest.raises(InputError, match="of no kind that is read"):
        data_files([tmp_path / "a.pickle"])


def test_without_pyarrow_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingDependencyError, match=r"pip install 'armillary\[data\]'"):
        list(read_records([tmp_path / "a.parquet"]))


def test_prepared_tokens_are_no_texts_and_a_split_has_a_known_name(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(InputError, match="there is no split 'tain': name one of train, validation, test"):
        data_files([tmp_path / "train.jsonl"], "tain")
    for name in ("made/train/manifest.json", "made/tokenizer/tokenizer.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="made holds tokens that armillary data prepare made, not texts"):
        data_files([tmp_path / "made"])
