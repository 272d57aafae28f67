"""Keys and values that are reused: what a new sequence's beginning shares with any sequence before it (RadixAttention)."""

from __future__ import annotations

from array import array
from hashlib import blake2b

from armillary.serve.block_pool import BlockPool
from armillary.serve.request import Request
from armillary.serve.schedule import Hit

NAME_BYTES = 16
AT_ONCE = 64  # blocks that are named when the next name is asked for: a prompt that misses early is not named to its end


class PrefixCache:
    """Finds computed blocks by their contents, and keeps those of ended sequences until the memory is needed (Zheng et al., NeurIPS 2024).

    A full block is named by a hash of its tokens, of the name of the block before it, and of the tenant's salt: a name stands
    for everything from the beginning on, so a dictionary of names is the radix tree, and a match is a walk along one's own names. The
    hash is cryptographic, for a collision would show one tenant another's text. The pool lets a sequence's end go before its
    beginning, so what is kept can be reached.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._block: dict[bytes, int] = {}
        self._name: dict[int, bytes] = {}

    def hit(self, request: Request) -> Hit:
        """The computed blocks that `request`, which has none, could begin with; at least one token stays to be computed."""
        found: list[int] = []
        names, most = request.block_names, (request.known - 1) // self._pool.block_size
        for index in range(most):
            if index >= len(names):
                names_of(request, min(most, index + AT_ONCE), self._pool.block_size)
            block = self._block.get(names[index])
            if block is None:
                break
            found.append(block)
        return Hit(tuple(found), len(found) * self._pool.block_size)

    def keep(self, request: Request, tokens: int) -> None:
        """Makes the full blocks of the first `tokens` tokens, which `request` has computed, known to others."""
        full = tokens // self._pool.block_size
        if full <= request.kept:
            return
        names = names_of(request, full, self._pool.block_size)
        for index in range(request.kept, full):
            name, block = names[index], request.blocks[index]
            known = self._block.get(name)
            if known is None:
                self._pool.keep(block)
                self._block[name], self._name[block] = block, name
            elif known != block:  # it was computed twice; who uses a block uses those before it, so that these never go first
                self._pool.share([known])
                request.blocks[index] = known
                self._pool.free([block])
            request.kept = index + 1

    def forget(self, block: int) -> None:
        """The pool gives a kept block to somebody else."""
        del self._block[self._name.pop(block)]


def names_of(request: Request, count: int, block_size: int) -> list[bytes]:
    """The names of a request's full blocks, the first `count` at least; the request remembers them."""
    names = request.block_names
    if len(names) < count:
        before = names[-1] if names else _salted(request.cache_salt, request.adapter)
        known = array("q", request.tokens(len(names) * block_size, count * block_size))
        tokens, width = memoryview(known).cast("B"), block_size * known.itemsize
        for start in range(0, (count - len(names)) * width, width):
            before = blake2b(bytes(tokens[start : start + width]) + before, digest_size=NAME_BYTES).digest()
            names.append(before)
    return names


def known_names(request: Request, block_size: int) -> tuple[bytes, ...]:
    """The names of all full blocks of what is known of a request."""
    count = request.known // block_size
    return tuple(names_of(request, count, block_size)[:count])


def _salted(salt: str, adapter: str) -> bytes:
    """What stands before a tenant's first block with some adapter; not a block's name, whatever the two are."""
    name = blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=NAME_BYTES, person=b"salt").digest()
    if not adapter:
        return name
    return blake2b(name + adapter.encode("utf-8", "surrogatepass"), digest_size=NAME_BYTES, person=b"adapter").digest()
