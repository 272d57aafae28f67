"""The zig-zag schedule keeps its promises whatever is where: nothing is read before it is there, no buffer is overwritten in use, loads are as counted."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.serve.offload.schedule import Move, Unit, zigzag

BUFFERS = 2


@st.composite
def blocks(draw):
    layers, heads, batches = draw(st.integers(1, 6)), draw(st.integers(0, 3)), draw(st.integers(1, 5))
    flags = lambda n: draw(st.lists(st.booleans(), min_size=n, max_size=n))  # noqa: E731
    sampled = tuple(k for k, rows in enumerate(flags(batches)) if rows)
    weights, cache = flags(layers + heads), flags(layers)
    units = [Unit(u, tuple(range(batches)), weights[u], cache[u]) for u in range(layers)]
    if sampled:
        units += [Unit(u, sampled, weights[u], keeps=False) for u in range(layers, layers + heads)]
    continues = [False, *flags(batches - 1)]
    return units, flags(batches) if batches > 1 else [False], continues


class Lanes:
    """Carries moves out as soon as they are asked for (eager) or not before they are needed, and asserts that it never breaks anything."""

    def __init__(self, eager, continues):
        self.eager, self.continues = eager, continues
        self.made = Counter()
        self.buffers = {"weights": [], "cache": [], "hidden": []}  # what was loaded into each in turn, newest last
        self.stored = Counter()  # of each batch's keys at a unit, how often
        self.asked = {"weights": [], "state": []}

    def submit(self, move):
        self.asked["weights" if move.what == "weights" else "state"].append(move)
        if self.eager:
            self.drain()

    def wait(self, move, index):
        asked = self.asked["weights" if move.what == "weights" else "state"]
        while self.made[move] <= index:  # each pass asks for it once
            self.carry_out(asked.pop(0))

    def drain(self):
        for asked in self.asked.values():
            while asked:
                self.carry_out(asked.pop(0))

    def carry_out(self, move):
        self.made[move] += 1
        place = move.unit if move.what == "weights" else (move.unit, move.batch)
        if move.way == "load":
            if move.what == "cache" and self.continues[move.batch]:
                assert self.stored[move.unit, move.batch - 1] == self.made[move], "loaded before the batch before was stored"
            self.buffers[move.what].append(place)
        else:
            assert self.holds(move.what, place), "stored from a buffer that was loaded anew"
            self.stored[place] += move.what == "cache"

    def holds(self, what, place):
        return place in self.buffers[what][-BUFFERS:]


def play(schedules, units, hidden_away, continues, eager):
    """How often each move was made."""
    lanes, by_index = Lanes(eager, continues), {unit.index: unit for unit in units}
    for index, schedule in enumerate(schedules):
        for move in schedule.before:
            lanes.submit(move)
        for step in schedule.steps:
            for move in step.beside:
                lanes.submit(move)
            for move in step.needs:
                lanes.wait(move, index)
            unit = by_index[step.unit]
            assert not unit.weights_away or lanes.holds("weights", unit.index)
            assert not unit.cache_away or lanes.holds("cache", (step.unit, step.batch))
            assert not hidden_away[step.batch] or lanes.holds("hidden", (step.unit, step.batch))
        for move in schedule.after:
            lanes.submit(move)
    lanes.drain()
    return lanes.made


@settings(max_examples=150)
@given(blocks(), st.integers(1, 3))
def test_nothing_is_read_too_early_or_overwritten_and_every_load_serves_the_whole_block(block, passes):
    units, hidden_away, continues = block
    schedules = [zigzag(units, hidden_away, continues, warm=i > 0, ahead=i < passes - 1) for i in range(passes)]
    wanted = Counter()
    for unit in units:
        if unit.weights_away:
            wanted[Move("weights", "load", unit.index)] = passes  # once a pass, for however many batches
        for batch in unit.batches:
            if unit.cache_away:
                wanted[Move("cache", "load", unit.index, batch)] = passes
                wanted[Move("cache", "store", unit.index, batch)] = passes
            if hidden_away[batch]:
                wanted[Move("hidden", "load", unit.index, batch)] = passes
                if unit.keeps:
                    wanted[Move("hidden", "store", unit.index, batch)] = passes
    for eager in (False, True):
        assert play(schedules, units, hidden_away, continues, eager) == wanted
    assert [(step.unit, step.batch) for step in schedules[0].steps] == [(unit.index, batch) for unit in units for batch in unit.batches]


def test_the_order_is_that_of_the_papers_algorithm():
    units = [Unit(u, (0, 1, 2), weights_away=True, cache_away=True) for u in range(3)]
    schedule = zigzag(units, [True] * 3)
    step = schedule.steps[4]  # layer 1, batch 1
    assert (step.unit, step.batch) == (1, 1)
    assert step.needs == (Move("weights", "load", 1), Move("cache", "load", 1, 1), Move("hidden", "load", 1, 1))
    assert step.beside == (
        Move("cache", "store", 1, 0), Move("hidden", "store", 1, 0), Move("cache", "load", 1, 2), Move("hidden", "load", 1, 2),
    )  # fmt: skip
    assert schedule.steps[3].beside[-3:] == (Move("weights", "load", 2), Move("cache", "load", 1, 1), Move("hidden", "load", 1, 1))
    assert schedule.before == (Move("weights", "load", 0),)
