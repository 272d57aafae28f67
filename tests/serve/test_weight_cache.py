"""The second start reads what the first laid out, and nothing but that: any other file, older or damaged, is laid out again."""

from __future__ import annotations

import os
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from armillary.kernels import cpu_library
from armillary.kernels.cpu_step import StepModel
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.models.gguf.load import GGUFWeights
from armillary.models.gguf.reader import GGUFFile
from armillary.models.gguf.writer import write_gguf
from armillary.models.hf import save_hf
from armillary.models.stored import DecoderWeights, FolderWeights, Weights
from armillary.serve.executors import kept_files, weight_cache
from armillary.serve.executors.kept_files import clear, kept
from armillary.serve.executors.weight_cache import Prepared, path_of, prepare

pytestmark = pytest.mark.skipif(not cpu_library.available(), reason="the native kernels need g++")

CONFIG = ModelConfig("qwen2", 60, 64, 96, 2, 4, 2, 16, 128, qkv_bias=True, tie_embeddings=True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARMILLARY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(weight_cache, "LEAST", 0)


def decoder(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    made = Decoder(CONFIG)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def weights_at(path: Path) -> Weights:
    return GGUFWeights(GGUFFile.open(path)) if path.suffix == ".gguf" else FolderWeights(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_gguf(decoder(), tmp_path / "m.gguf", "F32")


def numbers(model: StepModel) -> list[torch.Tensor]:
    """Everything that the kernels read."""
    found = [model.embedding, model.final_norm, model.head.unpack()]
    for layer in model.layers:
        found += [weight.unpack() for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        found += [weight._bias for weight in (layer.qkv,) if weight._bias is not None]
        found += [norm for norm in (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm) if norm is not None]
    return found


def same(a: Prepared, b: Prepared) -> bool:
    return all(torch.equal(x, y) for x, y in zip(numbers(a.model), numbers(b.model), strict=True))


def started(path: Path, quantisation: str = "int4") -> Prepared:
    """A start that has kept what it laid out."""
    prepared = prepare(weights_at(path), quantisation)
    if prepared.keeping is not None:
        prepared.keeping.join()
    return prepared


def was_read(prepared: Prepared) -> bool:
    return prepared.words.startswith("read") and prepared.keeping is None


@pytest.mark.parametrize("form", ["gguf", "folder"])
@pytest.mark.parametrize("quantisation", ["none", "fp16", "int8", "int4"])
def test_the_second_start_reads_what_the_first_laid_out(path: Path, tmp_path: Path, form: str, quantisation: str) -> None:
    if form == "folder":
        save_hf(decoder(), path := tmp_path / "folder", dtype=torch.bfloat16)
    first = started(path, quantisation)
    weights = weights_at(path)
    weights.tensor = None  # type: ignore[method-assign, assignment]  # nobody asks the model's own file
    second = prepare(weights, quantisation)
    assert not was_read(first)
    assert was_read(second)
    assert same(first, second)
    assert len(kept()) == 1


def test_quantisations_and_models_do_not_meet(path: Path, tmp_path: Path) -> None:
    other = write_gguf(decoder(1), tmp_path / "other" / "m.gguf", "F32")
    firsts = {(p, q): started(p, q) for p in (path, other) for q in ("int8", "int4")}
    assert len(kept()) == 4
    for (p, q), first in firsts.items():
        again = started(p, q)
        assert was_read(again)
        assert same(again, first)


def test_a_decoder_and_a_small_model_are_not_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(DecoderWeights(decoder()), "int4").keeping is None
    monkeypatch.setattr(weight_cache, "LEAST", 10**9)
    assert started(path).keeping is None
    monkeypatch.setattr(weight_cache, "LEAST", 0)
    monkeypatch.setattr(weight_cache, "GROWTH", 0.1)
    assert started(path).keeping is None
    assert kept() == []


def test_the_cache_can_be_left_alone(path: Path) -> None:
    assert prepare(weights_at(path), "int4", keep=False).keeping is None
    assert kept() == []
    started(path)
    assert not was_read(prepare(weights_at(path), "int4", keep=False))


def test_a_changed_model_is_laid_out_again(path: Path) -> None:
    """Even of the same size and with the modification time put back."""
    started(path)
    before = path.stat()
    time.sleep(0.02)  # the change time's resolution
    write_gguf(decoder(1), path, "F32")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    again = started(path)
    assert not was_read(again)
    assert same(again, prepare(weights_at(path), "int4", keep=False))
    assert was_read(started(path))
    assert len(kept()) == 1


def test_a_model_that_changes_while_it_is_laid_out_is_not_kept(path: Path) -> None:
    weights = weights_at(path)
    time.sleep(0.02)
    write_gguf(decoder(1), path, "F32")
    prepared = prepare(weights, "int4")
    assert prepared.keeping is not None
    prepared.keeping.join()
    assert kept() == []


def test_other_code_lays_out_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started(path)
    monkeypatch.setattr(weight_cache, "_layout", lambda: "another")
    assert not was_read(started(path))
    assert was_read(started(path))


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign", "empty"])
def test_a_damaged_file_is_laid_out_again_and_said(path: Path, damage: str) -> None:
    first = started(path)
    (file,) = kept()
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes({"cut": raw[: len(raw) // 2], "changed": raw, "foreign": b"x" * 9000, "empty": b""}[damage])
    with pytest.warns(RuntimeWarning, match="laid out again"):
        again = started(path)
    assert same(again, first)
    assert was_read(started(path))


def test_a_kept_vector_of_another_size_never_reaches_the_kernels(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = started(path)
    load = weight_cache.PackedFile.load

    def forged(file: object, arena: object) -> dict[str, torch.Tensor]:
        arrays = load(file, arena)
        return arrays | {"model.norm.weight": arrays["model.norm.weight"][:-16]}

    with monkeypatch.context() as patch:
        patch.setattr(weight_cache.PackedFile, "load", forged)
        again = started(path)
    assert not was_read(again)
    assert same(again, first)


def test_no_room_is_a_warning(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weight_cache.packed_file, "write", full)
        with pytest.warns(RuntimeWarning, match="not kept for the next start .*No space left"):
            started(path)
    with monkeypatch.context() as patch:
        started(path, "int8")
        (before,) = kept()
        patch.setattr(weight_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        patch.setattr(kept_files, "LIMIT", before.stat().st_size)
        with pytest.warns(RuntimeWarning, match="are free, half of which"):
            started(path)
        assert kept() == [before]  # not given up for one that is not written
    clear()
    (Path(os.environ["ARMILLARY_HOME"]) / "weights").rmdir()
    (Path(os.environ["ARMILLARY_HOME"]) / "weights").write_text("not a folder")
    with pytest.warns(RuntimeWarning, match="not"):
        assert started(path).model.head.nbytes > 0


def test_the_longest_unused_file_goes_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started(path, "none")
    needed = path_of(weights_at(path), "none").stat().st_size
    clear()
    for age, quantisation in ((300, "int8"), (200, "fp16"), (100, "int4")):
        started(path, quantisation)
        file = path_of(weights_at(path), quantisation)
        os.utime(file, (time.time() - age,) * 2)
    assert was_read(prepare(weights_at(path), "int8"))  # which counts as use
    staying = sum(path_of(weights_at(path), quantisation).stat().st_size for quantisation in ("int8", "int4"))
    monkeypatch.setattr(kept_files, "LIMIT", staying + needed)
    started(path, "none")
    assert {file.name.split("-")[1] for file in kept()} == {"none", "int8", "int4"}
    monkeypatch.setattr(kept_files, "LIMIT", 10)
    clear()
    with pytest.warns(RuntimeWarning, match="the cache holds"):
        started(path, "none")


def test_many_starts_at_once_leave_one_whole_file(path: Path) -> None:
    found: list[Prepared] = []
    threads = [threading.Thread(target=lambda: found.append(started(path))) for _ in range(6)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 6
    last = started(path)
    assert was_read(last)
    assert all(same(one, last) for one in found)
    assert [file.name for file in kept_files.folder().iterdir()] == [kept()[0].name]


def test_what_a_dead_process_left_goes_and_what_is_being_written_stays(path: Path) -> None:
    kept_files.folder().mkdir(parents=True)
    dead, alive = (kept_files.folder() / f".partial-{name}" for name in ("dead", "alive"))
    for file in (dead, alive):
        file.write_bytes(b"x")
    os.utime(dead, (time.time() - 2 * kept_files.STALE_SECONDS,) * 2)
    started(path)
    assert (dead.exists(), alive.exists()) == (False, True)
    assert clear() > 0
    assert list(kept_files.folder().iterdir()) == []
