"""A child of test_faults: trains in forked processes that are killed at random points, so that torch is imported once.

Usage: faults.py run|rank WORK KILLS SEED: kill the whole run, or one of two ranks. Prints what happened as JSON.
"""

import json
import os
import random
import signal
import socket
import sys
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from armillary.core.config import resolve
from armillary.train.checkpoint import FolderCheckpoints, newest
from armillary.train.config import TrainConfig
from armillary.train.optimizers.adamw import AdamW
from armillary.train.parallel.curve import FAMILIES, global_batch, small_decoder, whole_parameters
from armillary.train.parallel.launch import PeerError, joined
from armillary.train.parallel.layout import Layout
from armillary.train.parallel.parallelize import parallelize
from armillary.train.schedules import Schedule
from armillary.train.session import CONFIG, METRICS, open_session
from armillary.train.trainer import Hooks, Trainer


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


RANK_STEPS = 30


class Share:
    """A rank's micro-batches of every step, from the step's number alone."""

    def __init__(self, parallel, config):
        self.parallel, self.config, self.step = parallel, config, 0

    def __next__(self):
        batch = global_batch(self.step, self.config.vocab_size, 4)
        size = 4 // self.parallel.dp_world
        self.step += 1
        return batch[self.parallel.dp_rank * size : (self.parallel.dp_rank + 1) * size]

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def train_ranks(parallel, config, folder, steps, hooks=None, optimizer=None):
    """Goes on from the folder's newest checkpoint until `steps`, saving after every step."""
    trainer = Trainer(
        parallel,
        optimizer or (lambda named: AdamW([p for _, p in named], lr=1e-2, eps=1e-5, fused=False)),
        Schedule("constant", steps),
        Share(parallel, config),
        checkpoints=FolderCheckpoints(folder),
        hooks=hooks or Hooks(save_every=1),
    )
    losses = []
    trainer.hooks.on_step = lambda result: losses.append((result.step, result.loss))
    trainer.restore()
    trainer.run()
    trainer.checkpoints.close()
    return losses, whole_parameters(parallel.named_parameters())


def start_rank(place, rank, port):
    """One of two ranks in a process of its own."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with joined(20.0, 60.0):
            config = FAMILIES["llama"]
            parallel = parallelize(small_decoder(config), Layout.parse("dp_shard=2"))
            _, parameters = train_ranks(parallel, config, place / "checkpoints", RANK_STEPS)
        if rank == 0:
            save_file(parameters, place / "trained.safetensors")
        status = 0
    except PeerError as error:
        print(error, file=sys.stderr)
        status = 3
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(status)


def kill_ranks(place, kills, seed):
    chance = random.Random(seed)
    named = 0
    for attempt in range(kills + 1):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        begun = newest(place / "checkpoints")
        children = [start_rank(place, rank, port) for rank in range(2)]
        if attempt == kills:
            break
        while newest(place / "checkpoints") == begun:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.2)
        victim = chance.randrange(2)
        os.kill(children[victim], signal.SIGKILL)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert statuses[victim] == -signal.SIGKILL, "it ended before it was killed"
        named += statuses[1 - victim] == 3  # the survivor says who is gone
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps({"kills": kills, "named": named, "statuses": statuses}))


if __name__ == "__main__":
    {"run": main, "rank": kill_ranks}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
