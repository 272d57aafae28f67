"""A child of test_faults: trains in forked processes that are killed at random points, so that torch is imported once.

Usage: faults.py WORK KILLS SEED. Prints what happened as JSON.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from armillary.core.config import resolve
from armillary.train.config import TrainConfig
from armillary.train.session import CONFIG, METRICS, open_session


def start(place, resume=None):
    """A run in a process of its own: from the beginning, or from a run's newest checkpoint."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        warnings.simplefilter("ignore")
        os.setpgid(0, 0)
        torch.set_num_threads(1)
        resolved = resolve(TrainConfig, file=place / "tiny.toml" if resume is None else resume / CONFIG)
        session = open_session(resolved, place, "killed", resume=resume)
        session.view.step = session.view.evaluation = lambda *_: None
        session.go()
        status = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(status)


def lines(run):
    path = run / METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def ended(child):
    return os.waitpid(child, os.WNOHANG)[0] != 0


def main(place, kills, seed):
    chance = random.Random(seed)
    before = set(place.glob("*-killed*"))
    child = start(place)
    run, done = None, 0
    unfinished = 0  # how often a kill hit a checkpoint that was being written
    while done < kills:
        while run is None or not lines(run):
            run = next(iter(set(place.glob("*-killed*")) - before), None)
            time.sleep(0.002)
        target = lines(run) + chance.randrange(1, 6)
        while lines(run) < target and not (gone := ended(child)):
            time.sleep(0.001)
        assert not gone, "the run ended before it was killed often enough"
        time.sleep(chance.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done += 1
        unfinished += any((run / "checkpoints").glob(".step-*.part"))
        child = start(place, run)
    _, status = os.waitpid(child, 0)
    print(json.dumps({"run": str(run), "kills": done, "unfinished": unfinished, "status": status}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
