"""kill -9 at random points: the run that was killed is the run that was not, to the last bit; and it goes on under any layout."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from faults import RANK_STEPS, train_ranks
from safetensors.torch import load_file

from armillary.core.config import resolve
from armillary.data.prepare import prepare_text
from armillary.models.hf import load_hf
from armillary.train.checkpoint import whole_checkpoints
from armillary.train.config import OptimizerConfig, TrainConfig
from armillary.train.optimizers.choose import factory
from armillary.train.parallel.apply import Single
from armillary.train.parallel.curve import FAMILIES, small_decoder
from armillary.train.parallel.layout import Layout
from armillary.train.parallel.parallelize import parallelize
from armillary.train.parallel.rank_threads import run_ranks
from armillary.train.session import METRICS, MODEL, open_session
from armillary.train.trainer import Hooks

TINY = """
steps = 120
[architecture]
layers = 1
hidden = 16
heads = 2
[batch]
rows = 2
micro_rows = 1
length = 16
[checkpoint]
every = 2
[evaluate]
batches = 1
every = 15
"""


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    words = ["the sphere turns", "rings within rings", "a schedule is data", "what runs where and when"]
    for index in range(8):
        (tmp_path / f"{index}.txt").write_text(" ".join(words[(index * k) % 4] for k in range(1, 40)))
    prepare_text(sorted(tmp_path.glob("*.txt")), tmp_path / "corpus", vocabulary=300, validation=0.2)
    (tmp_path / "tiny.toml").write_text(TINY + f'[data]\nfolder = "{tmp_path / "corpus"}"\n')
    whole = open_session(resolve(TrainConfig, file=tmp_path / "tiny.toml"), tmp_path, "whole")
    whole.view.step = whole.view.evaluation = lambda *_: None
    whole.go()

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("faults.py")), "run", str(tmp_path), "20", "0"]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout.splitlines()[-1])
    assert (told["status"], told["kills"]) == (0, 20), answer.stderr
    killed = Path(told["run"])
    assert told["unfinished"] > 0  # some kills came while a checkpoint was being written

    def losses(run):
        return [(v["event"], v["step"], v["loss"]) for v in map(json.loads, (run / METRICS).read_text().splitlines())]

    assert sorted(losses(killed)) == sorted(losses(whole.folder))
    one, two = (load_hf(run / MODEL).state_dict() for run in (whole.folder, killed))
    assert all(one[name].equal(two[name]) for name in one)
    assert [path.name for path in whole_checkpoints(killed / "checkpoints")] == ["step-00000118", "step-00000120"]


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_and_the_run_goes_on_as_if_nothing_had_happened(tmp_path):
    answer = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("faults.py")), "rank", str(tmp_path), "3", "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout.splitlines()[-1]) == {"kills": 3, "named": 3, "statuses": [0, 0]}, answer.stderr
    assert answer.stderr.count(" is gone") == 3
    config, layout = FAMILIES["llama"], Layout.parse("dp_shard=2")
    expected = run_ranks(2, lambda _: train_ranks(parallelize(small_decoder(config), layout), config, tmp_path / "whole", RANK_STEPS)[1])[0]
    trained = load_file(tmp_path / "trained.safetensors")
    assert all(trained[name].equal(expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["everything", "llama"])
@pytest.mark.parametrize(
    ("one", "other"),
    [("dp_shard=4", ""), ("", "dp_shard=2"), ("dp_shard=2", "dp_shard=4,zero_stage=2"), ("dp_replicate=2", "dp_shard=2,zero_stage=1"),
     ("dp_shard=2,zero_stage=1", "tp=2"), ("dp_shard=2,tp=2", "dp_replicate=2,dp_shard=2")],
)  # fmt: skip
def test_a_run_goes_on_under_another_layout(tmp_path, one, other, family):
    config = FAMILIES[family]
    if "tp" not in one + other:
        config = replace(config, vocab_size=53)  # shards of uneven sizes (under both, torch's DTensor is not safe between rank threads)
    check_going_on(tmp_path, one, other, config)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "lion", "adafactor"])
@pytest.mark.parametrize(("one", "other"), [("dp_shard=2,tp=2", "dp_shard=2,zero_stage=1"), ("dp_shard=2,zero_stage=1", "tp=2")])
def test_every_optimizers_state_goes_on_under_another_layout(tmp_path, one, other, name):
    beta1 = {"beta1": 0.9} if name == "adafactor" else {}
    check_going_on(tmp_path, one, other, FAMILIES["everything"], factory(OptimizerConfig(name=name, lr=1e-3, **beta1)))


def check_going_on(place, one, other, config, optimizer=None):
    """Two steps under `one` and two under `other` are four of one process."""
    hooks = partial(Hooks, save_every=2)

    def train(text, steps, folder):
        work = partial(train_ranks, config=config, folder=folder, steps=steps, optimizer=optimizer)
        if not text:
            return work(Single(small_decoder(config)), hooks=hooks())
        layout = Layout.parse(text)
        return run_ranks(layout.world, lambda _: work(parallelize(small_decoder(config), layout, replicas="buckets"), hooks=hooks()))[0]

    expected, weights = train("", 4, place / "whole")
    first, _ = train(one, 2, place / "run")
    second, trained = train(other, 4, place / "run")
    assert [step for step, _ in first + second] == [1, 2, 3, 4]
    assert max(abs(a - b) for (_, a), (_, b) in zip(first + second, expected, strict=True)) <= 2e-6
    # Under tp torch's products run, in one process the compiled loops; AdamW divides a gradient by its own size, so its rounding shows.
    assert max(float((trained[name] - weights[name]).abs().max()) for name in weights) <= 2e-5
