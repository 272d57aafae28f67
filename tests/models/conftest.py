"""What several files of this ring's tests share."""

import pytest

from armillary.models.load import LoadedModel, load


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The real model, pulled into the user's cache at first use. Tests that ask for it are slow ones."""
    return load("smollm2")
