"""The composition matrix: features do not meet in `if` branches but in the schedule."""

import pytest
from composition import BY_NAME, FEATURES, PAGE, REFUSED, check, engine_with, pairs, table, together


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_a_feature_alone_changes_no_token(feature):
    check(feature)


@pytest.mark.parametrize("pair", pairs(), ids=lambda pair: f"{pair[0].name} + {pair[1].name}")
def test_two_features_together_change_no_token(pair):
    check(*pair)


def test_all_that_go_together_change_no_token():
    assert len(together()) > 8
    check(*together())


@pytest.mark.parametrize("pair", REFUSED, ids=" + ".join)
def test_what_does_not_compose_is_refused_in_words(pair):
    with pytest.raises(ValueError, match=REFUSED[pair]):
        engine_with(tuple(BY_NAME[name] for name in sorted(pair)))


def test_the_page_is_the_table():
    assert PAGE.read_text() == table(), "python tests/serve/composition.py writes it"
