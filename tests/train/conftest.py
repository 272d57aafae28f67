"""Lets the tests of this ring import what they share, and pins the threads: the order in which torch adds up depends on their number."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """One thread, as the ranks and the killed runs have that these tests compare with to the last bit."""
    torch.set_num_threads(1)
