"""Without its anchors an expression means what it meant for a whole text, or it is refused."""

from __future__ import annotations

import re
from itertools import product

import pytest

from armillary.core.errors import InputError
from armillary.serve.grammar.anchors import unanchored

TEXTS = ["".join(letters) for length in range(5) for letters in product("ab^$", repeat=length)]


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("^ab$", "ab"),
        ("^^a$$", "a"),
        ("(^a|b$)", "(a|b)"),
        ("^(a|b)*$", "(a|b)*"),
        ("a|^b|b$", "a|b|b"),
        ("((^a)|b)b", "((a)|b)b"),
        ("a(a|b$)", "a(a|b)"),
        ("(?:^a)(?P<n>b$)", "(?:a)(?P<n>b)"),
        ("(^a)?b", "(a)?b"),
        (r"\Aa{2}\Z", "a{2}"),
        (r"\^a\$", r"\^a\$"),
        ("[^a]$", "[^a]"),
        ("[]^$]*a", "[]^$]*a"),
        ("^$", "^$"),
    ],
)
def test_anchors_that_say_nothing_new_are_dropped(pattern, kept):
    assert unanchored(pattern, "regex") == kept
    assert all(bool(re.fullmatch(pattern, text)) is bool(re.fullmatch(kept, text)) for text in TEXTS)


@pytest.mark.parametrize("pattern", ["a^b", "a$b", "(a$)b", "a(^b)", "^*a", "a$*", "(^a)*", "(a$)+", "(^a|b){3}", r"a\Ab", r"\Q", r"[\Q]"])
def test_what_would_be_dropped_in_silence_is_refused(pattern):
    with pytest.raises(InputError) as caught:
        unanchored(pattern, "guided_regex")
    assert caught.value.field == "guided_regex"
