"""Prefill workers compute prompts, decode workers go on: the answers are those of one engine, and each cache is moved once."""

import os
import random
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from fleet_models import ThreadLauncher, tiny_engine
from fleet_world import World
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_dispatcher import families, prompts
from test_fleet import ENGINE, make, run, same, those, wait

from armillary.core.errors import InputError
from armillary.serve.fleet import kv_files, shared_folder
from armillary.serve.fleet.config import FleetConfig
from armillary.serve.fleet.handover import SharedFolder

POOL = {**ENGINE, "kv_blocks": 60}  # small: decode workers preempt
SPLIT = {"replicas": 1, "prefill_workers": 1, "decode_workers": 1, "silence": 30.0}


@pytest.fixture(scope="module")
def alone():
    return tiny_engine({**POOL, "prefix_cache": "off"}).engine


@contextmanager
def split(processes=(), transfer="memory", **engine):
    made = make(engine={"kv_blocks": 60, **engine}, launcher=ThreadLauncher(processes), transfer=transfer, **SPLIT)
    made.start()
    folder = made._folder
    try:
        yield made
        assert folder is None or not any(folder.iterdir())
        assert all(not member.held_bytes for member in made.dispatcher.members)
    finally:
        made.stop()
    assert folder is None or not folder.exists()


@pytest.fixture(scope="module")
def workers():
    with split() as made:
        yield made


def counted(workers, action):
    before = workers.dispatcher.handover.transfers
    result = action()
    return result, workers.dispatcher.handover.transfers - before


def test_answers_are_those_of_one_engine_and_each_cache_is_moved_once(workers, alone):
    """With prefix cache on both sides, over all kinds of sampling; a request of one token needs no decode worker."""
    for name in ("a", "b"):  # the second time the prefix caches have all of it
        found, transfers = counted(workers, lambda name=name: run(workers, *those(name)))
        same(found, run(alone, *those(name)))
        assert transfers == sum(len(output) > 1 for output, *_ in found)
    words = workers.explain("a0")
    assert any("holds its keys and values" in line for line in words)
    assert any("has fetched its keys and values" in line for line in words)


def test_decode_workers_that_run_out_of_memory_preempt_and_compute_again(workers, alone):
    long = {"max_tokens": 150}
    before = workers.stats.preemptions
    found, transfers = counted(workers, lambda: run(workers, *those("p", **long)))
    same(found, run(alone, *those("p", **long)))
    assert transfers == sum(len(output) > 1 for output, *_ in found)
    wait(lambda: workers.stats.preemptions > before)
    wait(lambda: not workers.snapshot()["blocks"]["used"])


def test_between_machines_the_answers_are_the_same(alone):
    with split(transfer="network") as workers:
        found, transfers = counted(workers, lambda: run(workers, *those("n")))
        same(found, run(alone, *those("n")))
        assert transfers == sum(len(output) > 1 for output, *_ in found)


def test_what_cannot_be_fetched_is_computed_where_it_goes_on(alone, monkeypatch):
    def unreachable(*arguments):
        raise OSError("no route to host")

    monkeypatch.setattr(kv_files.FetchFile, "into", unreachable)
    with split() as workers:
        found, transfers = counted(workers, lambda: run(workers, *those("f")))
        same(found, run(alone, *those("f")))
        assert transfers == 0
        assert any("gave it back" in line for line in workers.explain("f0"))


@pytest.mark.parametrize("transfer", ["memory", "network"])
def test_a_killed_prefill_workers_requests_go_elsewhere(alone, transfer):
    """Replica 0 is the prefill worker; until it is back the decode worker does its work. Over the network it is a thread that hangs up."""
    expected = run(alone, *those("k"))
    killed = []
    with split(processes=(0,) if transfer == "memory" else (), transfer=transfer) as workers:

        def kill():
            if not killed:
                process = workers._processes[0]
                killed.append(process.pid)
                if transfer == "memory":
                    os.kill(process.pid, signal.SIGKILL)
                else:
                    process.started.connection.shutdown(socket.SHUT_RDWR)

        same(run(workers, *those("k", at=1, then=kill)), expected)
        assert killed
        assert workers.dispatcher.stats.deaths == 1


@pytest.mark.parametrize(
    ("policy", "engine"),
    [
        ("sarathi", {"prefix_cache": "off", "max_batch_tokens": 7}),
        ("vllm", {"prefix_cache": "off", "max_batch_tokens": 7}),
        ("orca", {"speculate": "ngram", "backend": "torch"}),
        ("sarathi", {"speculate": "ngram"}),
        ("request-level", {"speculate": "layers", "draft_layers": 0.67, "prefix_cache": "off"}),
        ("vllm", {"speculate": "layers", "draft_layers": 0.67}),
        ("sarathi", {"quantize": "int8", "kv_dtype": "int8"}),
        ("vllm", {"async_scheduling": "on"}),
        ("sarathi", {"order": "sjf", "victim": "cost"}),
        ("orca", {"quantize": "int4", "kv_dtype": "fp16", "deterministic": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_the_split_composes(policy, engine):
    engine = {"policy": policy, "max_running": 4, **engine}
    alone = tiny_engine({**POOL, **engine}).engine
    seeded = {"seed": 5}  # without one, drafts of a model change what is drawn, though not from which law
    with split(**engine) as workers:
        found, transfers = counted(workers, lambda: run(workers, *those("c", **seeded)))
        same(found, run(alone, *those("c", **seeded)))
        assert transfers == sum(len(output) > 1 for output, *_ in found)


@settings(max_examples=20)
@given(st.integers(0, 1 << 30))
def test_every_cache_is_read_once_after_it_was_written_whatever_dies(seed):
    with TemporaryDirectory() as folder:
        every_cache_is_read_once(seed, Path(folder))


def every_cache_is_read_once(seed, folder):
    rng = random.Random(seed)
    world = World(
        {"prefill_workers": 2, "decode_workers": 2, "transfer_memory": 400},
        {"max_running": 3, "kv_blocks": 60},
        delay=lambda: rng.randrange(200),
        tick=1000,
        token_bytes=4,
        exchange=SharedFolder(folder),
    )
    requests = families(world, rng, prompts(25, seed), (1, 8), 20_000)
    died = None
    if rng.random() < 0.7:
        died, at = rng.randrange(4), rng.randrange(20_000)
        victim = world.replicas[died]
        world.at(at, victim.kill)
        world.at(at + rng.randrange(30_000), victim.restart)
    world.run()
    for request in requests:
        world.check(request)
    reads = world.files.reads.values()
    assert set(reads) == {1} or (died in (2, 3) and set(reads) == {1, 2})  # who died may have read what another has to read
    assert world.files.reads.keys() <= set(world.files.written)
    assert world.dispatcher.handover.transfers <= len(world.files.reads)
    assert not any(folder.iterdir())
    assert all(member.held_bytes == 0 for member in world.dispatcher.members)


def test_choices_of_an_answer_are_prefilled_once_and_moved_once(tmp_path):
    fleet = {"prefill_workers": 2, "decode_workers": 2}
    world = World(fleet, {"prefix_cache": "off"}, token_bytes=4, exchange=SharedFolder(tmp_path))
    made = prompts(6, length=(20, 40))
    for i, prompt in enumerate(made):
        first = world.submit(f"{i}/0", prompt, 6)
        for j in range(1, 4):
            world.submit(f"{i}/{j}", prompt, 6, parent=first)
    assert world.dispatcher.waiting == 6 * 4
    world.run()
    assert all(events[-1].finish_reason == "length" for events in world.events.values())
    prefill, decode = (
        [replica.engine.stats for replica in world.replicas if replica.member.role == role] for role in ("prefill", "decode")
    )
    assert sum(stats.scheduled_tokens for stats in prefill) == sum(map(len, made))
    assert sum(stats.forked_tokens for stats in decode) == sum(3 * (len(prompt) - 1) for prompt in made)
    assert sum(stats.scheduled_tokens for stats in decode) == 6 * (5 + 3 * 6)
    assert world.dispatcher.handover.transfers == 6
    assert not any(tmp_path.iterdir())


def test_what_a_killed_server_left_in_memory_is_removed():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = shared_folder.shared_folder().with_name(f"armillary-kv-{gone.pid}-0123")
    left.mkdir()
    (left / "0-1.kv").write_bytes(b"x")
    folder = shared_folder.shared_folder()
    shared_folder.make_alone(folder)
    assert not left.exists()
    assert folder.stat().st_mode & 0o077 == 0
    folder.rmdir()


def test_half_a_split_is_refused():
    with pytest.raises(InputError, match="keeps or marks parts of a sequence"):
        make(engine={"kv_policy": "streaming", "prefix_cache": "off"}, **SPLIT)
    with pytest.raises(ValidationError, match="decode_workers"):
        FleetConfig(prefill_workers=1)
    with pytest.raises(ValidationError, match="give replicas, or"):
        FleetConfig(prefill_workers=1, decode_workers=1, replicas=2)
    with pytest.raises(ValidationError, match="there is no second"):
        FleetConfig(tail="hedged")


@pytest.mark.parametrize(
    "given",
    [
        {"router": "round-robin"},
        {"silence": 1.0},
        {"replicas": 2, "hedge_budget": 0.1},
        {"replicas": 2, "tail": "tied", "hedge_budget": 0.1},
        {"replicas": 2, "transfer": "network"},
        {"replicas": 2, "transfer_memory": 5},
    ],
)
def test_what_nothing_would_look_at_is_refused(given):
    with pytest.raises(ValidationError, match=f"{list(given)[-1]} .* says nothing with"):
        FleetConfig(**given)
