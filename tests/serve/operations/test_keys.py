"""Keys by name, and what a minute's bucket gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.errors import FormatError, InputError, NotFoundError
from armillary.serve.operations.keys import KeyRing
from armillary.serve.operations.token_bucket import MINUTE, TokenBucket


def test_each_key_has_an_owner_and_no_other_has(tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text('[alice]\nkey = "aä"\nrequests_per_minute = 3\n[bob]\nkey = "b"\ntokens_per_minute = 100\n')
    ring = KeyRing.of(["one", "two"], file)
    owners = {key: ring.owner(key.encode()) for key in ("one", "two", "aä", "b", "", "on", "one ", "a")}
    assert {key: owner.name for key, owner in owners.items() if owner is not None} == {
        "one": "key-1",
        "two": "key-2",
        "aä": "alice",
        "b": "bob",
    }
    alice, bob = owners["aä"], owners["b"]
    assert (alice.requests_per_minute, alice.tokens_per_minute, bob.requests_per_minute, bob.tokens_per_minute) == (3, None, None, 100)
    assert "aä" not in repr(ring.keys)  # digests alone are kept


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("", InputError, "has no key"),
        ("[a]\n", InputError, "not right in key"),
        ('[a]\nkey = ""\n', InputError, "not right in key"),
        ('[a]\nkey = " "\n', InputError, "API key is empty"),
        ('[a]\nkey = "s3cret"\nrequests_per_minute = 0\n', InputError, "not right in requests_per_minute"),
        ('[a]\nkey = "s3cret"\ntokens_per_minute = "many"\n', InputError, "not right in tokens_per_minute"),
        ('[a]\nkey = "s3cret"\ntokens = 3\n', InputError, "known are key, requests_per_minute, tokens_per_minute"),
        ('a = "s3cret"\n', InputError, r"write \[a\]"),
        ('["a b"]\nkey = "s3cret"\n', InputError, "names no key"),
        ('[a]\nkey = "s3cret"\n[b]\nkey = "s3cret"\n', InputError, "'a' and 'b' are the same"),
        ("[a\n", FormatError, "not TOML"),
    ],
)
def test_a_keys_file_that_is_wrong_is_refused_without_its_keys(tmp_path, text, error, said):
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(error, match=said) as raised:
        KeyRing.of([], file)
    assert "s3cret" not in str(raised.value)


def test_a_keys_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"none\.toml"):
        KeyRing.of([], tmp_path / "none.toml")


@given(
    per_minute=st.integers(1, 10_000),
    steps=st.lists(st.tuples(st.integers(0, 2 * MINUTE), st.integers(0, 200), st.booleans()), max_size=40),
)
def test_no_span_of_time_gives_more_than_its_share(per_minute, steps):
    """Over any span t at most a bucket and what ran in meanwhile is taken; what a wait promises is there when it is over."""
    bucket, now, taken = TokenBucket(per_minute, 0), 0, []
    for pause, amount, patient in steps:
        now += pause
        amount = min(amount, per_minute)
        wait = bucket.take(amount, now)
        if wait and patient:
            now += wait
            assert bucket.take(amount, now) == 0
        if not wait or patient:
            taken.append((now, amount))
    for index, (start, _) in enumerate(taken):
        total = 0
        for at, amount in taken[index:]:
            total += amount
            assert total <= per_minute * (1 + (at - start) / MINUTE) + 1e-6 * per_minute + 1e-6


def test_a_debt_is_paid_before_anything_is_taken():
    bucket = TokenBucket(60, 0)  # one a second
    assert bucket.take(60, 0) == 0
    bucket.charge(30, 0)
    assert bucket.level(0) == -30
    assert bucket.take(1, 0) == pytest.approx(31e9, rel=1e-6)
    assert bucket.take(1, 31_000_000_001) == 0
    assert bucket.full_in(31_000_000_001) == pytest.approx(60e9, rel=1e-6)
