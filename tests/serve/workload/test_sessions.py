"""Conversations: the next turn comes after the answer, begins with all that was said, and is asked the same however long answers take."""

from collections import defaultdict
from itertools import pairwise, repeat

import pytest

from armillary.cluster.device import Link
from armillary.core.clock import VirtualClock
from armillary.core.errors import InputError
from armillary.serve.config import EngineConfig
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.policies import routing
from armillary.serve.simulation.cluster import Cluster
from armillary.serve.simulation.disaggregated import Disaggregated, Side
from armillary.serve.simulation.engine import VirtualEngine
from armillary.serve.simulation.recorder import Recorder
from armillary.serve.workload import fixed, poisson, published, steady
from armillary.serve.workload.sessions import Amount, Conversations, Sessions, system_prompt, think, turns
from armillary.sim.costs import Decoding, Linear

S = 10**9
BLOCK = 16
FAST = Linear("a line", 9.4e6, 65e3, 50.3, Decoding(9.1e6, 50.7, 65e3))
SLOW = Linear("a line", 94e6, 650e3, 50.3, Decoding(91e6, 50.7, 650e3))


class Heard:
    """A source whose requests are kept."""

    def __init__(self, source):
        self.source, self.requests = source, []

    @property
    def next_time(self):
        return self.source.next_time

    def take(self):
        self.requests.append(self.source.take())
        return self.requests[-1]

    def ended(self, request):
        self.source.ended(request)


def run(source, replicas=1, router="round-robin", cost=FAST, fast=True, **options):
    """(requests in the order of arrival, the replica that each session's turns ran on)"""
    heard = Heard(source)
    recorder = Recorder(heard.ended)
    config = EngineConfig(**{"kv_blocks": 20_000, "max_queue": 10**6, **options})
    engines = [
        VirtualEngine(VirtualExecutor(VirtualClock(), cost), config, recorder=recorder, fast_forward=fast, told=False)
        for _ in range(replicas)
    ]
    went = defaultdict(set)
    for index, engine in enumerate(engines):
        submit = engine.submit

        def noted(request, index=index, submit=submit):
            went[request.session].add(index)
            submit(request)

        engine.submit = noted
    Cluster(engines, routing.get(router)).run(heard)
    assert all(request.finished is not None for request in heard.requests)
    return heard.requests, went


def by_session(requests):
    found = defaultdict(list)
    for request in requests:
        found[request.session].append(request)
    return found


LIKE = Sessions(published("code"), Amount(None, 4), Amount(None, 5 * S), 600, 2)


def chats(like=LIKE, rate=1.0, seed=0, **bounds):
    return Conversations(poisson(rate, seed), like, **{"context": 16_000, "seed": seed, "count": 20, **bounds})


def test_a_turn_begins_with_all_that_was_said_and_comes_after_the_answer():
    requests, _ = run(chats(Sessions(published("code"), Amount(3, 5), Amount(2 * S, 2 * S), 100), context=10**5))
    for session in by_session(requests).values():
        assert 3 <= len(session) <= 5
        for one, following in pairwise(session):
            said = (*one.prompt, *one.output)
            assert following.prompt[: len(said)] == said
            assert len(following.prompt) > len(said)
            assert following.arrival == one.finished + 2 * S


def test_a_session_alone_hits_all_its_history_in_full_blocks():
    """All but the last token of an answer has its keys and values in the cache when the next turn comes."""
    source = chats(Sessions(published("code"), Amount(6, 6), Amount(S, S), 0), count=1, context=100_000)
    requests, _ = run(source)
    said = 0
    for request in requests:
        assert request.reused == max(0, said - 1) // BLOCK * BLOCK
        said = len(request.prompt) + len(request.output)
    assert source.shared / source.asked == pytest.approx(sum(r.reused for r in requests) / source.asked, abs=6 * BLOCK / source.asked)


def test_an_endless_cache_has_the_arithmetic_hit_ratio():
    """n sessions of k turns: u user tokens and a answered ones a turn, after s of the system; one session at a time, all in blocks."""
    n, k, u, a, s = 12, 5, 48, 32, 160
    source = Conversations(steady(0.001), Sessions(fixed(u, a), Amount(k, k), Amount(S, S), s), context=4096, count=n)
    requests, _ = run(source)
    asked = n * sum(s + turn * (u + a) + u for turn in range(k))
    shared = (n - 1) * s + n * sum(s + turn * (u + a) for turn in range(1, k))
    assert (source.asked, source.shared) == (asked, shared)
    # An answer's last token has no keys yet, so its block is computed again.
    assert sum(request.reused for request in requests) == shared - n * (k - 1) * BLOCK


@pytest.mark.parametrize(("router", "order"), [("power-of-two", "fcfs"), ("cache-aware", "prefix"), ("consistent-hash", "sjf")])
def test_leaps_change_nothing_where_what_comes_depends_on_what_ended(router, order):
    told = []
    for fast in (False, True):
        requests, _ = run(chats(rate=3.0), 3, router, order=order, fast=fast, kv_blocks=1500)
        told.append([(r.id, r.arrival, r.first_scheduled, r.first_token, r.finished, r.reused) for r in requests])
    assert told[0] == told[1]


def test_prefill_and_decode_workers_hear_of_ends_too():
    side = Side(FAST, EngineConfig(kv_blocks=20_000))
    heard = Heard(chats(Sessions(fixed(50, 20), Amount(3, 3), Amount(S, S), 600), count=10))
    result = Disaggregated(side, side, Link("wire", "wire", 5e9, 10_000), 512 * 1024, 100_000).run(heard)
    assert len(result.arrival) == 30
    for session in by_session(heard.requests).values():
        assert all(following.arrival == one.finished + S for one, following in pairwise(session))


def test_the_same_is_asked_whatever_answers_take():
    """Common random numbers: session i has the same turns, lengths and times to think."""
    asked = []
    for cost in (FAST, SLOW):
        sessions = by_session(run(chats(), cost=cost)[0])
        asked.append({name: [(len(r.prompt), r.sampling.max_tokens) for r in rs] for name, rs in sessions.items()})
    assert asked[0] == asked[1]


def test_a_session_has_one_request_at_a_time():
    requests, _ = run(chats(rate=5.0), 2, "cache-aware", max_running=8)
    for session in by_session(requests).values():
        assert all(one.finished <= following.arrival for one, following in pairwise(session))


def test_sessions_stay_on_a_replica_by_their_name_and_not_by_their_system_prompt():
    """All begin with the same block: by that alone they would all go to one replica."""
    _, went = run(chats(Sessions(fixed(50, 20), Amount(3, 3), Amount(S, S), 600), count=40), 4, "consistent-hash")
    assert all(len(replicas) == 1 for replicas in went.values())
    assert len(set().union(*went.values())) == 4


def test_a_session_that_exceeds_the_context_ends_and_is_counted():
    source = chats(Sessions(fixed(60, 40), Amount(9, 9), Amount(S, S), 0), context=450, count=5)
    requests, _ = run(source)
    assert [len(session) for session in by_session(requests).values()] == [4] * 5
    assert source.cut == 5
    with pytest.raises(InputError, match="no room in a context of 450"):
        chats(Sessions(fixed(60, 40), Amount(9, 9), Amount(S, S), 449), context=450)


@pytest.mark.parametrize("most", [1, 7, 30])
def test_requests_are_bounded(most):
    requests, _ = run(chats(count=None, most=most))
    assert len(requests) == most


def test_turns_and_times_to_think_have_their_means():
    source = Conversations(repeat(0), Sessions(fixed(1, 1), turns("4"), think("20s")), context=10**6, count=4000)
    sessions, thinks = defaultdict(list), []
    while source.next_time is not None:
        request = source.take()
        request.finished = request.arrival
        thinks += [request.arrival - one for one in sessions[request.session][-1:]]
        sessions[request.session].append(request.arrival)
        source.ended(request)
    assert len(sessions) == 4000
    assert sum(len(ats) for ats in sessions.values()) / 4000 == pytest.approx(4, rel=0.05)
    assert sum(thinks) / len(thinks) == pytest.approx(20 * S, rel=0.05)


def test_what_is_written_is_what_is_meant():
    assert turns("2..6") == Amount(2, 6)
    assert turns("2.5") == Amount(None, 2.5)
    assert turns("2..6").mean == 4
    assert think("5s..1min") == Amount(5 * S, 60 * S)
    assert system_prompt("1000") == (1000, 1)
    assert system_prompt("1000x8") == (1000, 8)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (turns, "0"),
        (turns, "0.5"),
        (turns, "3..2"),
        (turns, "2.5..4"),
        (turns, "20000"),
        (turns, "many"),
        (turns, "-1"),
        (think, "20"),
        (think, "5s..1s"),
        (think, "..5s"),
        (think, "-1s"),
        (system_prompt, "x8"),
        (system_prompt, "5x0"),
        (system_prompt, ""),
    ],
)
def test_what_is_no_session_is_refused(read, text):
    with pytest.raises(InputError):
        read(text)
