"""A checkpoint's laws: what was saved comes back bit for bit, the last whole one survives whatever happens to the next, errors name the cause."""

import copy
import errno
import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny import TINY, Repeat, decoder, documents, pack

from armillary.core.errors import FormatError, InputError
from armillary.train import checkpoint, checkpoint_storage
from armillary.train.checkpoint import FolderCheckpoints, newest, whole_checkpoints
from armillary.train.checkpoint_storage import CheckpointError
from armillary.train.config import OptimizerConfig
from armillary.train.optimizers.choose import factory
from armillary.train.parallel.apply import Single
from armillary.train.parallel.layout import Layout
from armillary.train.parallel.parallelize import parallelize
from armillary.train.parallel.rank_threads import run_ranks
from armillary.train.precision import LossScaler
from armillary.train.schedules import Schedule
from armillary.train.trainer import Trainer

OPTIMIZERS = ["adamw", "muon", "lion", "adafactor"]


def build(folder, name="adamw", seed=0, keep=2, config=TINY, **options):
    return Trainer(
        Single(decoder(seed, config)),
        factory(OptimizerConfig(name=name)),
        Schedule("cosine", 10),
        Repeat([pack(documents(3))]),
        checkpoints=FolderCheckpoints(folder, keep),
        **options,
    )


def saved(folder, steps=3, **options):
    run = build(folder, **options)
    for _ in range(steps):
        run.step(next(run.batches))
    run.save()
    run.checkpoints.wait()
    run.checkpoints._lock.close()
    return run


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_run_bit_for_bit(tmp_path, name):
    one = saved(tmp_path, name=name)
    torch.rand(3)
    two = build(tmp_path, name=name, seed=1)  # other weights, which the checkpoint replaces
    state = torch.get_rng_state()
    torch.rand(5)
    assert two.restore()
    assert not torch.equal(torch.get_rng_state(), state)
    assert (two.progress.step, two.progress.tokens, two.batches.given) == (3, one.progress.tokens, 3)
    results = [[run.step(next(run.batches)) for _ in range(3)] for run in (one, two)]
    assert [r.loss for r in results[0]] == [r.loss for r in results[1]]
    assert [r.learning_rate for r in results[0]] == [r.learning_rate for r in results[1]]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, two.parameters, strict=True))


def test_the_scaler_continues(tmp_path):
    saved(tmp_path, scaler=LossScaler(512.0, clean_steps=0))
    two = build(tmp_path, scaler=LossScaler())
    two.restore()
    assert (two.scaler.scale, two.scaler.clean_steps) == (512.0, 3)


def test_what_is_saved_is_the_state_at_the_call_whatever_comes_after(tmp_path):
    run = build(tmp_path)
    run.step(next(run.batches))
    before = [p.clone() for p in run.parameters]
    run.save()
    run.step(next(run.batches))  # while the copy is being written
    run.checkpoints.wait()
    run.restore()
    assert run.progress.step == 1
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))


def test_the_newest_are_kept_and_no_pickle_is_written(tmp_path):
    run = build(tmp_path, keep=2)
    for _ in range(4):
        run.step(next(run.batches))
        run.save()
    run.save()  # the same step again: nothing whole is ever written over
    run.checkpoints.wait()
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["step-00000004", "step-00000004-2"]
    assert sorted(path.name for path in newest(tmp_path).iterdir()) == ["manifest.json", "part-00000.safetensors"]


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    run = build(tmp_path)
    assert not run.restore()
    assert run.progress.step == 0


def test_two_processes_do_not_write_one_folder(tmp_path):
    one = build(tmp_path)
    with pytest.raises(InputError, match="another process trains into"):
        build(tmp_path)
    one.checkpoints._lock.close()


def test_a_partial_one_is_ignored_with_a_warning(tmp_path):
    saved(tmp_path)
    part = tmp_path / ".step-00000009.part"
    shutil.copytree(newest(tmp_path), part)
    (part / "manifest.json").unlink()
    run = build(tmp_path)
    with pytest.warns(UserWarning, match=r"step-00000009.part was not finished when its run ended: ignored"):
        assert run.restore()
    assert run.progress.step == 3
    run.save()
    run.checkpoints.wait()
    assert not part.exists()


@pytest.mark.parametrize("after", [0, 100, 3000])
def test_a_full_disk_costs_no_checkpoint_and_is_named(tmp_path, monkeypatch, after):
    run = saved(tmp_path)
    real, written = checkpoint_storage._put, [0]

    def put(file, checksum, data):
        written[0] += len(data)
        if written[0] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, checksum, data)

    monkeypatch.setattr(checkpoint_storage, "_put", put)
    run.step(next(run.batches))
    run.save()
    with pytest.raises(CheckpointError, match=r"step-00000004 could not be written \(.*No space left.*step-00000003 is untouched"):
        run.checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-00000003"]  # and what was half written is gone
    monkeypatch.undo()
    assert build_again(tmp_path).progress.step == 3
    run.save()
    run.checkpoints.wait()
    assert newest(tmp_path).name == "step-00000004"


def test_a_full_disk_ends_the_run_when_it_is_known_not_when_the_next_checkpoint_is_due(tmp_path, monkeypatch):
    def put(file, checksum, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_storage, "_put", put)
    run = build(tmp_path)
    run.hooks.save_every = 5
    run.hooks.on_step = lambda result: result.step == 6 and run.checkpoints._writing[1].exception()  # waits for the one after step 5
    with pytest.raises(CheckpointError, match="step-00000005 could not be written"):
        run.run()
    assert run.progress.step == 6


def test_a_rank_that_died_before_it_wrote_does_not_keep_rank_0_from_leaving(tmp_path, monkeypatch):
    """The interpreter waits for the thread that writes, and that one for the other rank's part: ten minutes, were it not told."""
    monkeypatch.setattr(checkpoint, "LEAVE_SECONDS", 0.1)
    model = decoder()

    def work(rank):
        parallel = parallelize(copy.deepcopy(model), Layout(dp_shard=2))
        checkpoints = FolderCheckpoints(tmp_path)
        if rank == 1:
            checkpoints._write = lambda *_: None
        make = factory(OptimizerConfig(name="adamw"))
        run = Trainer(parallel, make, Schedule("constant", 9), Repeat([pack(documents(3))]), checkpoints=checkpoints)
        run.hooks.save_every = 1
        run.hooks.evaluate_every = 1
        run.hooks.evaluate = lambda step: 1 / 0
        with pytest.raises(ZeroDivisionError):
            run.run()
        failure = checkpoints._writing[1].exception(timeout=60)
        assert failure is None if rank else "rank 1 did not write its part" in str(failure)
        return whole_checkpoints(tmp_path)

    assert run_ranks(2, work)[0] == []


def build_again(folder, **options):
    run = build(folder, **options)
    run.restore()
    run.checkpoints._lock.close()
    return run


def damage(path, at=-20):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damage_is_named(tmp_path):
    saved(tmp_path)
    whole = newest(tmp_path)
    part, manifest = whole / "part-00000.safetensors", whole / "manifest.json"
    original = part.read_bytes()
    damage(part)
    with pytest.raises(FormatError, match=r"part-00000.safetensors is damaged: its checksum"):
        build_again(tmp_path)
    part.write_bytes(original[:-1])
    with pytest.raises(FormatError, match=r"part-00000.safetensors has [\d,]+ bytes, not the"):
        build_again(tmp_path)
    part.unlink()
    with pytest.raises(FormatError, match=r"part-00000.safetensors is missing: remove .*step-00000003"):
        build_again(tmp_path)
    part.write_bytes(original)
    text = manifest.read_text()
    manifest.write_text(text.replace('\\"step\\": 3', '\\"step\\": 4'))
    with pytest.raises(FormatError, match=r"manifest.json is damaged \(its checksum"):
        build_again(tmp_path)
    manifest.write_text(text[:100])
    with pytest.raises(FormatError, match=r"manifest.json is damaged"):
        build_again(tmp_path)
    manifest.write_text(json.dumps({**json.loads(text), "version": 9}))
    with pytest.raises(FormatError, match="has version 9; this Armillary reads 1"):
        build_again(tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"config": replace(TINY, num_layers=3)}, "has no layers.2"),
        ({"config": replace(TINY, num_layers=1)}, "no place in this one"),
        (
            {"config": replace(TINY, intermediate_size=48)},
            r"layers.0.mlp.gate_up.gate_proj.weight is \[40, 24\], this model's is \[48, 24\]",
        ),
        ({"name": "lion"}, "trained with AdamW, not Lion"),
        ({"scaler": LossScaler()}, "has no state of 'scaler'"),
    ],
)
def test_a_foreign_checkpoint_is_refused_by_name(tmp_path, options, told):
    saved(tmp_path)
    with pytest.raises(InputError, match=told):
        build_again(tmp_path, **options)


def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(tmp_path):
    run = saved(tmp_path)
    with torch.no_grad():
        run.parameters[0].fill_(float("nan"))
    with pytest.raises(Exception, match=r"step 4: the loss is nan"):
        run.step(next(run.batches))
    assert build_again(tmp_path).progress.step == 3
