"""The block pool: no block has two owners, none is lost."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from armillary.core.errors import ArmillaryError, CapacityError, InputError
from armillary.serve.block_pool import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """Against the plainest model: users of each block, and the kept ones without users in the order in which they will go."""

    tables = Bundle("tables")

    @initialize(total=st.integers(1, 40))
    def start(self, total):
        self.forgotten = []
        self.pool = BlockPool(total, 16, self.forgotten.append)
        self.free, self.idle, self.kept, self.users = set(range(total)), [], set(), dict.fromkeys(range(total), 0)

    def take(self, blocks):
        """`blocks` were allocated: the free first, then the oldest of the idle."""
        gone = self.idle[: max(0, len(blocks) - len(self.free))]
        assert self.forgotten == gone
        assert set(blocks) <= self.free | set(gone)
        assert not gone or self.free <= set(blocks)
        self.forgotten.clear()
        del self.idle[: len(gone)]
        self.kept -= set(gone)
        self.free -= set(blocks)
        for block in blocks:
            self.users[block] = 1

    @rule(target=tables, count=st.integers(0, 12))
    def allocate(self, count):
        room = len(self.free) + len(self.idle)
        if count > room:
            with pytest.raises(CapacityError, match=f"{count} KV blocks wanted, {room} of"):
                self.pool.allocate(count)
            return multiple()
        blocks = self.pool.allocate(count)
        assert len(blocks) == len(set(blocks)) == count
        self.take(blocks)
        return blocks

    @rule(table=tables, count=st.integers(1, 3))
    def grow(self, table, count):
        if not table or count > len(self.free) + len(self.idle):
            return
        follower = table[-1] + 1
        blocks = self.pool.allocate(count, after=table[-1])
        if follower in self.free:
            assert blocks[0] == follower
        self.take(blocks)
        table.extend(blocks)

    @rule(table=tables, count=st.integers(0, 12))
    def keep(self, table, count):
        for block in table[:count]:
            self.pool.keep(block)
            self.kept.add(block)

    @rule(target=tables, table=tables, count=st.integers(0, 12))
    def share(self, table, count):
        self.pool.share(table[:count])
        for block in table[:count]:
            self.users[block] += 1
        return table[:count]

    @rule(target=tables, data=st.data())
    def share_idle(self, data):
        if not self.idle:
            return multiple()
        block = data.draw(st.sampled_from(self.idle))
        self.pool.share([block])
        self.idle.remove(block)
        self.users[block] = 1
        return [block]

    @rule(table=consumes(tables))
    def release(self, table):
        self.pool.free(table)
        for block in reversed(table):
            self.users[block] -= 1
            if not self.users[block] and block in self.kept:
                self.idle.append(block)
            elif not self.users[block]:
                self.free.add(block)
        unused = [block for block in table if not self.users[block]]
        if unused:
            with pytest.raises(ArmillaryError, match="freed twice"):
                self.pool.free(unused)
            if set(unused) & self.free:
                with pytest.raises(ArmillaryError, match="is shared, but it is free"):
                    self.pool.share(set(unused) & self.free)
            with pytest.raises(ArmillaryError, match="nobody uses it"):
                self.pool.keep(unused[0])

    @invariant()
    def counts(self):
        if hasattr(self, "pool"):
            assert self.pool.free_count == len(self.free) + len(self.idle)
            assert self.pool.idle_count == len(self.idle)
            assert self.pool.used_count == sum(users > 0 for users in self.users.values())
            assert all(self.pool.references(block) == users for block, users in self.users.items())
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
