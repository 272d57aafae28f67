"""kill -9 at random points: the run that was killed 20 times is the run that was not, to the last bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from armillary.core.config import resolve
from armillary.data.prepare import prepare_text
from armillary.models.hf import load_hf
from armillary.train.checkpoint import whole_checkpoints
from armillary.train.config import TrainConfig
from armillary.train.session import METRICS, MODEL, open_session

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

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ARMILLARY_NATIVE": "0"}
    command = [sys.executable, str(Path(__file__).with_name("faults.py")), str(tmp_path), "20", "0"]
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
