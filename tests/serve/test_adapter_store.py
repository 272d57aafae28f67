"""The store of adapters: bounds, least recently used first, nothing in use ever leaves, versions kept apart."""

import random
import threading
from dataclasses import dataclass

import pytest
from adapters import adapter, write
from models import tiny

from armillary.core.errors import CapacityError, InputError, NotFoundError
from armillary.serve.adapters import AdapterStore

CONFIG = tiny().config


@dataclass(eq=False)
class Packed:
    nbytes: int


class Packer:
    """Packs to the adapter's own size."""

    def pack_adapter(self, layers):
        return Packed(sum(low.nbytes for layer in layers for low in layer if low is not None))


@pytest.fixture
def folder(tmp_path):
    def make(name, rank=2, seed=0):
        return write(tmp_path / name, CONFIG, adapter(CONFIG, seed, rank=rank))

    return make


SIZE = adapter(CONFIG, 0, rank=2).nbytes


def store_of(max_loaded=2, max_bytes=1 << 30):
    return AdapterStore(Packer(), CONFIG, max_loaded=max_loaded, max_bytes=max_bytes)


def loaded(store):
    return {row["name"] for row in store.state()["adapters"] if row["loaded"]}


def test_the_least_recently_used_leaves_and_comes_back_as_it_was(folder):
    store = store_of()
    first = store.load("a", folder("a")).key
    store.load("b", folder("b"))
    assert store.key("a") == first
    store.load("c", folder("c"))
    assert loaded(store) == {"a", "c"}
    assert store.names == ("a", "b", "c")
    assert not store.is_ready("b")
    assert store.packed(store.key("b")) is not None
    assert loaded(store) == {"b", "c"}
    assert store.key("a") == first  # the same files: prefixes that it computed are still its own


def test_bytes_bound_as_well(folder):
    store = store_of(max_loaded=100, max_bytes=3 * SIZE)
    for name in "abc":
        store.load(name, folder(name))
    store.load("d", folder("d", rank=4))
    assert loaded(store) == {"c", "d"}
    with pytest.raises(CapacityError, match="lora-memory"):
        store.load("e", folder("e", rank=8))
    assert "e" not in store
    assert loaded(store) == {"c", "d"}


def test_what_is_in_use_never_leaves(folder):
    store = store_of()
    keys = {name: store.load(name, folder(name)).key for name in "ab"}
    for key in keys.values():
        store.begin(key)
    with pytest.raises(CapacityError, match="--max-loras"):
        store.load("c", folder("c"))
    store.end(keys["b"])
    store.load("c", folder("c"))
    assert loaded(store) == {"a", "c"}
    with pytest.raises(CapacityError, match="send the request again"):
        store.begin(keys["b"])
    assert store.packed(keys["a"]) is not None


def test_a_name_with_new_files_keeps_the_old_weights_while_they_are_used(folder):
    store = store_of()
    old = store.load("a", folder("a", seed=1)).key
    before = store.packed(old)
    store.begin(old)
    new = store.load("a", folder("a", seed=2)).key
    assert new != old
    assert store.key("a") == new
    assert store.packed(old) is before
    assert [row["current"] for row in store.state()["adapters"]] == [False, True]
    store.begin(new)
    other = folder("b")
    with pytest.raises(CapacityError):  # both count, and both are in use
        store.load("b", other)
    store.end(old)
    assert store.packed(old) is None
    assert len(store.state()["adapters"]) == 1


def test_new_files_that_are_damaged_leave_the_old_ones_served(folder):
    store = store_of()
    key = store.load("a", folder("a")).key
    (folder("b") / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError):
        store.load("a", folder("a").parent / "b")
    assert store.packed(store.key("a")) is not None
    assert store.key("a") == key


def test_files_that_change_behind_its_back_are_not_served(folder):
    store = store_of(max_loaded=1)
    store.load("a", folder("a", seed=1))
    store.load("b", folder("b"))
    folder("a", seed=2)
    with pytest.raises(InputError, match="changed since it was loaded: load it again"):
        store.key("a")
    store.load("a", folder("a", seed=2))
    assert loaded(store) == {"a"}


def test_unloading_is_at_once_for_new_requests_and_later_for_running_ones(folder):
    store = store_of()
    key = store.load("a", folder("a")).key
    store.begin(key)
    store.unload("a")
    with pytest.raises(NotFoundError):
        store.key("a")
    assert store.packed(key) is not None
    store.end(key)
    assert store.state() == {}
    assert store.load("a", folder("a")).key != key  # what the old one computed is not the new one's


def test_unknown_names_come_with_the_closest(folder):
    store = store_of()
    with pytest.raises(NotFoundError, match="load it first"):
        store.key("sql")
    store.load("sql-v1", folder("a"))
    with pytest.raises(NotFoundError, match="did you mean 'sql-v1'"):
        store.key("sql-v2")
    with pytest.raises(NotFoundError):
        store.unload("sql")


@pytest.mark.parametrize("name", ["", "a b", "../x y", "#", "-x", "é", "a" * 201, "a\n"])
def test_names_are_bounded(name):
    with pytest.raises(InputError, match="no name for an adapter"):
        store_of().load(name, "/nowhere")


def test_users_from_many_threads_are_never_without_their_weights(folder):
    store = store_of(max_loaded=3)
    names = list("abcde")
    for name in names:
        store.load(name, folder(name))
    faults = []

    def use(seed):
        rng = random.Random(seed)
        for _ in range(40):
            try:
                key = store.key(rng.choice(names))
                store.begin(key)
            except CapacityError:
                continue
            if store.packed(key) is None:
                faults.append(key)
            if store.state()["loaded"] > 3:
                faults.append("too many")
            store.end(key)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert not any(row["running"] for row in store.state()["adapters"])
