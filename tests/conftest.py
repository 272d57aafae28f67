"""Hypothesis times no example, for a test that fails on a busy machine says nothing about the code; the header says what is left out."""

import signal
from importlib import metadata

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# A shell starts what it puts in the background with Ctrl-C ignored, and every command that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    """Says where CI cannot see it otherwise whether the GPU kernels are tested at all."""
    try:
        return f"GPU kernels: interpreted and compiled offline by triton {metadata.version('triton')}"
    except metadata.PackageNotFoundError:
        return "GPU kernels: NOT tested, triton is not installed (pip install 'armillary[gpu]', Linux)"
