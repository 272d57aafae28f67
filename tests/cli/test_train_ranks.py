"""`armillary train` on several ranks: one answer whatever the layout, and a launcher's mistakes named."""

import json
import os
import subprocess
import sys

import pytest

from armillary.data.prepare import prepare_text
from armillary.models.load import load

TINY = """
steps = 3
[architecture]
layers = 2
hidden = 32
heads = 2
[batch]
rows = 4
micro_rows = 2
length = 16
[evaluate]
batches = 2
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    words = ["the sphere turns", "rings within rings", "a schedule is data", "what runs where and when"]
    for index in range(12):
        (folder / f"{index:02}.txt").write_text(" ".join(words[(index * k) % 4] for k in range(1, 40)))
    prepare_text(sorted(folder.glob("*.txt")), folder / "corpus", vocabulary=300, validation=0.2)
    (folder / "tiny.toml").write_text(TINY + f'[data]\nfolder = "{folder / "corpus"}"\n')
    return folder


def train(place, launcher, *arguments):
    file = [] if "--resume" in arguments else [str(place / "tiny.toml")]
    command = [sys.executable, *launcher, "-m", "armillary", "train", *file, "--runs", str(place / "runs"), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ARMILLARY_NATIVE": "0"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp_shard=2", "tp=2,sequence_parallel"])
def test_two_ranks_train_and_save_what_one_does(place, layout):
    one = train(place, [])
    two = train(place, TORCHRUN, "--layout", layout)
    assert [line["event"] for line in two] == [line["event"] for line in one]
    for single, double in zip(one[:-1], two[:-1], strict=True):
        assert double["loss"] == pytest.approx(single["loss"], abs=2e-6)
    ours, theirs = (load(lines[-1]["run"] + "/model").decoder.state_dict() for lines in (two, one))
    assert all(float((ours[name] - theirs[name]).abs().max()) < 1e-4 for name in theirs)


@pytest.mark.slow
def test_two_ranks_with_a_sharded_optimizer_begin_and_one_goes_on(place):
    steady = ["--schedule.name", "constant", "--schedule.warmup", "0"]
    whole = train(place, [], *steady)
    begun = train(place, TORCHRUN, "--layout", "dp_shard=2,zero_stage=1", "--steps", "2", *steady)[-1]["run"]
    rest = train(place, [], "--resume", begun, "--steps", "3", "--layout", "single")
    assert [line["step"] for line in rest if line["event"] == "step"] == [3]
    last, expected = ([line for line in lines if line["event"] == "step"][-1]["loss"] for lines in (rest, whole))
    assert last == pytest.approx(expected, abs=2e-6)


def test_a_layout_for_two_in_one_process_names_the_launcher(place, capsys):
    from armillary.cli.main import run

    assert run(["train", str(place / "tiny.toml"), "--runs", str(place / "none"), "--layout", "tp=2"]) == 2
    told = capsys.readouterr().err
    assert "layout tp=2 is for 2 ranks, and this is one process" in told
    assert "torchrun --nproc-per-node 2" in told
