"""The composition matrix: features do not meet in `if` branches but in the schedule."""

import pytest
from composition import FEATURES, check, pairs


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_a_feature_alone_changes_no_token(feature):
    check(feature)


@pytest.mark.parametrize("pair", pairs(), ids=lambda pair: f"{pair[0].name} + {pair[1].name}")
def test_two_features_together_change_no_token(pair):
    check(*pair)
