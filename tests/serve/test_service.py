"""The service without HTTP: what fits, what is refused, and how events reach their readers."""

from __future__ import annotations

import asyncio
import threading

import pytest
from http_world import GREETING, World
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.errors import CapacityError, InputError, NotFoundError
from armillary.serve.request import Event, SamplingParams
from armillary.serve.service import ContextError
from armillary.serve.streams import AsyncStream, LoopBridge

HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"), config={"kv_blocks": 20})  # 320 tokens: less than the model's context
    yield world
    world.close()


def test_the_context_is_the_least_of_its_bounds(world):
    assert world.service.loaded.config.max_context == 512
    assert world.service.context == 20 * 16
    assert world.service.longer == "serve with more --kv-memory"


@pytest.mark.parametrize(
    ("config", "context", "longer"),
    [
        ({"context": 100}, 100, "serve with a larger --context: the model was made for 512"),
        ({}, 512, "serve a model with a longer context"),
        ({"kv_policy": "infllm", "context": 1 << 30}, 64 * 16, "serve with more --kv-memory"),
        ({"kv_policy": "streaming", "context": 1 << 30}, 1 << 30, "serve with a larger --context"),
    ],
)
def test_whoever_finds_the_context_too_short_is_told_what_makes_it_longer(tmp_path, config, context, longer):
    world = World(tmp_path, config={"kv_blocks": 64, "prefix_cache": "off", **config})
    try:
        assert (world.service.context, world.service.longer) == (context, longer)
    finally:
        world.close()


@given(prompt=st.integers(0, 700), wanted=st.none() | st.integers(0, 700))
def test_room_is_all_that_was_asked_for_or_an_error_with_the_numbers(world, prompt, wanted):
    context = world.service.context
    fits = prompt > 0 and prompt + (1 if wanted is None else wanted) <= context
    if fits:
        assert world.service.room(prompt, wanted) == (context - prompt if wanted is None else wanted)
    else:
        with pytest.raises(InputError) as error:
            world.service.room(prompt, wanted)
        if prompt:
            assert isinstance(error.value, ContextError)
            assert str(prompt) in str(error.value)
            assert str(context) in str(error.value)


def test_what_service_promises_the_engine_takes(world):
    """The largest answer that `room` allows is admitted, and comes to its end."""
    prompt = world.service.text_tokens("x" * 100)
    sampling = SamplingParams(max_tokens=world.service.room(len(prompt), None), ignore_eos=True)

    async def run():
        stream = world.service.start("full", [prompt], [sampling])
        return [event async for batch in stream.batches() for _, event in batch]

    events = asyncio.run(run())
    assert len(prompt) + len(events) == world.service.context
    assert events[-1].finish_reason == "length"


def test_other_models_are_refused_by_name(world):
    world.service.check_model(None)
    world.service.check_model("typist")
    with pytest.raises(NotFoundError, match="ask for 'typist'"):
        world.service.check_model("gpt-9")


def test_a_program_without_a_loop_reads_a_stream(world):
    events = list(world.service.stream(HELLO))
    assert "".join(event.text for event in events) == GREETING
    assert events[-1].finish_reason == "stop"
    short = list(world.service.stream(HELLO, SamplingParams(max_tokens=3), whole_context=False))
    assert [event.text for event in short] == ["H", "e", "l"]


def test_closing_a_blocking_stream_cancels(world):
    world.typist.delay = 0.01
    cancelled = world.engine.stats.finished["cancelled"]
    stream = world.service.stream(HELLO, SamplingParams(ignore_eos=True))
    next(stream)
    stream.close()
    world.wait_idle()
    world.typist.delay = 0.0
    assert world.engine.stats.finished["cancelled"] == cancelled + 1


def test_a_service_whose_engine_is_stopped_says_so(tmp_path):
    world = World(tmp_path)
    world.engine.stop()

    async def ask():
        world.service.start("late", [(1,)], [SamplingParams()])

    with pytest.raises(CapacityError, match="does not run"):
        asyncio.run(ask())
    world.close()


def test_no_event_is_lost_or_reordered_between_threads():
    """Several threads post to one loop while it reads: each stream gets all of its events, in order."""
    threads, count = 8, 3_000

    async def run():
        bridge = LoopBridge(asyncio.get_running_loop())
        streams = [AsyncStream(lambda request_id: None) for _ in range(threads)]
        for stream in streams:
            stream.begin([None])  # type: ignore[list-item]

        def write(stream):
            for number in range(count):
                bridge.post(stream, 0, Event("", number, "", None, "stop" if number == count - 1 else None, 0))

        async def read(stream):
            return [event.token async for batch in stream.batches() for _, event in batch]

        writers = [threading.Thread(target=write, args=(stream,)) for stream in streams]
        for writer in writers:
            writer.start()
        return await asyncio.gather(*(read(stream) for stream in streams))

    assert asyncio.run(run()) == [list(range(count))] * threads


def test_a_closed_loop_does_not_harm_the_engine():
    loop = asyncio.new_event_loop()
    bridge = LoopBridge(loop)
    loop.close()
    bridge.post(AsyncStream(lambda request_id: None), 0, Event("", 1, "", None, "stop", 0))


def test_an_engine_that_does_not_run_is_told_and_not_waited_for(tmp_path):
    world = World(tmp_path)
    world.close()
    with pytest.raises(CapacityError, match="the engine does not run"):
        world.service.stream(HELLO)
