"""Keys and values from one machine to another through torch.distributed (gloo): kept by the worker that computed them until one asks."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore
from torch.distributed import DistError

from armillary.core.errors import CapacityError
from armillary.serve.executors.forward import Forward

CONNECT: Final = timedelta(seconds=2)
SEND: Final = timedelta(seconds=20)
SHUN: Final = 30.0  # seconds in which a worker that could not be reached is not asked again
FOREVER: Final = timedelta(days=365)


class KVNetwork:
    """`host.Files` over gloo. `address` ("host:port") is where a prefill worker is asked; a decode worker, which only asks, gives no `host`.

    Each decode worker makes a group of two with each prefill worker, so that a death ends one pair and no more. As everywhere in
    torch.distributed, who can reach the port is trusted; what is kept is given only to who names its key.
    """

    def __init__(self, forward: Forward, block_size: int, host: str | None) -> None:
        self._forward, self._block_size = forward, block_size
        self._kept: dict[str, Tensor] = {}
        self._pairs: dict[str, _Pair] = {}
        self._shunned: dict[str, float] = {}
        self.address = ""
        if host is not None:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=FOREVER)
            self.address = f"{host}:{self._store.port}"
            threading.Thread(target=self._accept, args=(host, self._store.port), name="kv-accept", daemon=True).start()

    def leave(self, place: str) -> KeptTensor:
        return KeptTensor(self._forward, self._block_size, self._kept, place.rpartition("/")[2])

    def fetch(self, place: str, tokens: int, size: int) -> Asked:
        return Asked(self, place, tokens, size)

    def free(self, place: str) -> None:
        self._kept.pop(place.rpartition("/")[2], None)

    def pull(self, place: str, size: int, blocks: int) -> Tensor:
        """Ask the worker that keeps it. Raises OSError or CapacityError when it cannot give it."""
        address, _, key = place.rpartition("/")
        pair = self._pairs.get(address)
        if time.monotonic() < self._shunned.get(address, 0.0):
            raise CapacityError(f"{address} could not be reached a moment ago", "see that machine's network")
        try:
            if pair is None:
                pair = self._pairs[address] = _Pair(address)
            data = pair.ask(key, size)
        except (DistError, RuntimeError, ValueError) as error:
            self._pairs.pop(address, None)
            self._shunned[address] = time.monotonic() + SHUN
            raise OSError(f"{address} does not send its keys and values: {error}") from error
        return data.reshape(blocks, -1)

    @property
    def forward(self) -> Forward:
        return self._forward

    @property
    def block_size(self) -> int:
        return self._block_size

    def _accept(self, host: str, port: int) -> None:
        """A thread for each worker that asks."""
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=FOREVER)
        for peer in itertools.count():
            try:
                store.wait([f"peer/{peer}"])
            except (DistError, RuntimeError):
                return  # this process ends
            threading.Thread(target=self._serve, args=(host, port, peer), name=f"kv-give-{peer}", daemon=True).start()

    def _serve(self, host: str, port: int, peer: int) -> None:
        try:
            store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=FOREVER)
            group = _group(PrefixStore(f"pair/{peer}", store), 0, host)
            for number in itertools.count():
                store.wait([f"want/{peer}/{number}"])
                data = self._kept.get(store.get(f"want/{peer}/{number}").decode())
                store.delete_key(f"want/{peer}/{number}")
                store.set(f"size/{peer}/{number}", str(0 if data is None else data.numel()))
                if data is not None:
                    group.send([data.view(-1)], 1, number).wait(SEND)
        except (DistError, RuntimeError):
            return  # the other is gone: it comes back as another pair


class KeptTensor:
    """`host.Leave`: the blocks of a sequence, kept here."""

    def __init__(self, forward: Forward, block_size: int, kept: dict[str, Tensor], key: str) -> None:
        self._forward, self._block_size, self._kept, self._key = forward, block_size, kept, key
        self.left: dict[str, int] | None = None

    def write(self, table: Sequence[int], tokens: int) -> None:
        data = self._forward.read_blocks(table[: -(-tokens // self._block_size)]).contiguous()
        self._kept[self._key] = data
        self.left = {"tokens": tokens, "bytes": data.numel()}


class Asked:
    """`host.Fetch`: asked for when the pool has blocks for it."""

    def __init__(self, network: KVNetwork, place: str, tokens: int, size: int) -> None:
        self._network, self._place, self._size = network, place, size
        self.tokens = tokens

    def into(self, table: Sequence[int]) -> None:
        """Raises OSError or CapacityError when whoever keeps it cannot give it."""
        blocks = -(-self.tokens // self._network.block_size)
        self._network.forward.write_blocks(table[:blocks], self._network.pull(self._place, self._size, blocks))

    def close(self) -> None:
        """Nothing is open."""


class _Pair:
    """This worker and one that keeps keys and values."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=CONNECT)
        self._peer = self._store.add("peers", 1) - 1
        self._store.set(f"peer/{self._peer}", "here")
        self._group = _group(PrefixStore(f"pair/{self._peer}", self._store), 1, host)
        self._count = 0

    def ask(self, key: str, size: int) -> Tensor:
        number, self._count = self._count, self._count + 1
        self._store.set(f"want/{self._peer}/{number}", key)
        there = int(self._store.get(f"size/{self._peer}/{number}"))
        self._store.delete_key(f"size/{self._peer}/{number}")
        if there != size:
            raise CapacityError(f"{size:,} bytes of keys and values were announced, {there:,} are there")
        data = torch.empty(size, dtype=torch.uint8)
        self._group.recv([data], 0, number).wait(SEND)
        return data


def _group(store: PrefixStore, rank: int, host: str) -> Any:
    """A gloo group of two; one within a machine needs no name of the machine that others can resolve."""
    if host.startswith("127."):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo"))
    return ProcessGroupGloo(store, rank, 2, SEND)
