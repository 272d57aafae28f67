"""The block pool: no block has two owners, none is lost."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from armillary.core.errors import ArmillaryError, CapacityError, InputError
from armillary.serve.block_pool import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """Against the plainest model: a set of free numbers."""

    tables = Bundle("tables")

    @initialize(total=st.integers(1, 40))
    def start(self, total):
        self.pool = BlockPool(total, 16)
        self.free = set(range(total))

    @rule(target=tables, count=st.integers(0, 12))
    def allocate(self, count):
        if count > len(self.free):
            with pytest.raises(CapacityError, match=f"{count} KV blocks wanted, {len(self.free)} of"):
                self.pool.allocate(count)
            return multiple()
        blocks = self.pool.allocate(count)
        assert len(blocks) == len(set(blocks)) == count
        assert set(blocks) <= self.free
        self.free -= set(blocks)
        return blocks

    @rule(table=tables, count=st.integers(1, 3))
    def grow(self, table, count):
        if not table or table[-1] in self.free or count > len(self.free):
            return
        follower = table[-1] + 1
        blocks = self.pool.allocate(count, after=table[-1])
        assert set(blocks) <= self.free
        if follower in self.free:
            assert blocks[0] == follower
        self.free -= set(blocks)
        table.extend(blocks)

    @rule(table=consumes(tables))
    def release(self, table):
        self.pool.free(table)
        self.free |= set(table)
        if table:
            with pytest.raises(ArmillaryError, match="freed twice"):
                self.pool.free(table)

    @invariant()
    def counts(self):
        if hasattr(self, "pool"):
            assert self.pool.free_count == len(self.free)
            assert self.pool.used_count == self.pool.total - len(self.free)
            self.pool.check()


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_fresh_pool_gives_runs_and_so_does_one_that_was_emptied():
    pool = BlockPool(32, 16)
    first, second = pool.allocate(8), pool.allocate(8)
    assert first == list(range(8))
    assert second == list(range(8, 16))
    pool.free(second)
    pool.free(first)
    assert pool.allocate(16) == list(range(16))


@pytest.mark.parametrize("blocks", [[7], [-1], [0, 0]])
def test_foreign_and_repeated_blocks_change_nothing(blocks):
    pool = BlockPool(4, 16)
    owned = pool.allocate(2)
    with pytest.raises(ArmillaryError, match="block"):
        pool.free([owned[1], *blocks] if blocks != [0, 0] else blocks)
    assert pool.used_count == 2
    pool.check()


@pytest.mark.parametrize(("total", "size"), [(0, 16), (4, 0), (-1, 1)])
def test_a_pool_that_holds_nothing_is_refused(total, size):
    with pytest.raises(InputError, match="holds nothing"):
        BlockPool(total, size)
