"""Ranks as Ray actors: they are placed together, a lost one is restarted from the last checkpoint, other errors end the run."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from armillary.core.errors import CapacityError, InputError
from armillary.data.prepare import prepare_text

pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield ray
    ray.shutdown()


def sum_of_ranks(attempt):
    import torch
    import torch.distributed as dist

    from armillary.train.parallel.launch import joined

    with joined(timeout=20) as rank:
        if attempt == 0 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        total = torch.tensor([rank + 1])
        dist.all_reduce(total)
        return attempt, rank, int(total)


def refuse(attempt):
    raise InputError("the data is not settled", "give data.folder")


def by_value(work):
    """As Ray sees a function of this file: its workers cannot import it."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return work


def test_a_killed_rank_is_named_and_all_begin_again(cluster):
    from armillary.train.parallel.ray import run_on_ray

    told = []
    assert run_on_ray(2, by_value(sum_of_ranks), tell=told.append) == [(1, 0, 3), (1, 1, 3)]
    assert any(re.search(r"rank 1 is gone.*starting all 2 ranks again from the last checkpoint \(1 of 3", line) for line in told)


def test_what_no_restart_mends_is_raised_as_it_is(cluster):
    from armillary.train.parallel.ray import run_on_ray

    with pytest.raises(InputError, match=r"the data is not settled: give data\.folder"):
        run_on_ray(1, by_value(refuse), tell=lambda _: None)


def test_ranks_that_do_not_fit_are_refused_at_once(cluster):
    from armillary.train.parallel.ray import run_on_ray

    with pytest.raises(CapacityError, match="3 ranks want 3 CPUs, and Ray's cluster has 2"):
        run_on_ray(3, by_value(refuse), tell=lambda _: None)


CONFIG = """
steps = 24
layout = "dp_shard=2"
[architecture]
layers = 1
hidden = 32
heads = 2
[batch]
rows = 2
length = 16
[schedule]
name = "constant"
[checkpoint]
every = 1
"""


def test_a_training_run_survives_the_kill_of_a_rank_and_keeps_its_curve(tmp_path):
    for index in range(8):
        (tmp_path / f"{index:02}.txt").write_text("the sphere turns, rings within rings; a schedule is data. " * 8)
    prepare_text(sorted(tmp_path.glob("*.txt")), tmp_path / "corpus", vocabulary=280, validation=0.2)
    (tmp_path / "tiny.toml").write_text(CONFIG + f'[data]\nfolder = "{tmp_path / "corpus"}"\n')
    environment = {**os.environ, "ARMILLARY_NATIVE": "0"}
    environment.pop("RAY_ADDRESS", None)

    def command(runs, *more):
        return [sys.executable, "-m", "armillary", "train", str(tmp_path / "tiny.toml"), "--runs", str(tmp_path / runs), *more]

    process = subprocess.Popen(command("ray", "--ray"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    errors = []
    for line in process.stderr:  # rank 1 is killed once there is something to go on from
        errors.append(line)
        if "rank 1: process" in line and "victim" not in locals():
            victim = int(re.search(r"process (\d+)", line)[1])
            while not list((tmp_path / "ray").glob("*/checkpoints/step-*")):
                time.sleep(0.05)
            os.kill(victim, signal.SIGKILL)
    assert process.wait() == 0, "".join(errors)[-3000:]
    assert any("starting all 2 ranks again from the last checkpoint" in line for line in errors)
    done = subprocess.run(command("plain", "--layout", "single"), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (survivor,), (plain,) = ((list((tmp_path / runs).glob("*/metrics.jsonl"))) for runs in ("ray", "plain"))
    losses = [
        [line["loss"] for line in map(json.loads, file.read_text().splitlines()) if line["event"] == "step"] for file in (survivor, plain)
    ]
    assert len(losses[0]) == len(losses[1]) == 24
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
