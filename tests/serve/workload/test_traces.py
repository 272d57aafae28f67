"""Recorded requests: each format says what it says, what is wrong is named by line and column, and what a trace shared is shared again."""

import json
from itertools import pairwise

import pytest

from armillary.core.clock import VirtualClock
from armillary.core.errors import ArmillaryError, FormatError, InputError
from armillary.core.trace import Trace
from armillary.serve.config import EngineConfig
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.policies import routing
from armillary.serve.simulation.cluster import Cluster
from armillary.serve.simulation.comparison import compare, schedules
from armillary.serve.simulation.engine import VirtualEngine, replay
from armillary.serve.simulation.recorder import Recorder
from armillary.serve.workload import fixed, poisson, requests
from armillary.serve.workload.requests import Arrival
from armillary.serve.workload.sessions import Amount, Conversations, Sessions
from armillary.serve.workload.trace_file import Recorded
from armillary.sim.costs import Decoding, Linear

COST = Linear("a line", 9.4e6, 65e3, 50.3, Decoding(9.1e6, 50.7, 65e3))
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def read(tmp_path, text, **how):
    path = tmp_path / "trace"
    path.write_text(text)
    return Recorded(path, **how)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (VIDUR + "0.0,374,44\n4.314579,396,109\n", [Arrival(0, 374, 44), Arrival(4_314_579_000, 396, 109)]),
        (
            AZURE + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
            [Arrival(0, 374, 44), Arrival(4_314_579_000, 396, 109)],
        ),
        (
            AZURE + "2024-05-10 23:59:59.009930+00:00,2162,5\n2024-05-11 00:00:00+00:00,2399,6\n",
            [Arrival(0, 2162, 5), Arrival(990_070_000, 2399, 6)],
        ),
        (
            BURST + "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,230,1317,API log\n",
            [Arrival(0, 472, 18), Arrival(40 * 10**9, 1087, 230)],
        ),
        (
            '{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}\n'
            '{"timestamp": 27, "input_length": 1600, "output_length": 6, "hash_ids": [0, 1, 7]}\n',
            [
                Arrival(0, 1100, 5, content=((1, 512), (2, 512), (3, 76)), shared=0),
                Arrival(27_000_000, 1600, 6, content=((1, 512), (2, 512), (8, 512), (-2, 64)), shared=1024),
            ],
        ),
        ('{"timestamp": 3, "input_length": 9, "output_length": 5}\n', [Arrival(3_000_000, 9, 5, content=((-1, 9),))]),
    ],
)
def test_public_formats(tmp_path, text, found):
    assert list(read(tmp_path, text)) == found


def test_a_trace_is_replayed_as_it_came_or_faster(tmp_path):
    text = VIDUR + "0.0,374,44\n4.314579,396,109\n"
    assert [one.at for one in read(tmp_path, text, speed=2)] == [0, 2_157_289_500]
    assert len(list(read(tmp_path, text, most=1))) == 1


def test_the_access_log_is_in_the_order_of_arrivals(tmp_path):
    """A line is written when its answer has ended; choices are requests that share a prompt; what had no answer is counted."""
    usual = {"choices": 1, "prompt_tokens": 100, "completion_tokens": 10}
    lines = [
        {"time": "2025-01-01T00:00:05.000+00:00", "request_id": "late", "duration_ms": 500.0, **usual},
        {"time": "2025-01-01T00:00:05.500+00:00", "request_id": "health", "duration_ms": 0.1},
        {"time": "2025-01-01T00:00:06.000+00:00", "request_id": "early", "duration_ms": 4000.0, **usual, "choices": 2},
        {"time": "2025-01-01T00:00:07.000+00:00", "request_id": "none", "duration_ms": 1.0, **usual, "completion_tokens": 0},
    ]
    recorded = read(tmp_path, "".join(json.dumps(line) + "\n" for line in lines))
    assert list(recorded) == [
        Arrival(0, 50, 5, "early-0", ((1, 50),)),
        Arrival(0, 50, 5, "early-1", ((1, 50),), 50),
        Arrival(2_500_000_000, 100, 10, "late"),
    ]
    assert recorded.unanswered == 1


def test_what_exceeds_the_context_is_refused_or_cut_and_counted(tmp_path):
    text = '{"timestamp": 3, "input_length": 600, "output_length": 50, "hash_ids": [4, 5]}\n'
    with pytest.raises(InputError, match=r"line 1 .*600 and 50 tokens are more than the context of 580: give --cut"):
        list(read(tmp_path, text, limit=580))
    cut = read(tmp_path, text, limit=580, cut=True)
    assert list(cut) == [Arrival(3_000_000, 579, 1, content=((5, 512), (6, 67)))]
    assert cut.shortened == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("arrived_at,num_prefill_tokens\n1,2\n", "no column 'num_decode_tokens'"),
        ("TIMESTAMP,ContextTokens\n1,2\n", "no column 'GeneratedTokens'"),
        (VIDUR, "no requests"),
        (VIDUR + "0,x,1\n", "line 2 .*column 'num_prefill_tokens': 'x'"),
        (VIDUR + "0,1,1\n5,1,nan\n", "line 3 .*column 'num_decode_tokens'"),
        (VIDUR + "0,1,1\n5,1\n", "line 3"),
        (VIDUR + "5,1,1\n4,1,1\n", "line 3 .* arrives before"),
        (VIDUR + "5,0,1\n", "at least 1 token"),
        (VIDUR + "5,1,-1\n", "at least 1 token"),
        (VIDUR + "1e300,1,1\n", "line 2"),
        (AZURE + "yesterday,1,1\n", "line 2 .*column 'TIMESTAMP'"),
        (AZURE + "2023-11-16 18:15:46,1,1\n2023-11-16 18:15:45,1,1\n", "line 3 .* arrives before"),
        ('{"timestamp": 0, "input_length": 5}\n', "line 1 .*field 'output_length'"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1.5]}\n', "field 'hash_ids'"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1}\n{"timestamp"', "line 2 .*no JSON object"),
        ('{"request_id": "a", "prompt_tokens": 5, "completion_tokens": 1, "time": "now"}\n', "'time' and 'duration_ms'"),
        ('{"traceEvents": [\n]}', "no requests that ended"),
        ('{"traceEvents": [\n', "not JSON"),
        ("{}", 'no "traceEvents"'),
    ],
)
def test_what_is_no_trace_is_named(tmp_path, text, says):
    with pytest.raises(FormatError, match=says):
        list(read(tmp_path, text))


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ArmillaryError, match="cannot read the trace"):
        list(Recorded(tmp_path / "nowhere"))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="no text"):
        list(Recorded(tmp_path / "bytes"))
    with pytest.raises(InputError, match="0 times as fast"):
        Recorded(tmp_path / "bytes", speed=0)


def engine(recorder, trace, **options):
    config = EngineConfig(**{"kv_blocks": 4000, "max_queue": 10**6, **options})
    return VirtualEngine(VirtualExecutor(VirtualClock(), COST), config, recorder=recorder, trace=trace)


def test_a_trace_of_ours_is_the_same_run_again(tmp_path):
    """Conversations on an engine, whose trace alone is asked again: the same arrivals, lengths, prefixes and schedules, to the ns."""
    first, path = Trace("first"), tmp_path / "trace.json"
    talk = Conversations(poisson(2.0), Sessions(fixed(70, 40), Amount(1, 4), Amount(10**9, 10**9), 200, 2), context=4096, count=12)
    recorder = Recorder(talk.ended)
    Cluster([engine(recorder, first)], routing.get("round-robin")).run(talk)
    first.save(path)

    again, recorded, other = Trace("again"), Recorded(path), Recorder()
    coming = list(recorded)
    assert all(one.at <= following.at for one, following in pairwise(coming))
    replay(engine(other, again), requests(coming))
    assert schedules(first) == schedules(again)
    assert (compare(first, again).makespan_error, compare(first, again).ttft.p99) == (0, 0)
    assert recorder.result().reused.sum() == other.result().reused.sum() > 0
    # In full blocks, and who began alike at the same time counts too.
    assert 0 < recorded.shared <= talk.shared
    assert recorded.shared >= recorder.result().reused.sum()


def test_what_began_as_a_request_that_the_trace_lost_begins_alike(tmp_path):
    trace, path = Trace("part"), tmp_path / "trace.json"
    for name, tokens in (("b", 160), ("c", 96)):
        sizes = {"arrival": 5, "prompt": 200, "answer": 9, "reused": 0}
        trace.add(f"request/{name}", "ended", 10, 10, "length", sizes)
        trace.add(f"request/{name}", "shares", 10, 10, "a", {"shared": tokens})
    trace.save(path)
    one, other = Recorded(path)
    assert one.content[0] == (other.content[0][0], 160)
    assert (one.shared, other.shared, other.content[0][1]) == (160, 96, 96)
