"""Memory that was freed is used again, without asking the system for its pages a second time."""

import subprocess
import sys

import pytest

from armillary.core.allocator import keep_memory

PROGRAM = """
import ctypes, resource
from armillary.core.allocator import keep_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 << 20)
    libc.memset(block, 1, 64 << 20)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(keep_memory(), faults(), faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_block_that_is_taken_again_costs_no_page_faults():
    kept, first, second = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout.split()
    if kept != "True":
        pytest.skip("another C library")
    assert int(second) <= 8 < int(first)  # 16,384 pages, or 32 huge ones


def test_another_system_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert keep_memory.__wrapped__() is False
