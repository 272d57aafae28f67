"""One rank decides and all know; an error on one is raised on all."""

import errno

import pytest

from armillary.core.errors import InputError
from armillary.train.parallel.agreement import from_rank_0, gathered
from armillary.train.parallel.rank_threads import run_ranks


def test_rank_0_decides_and_no_other_is_asked():
    asked = []

    def work(rank):
        return from_rank_0(lambda: asked.append(rank) or f"rank {rank}")

    assert run_ranks(3, work) == ["rank 0"] * 3
    assert asked == [0]


@pytest.mark.parametrize("error", [InputError("it is full", "empty it"), OSError(errno.EACCES, "Permission denied")])
def test_what_fails_on_rank_0_is_raised_on_all_instead_of_leaving_them_waiting(error):
    def work(_):
        def fail():
            raise error

        with pytest.raises(type(error)) as raised:
            from_rank_0(fail)
        return str(raised.value)

    assert run_ranks(3, work) == [str(error)] * 3


def test_values_are_gathered_in_rank_order():
    assert run_ranks(3, lambda rank: gathered(rank * 10)) == [[0, 10, 20]] * 3


def test_one_process_asks_itself():
    assert (from_rank_0(lambda: 7), gathered(7)) == (7, [7])
