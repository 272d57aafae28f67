"""Events come in the order of (time, sequence), and time never goes back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.errors import InputError
from armillary.sim.events import EventQueue


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans())))
def test_events_are_sorted_by_time_and_then_by_when_they_were_scheduled(scheduled):
    queue, kept = EventQueue(), []
    for place, (time, stays) in enumerate(scheduled):
        number = queue.at(time, place)
        if stays:
            kept.append((time, place))
        else:
            queue.cancel(number)
    assert len(queue) == len(kept)
    assert queue.next_time == min((time for time, _ in kept), default=None)
    seen = []
    while (event := queue.pop()) is not None:
        seen.append((queue.now, event))
    assert seen == sorted(kept)
    assert len(queue) == 0


def test_what_an_event_causes_comes_after_what_was_there():
    queue = EventQueue()
    queue.at(5, "first")
    queue.at(5, "second")
    assert queue.pop() == "first"
    queue.after(0, "third")
    assert [queue.pop(), queue.pop(), queue.pop()] == ["second", "third", None]


def test_the_past_is_closed():
    queue = EventQueue()
    queue.at(5, "")
    queue.pop()
    with pytest.raises(InputError, match="in the past"):
        queue.at(4, "")
