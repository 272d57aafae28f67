"""Lost, late and missing ranks end in an error that names them, within seconds."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from armillary.core.errors import InputError
from armillary.train.parallel.launch import joined, launched

RANK = """
import os, signal, sys, time
import torch, torch.distributed as dist
torch.set_num_threads(1)
from armillary.train.parallel.launch import joined
from armillary.train.parallel.layout import Layout
from armillary.train.parallel.mesh import build_mesh
how, culprit = sys.argv[1], int(sys.argv[2])
with joined(timeout=4, join_timeout=60) as rank:
    mesh = build_mesh(Layout(dp_shard=dist.get_world_size()) if how != "late" else Layout(tp=2, dp_shard=2))
    group = (mesh.tp or mesh.shard).get_group()
    dist.all_reduce(torch.ones(1))
    if rank == culprit:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "late":
            time.sleep(60)
        raise ValueError("the data ended")
    dist.all_reduce(torch.ones(3, 5), group=group)
    time.sleep(0.1)
    dist.all_reduce(torch.ones(7))
"""


def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(world, how, culprit):
    environment = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, how, str(culprit)]
    return [subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True) for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "how", "culprit", "said"),
    [
        (2, "killed", 1, ["rank 0: all_reduce of [3, 5] Float (number 2) failed: rank 1 is gone"]),
        (2, "killed", 0, ["rank 1: all_reduce of [3, 5] Float (number 2) failed: rank 0 is gone"]),
        (2, "raised", 1, ["rank 0: all_reduce of [3, 5] Float (number 2) failed: rank 1 is gone"]),
        # A tensor-parallel pair waits for its sleeping member in a group of its own, whose timeout is the run's.
        (4, "late", 1, ["rank 0: all_reduce of [3, 5]", "all ranks live, but not all take part"]),
    ],
)
def test_a_rank_that_is_lost_or_late_is_named_with_the_operation(world, how, culprit, said):
    processes = start(world, how, culprit)
    try:
        witness = processes[1 - culprit]
        _, errors = witness.communicate(timeout=60)
        assert witness.returncode != 0
        for part in said:
            assert part in errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("rank", [0, 1])
def test_peers_that_do_not_come_are_missed(rank, monkeypatch):
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(Exception, match=rf"rank {rank} of 2: not every rank came to 127.0.0.1:\d+ within 1 s"), joined(1, 1):
        pass


def test_a_process_without_peers_is_told_how_to_get_them(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match=r"RANK.*torchrun"), joined():
        pass


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_an_environment_that_is_no_launchers_is_named(name, monkeypatch):
    for other, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", name: "-1"}.items():
        monkeypatch.setenv(other, value)
    with pytest.raises(InputError, match=f"{name} is '-1' in the environment"), launched():
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_peers(number):
    code = "import signal; signal.signal(signal.SIGTERM, lambda *_: None)\nfrom armillary.train.parallel.launch import joined\nprint('here', flush=True)\nwith joined(): pass"
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port())}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"here\n"
    while process.poll() is None:  # before the wait a handler may still hear it
        time.sleep(0.2)
        process.send_signal(number)
    process.stdout.close()
    assert process.returncode != 0
