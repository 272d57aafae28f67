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

def faults(blocks, size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    taken = [libc.malloc(size) for _ in range(blocks)]
    for block in taken:
        libc.memset(block, 1, 16 << 20)  # not all of it: what counts is whether the block went back to the system
    for block in taken:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep = keep_memory()
print(keep, faults(BLOCKS, SIZE), faults(BLOCKS, SIZE))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.parametrize(("blocks", "size"), [(1, 64 << 20), (1, 2100 << 20), (40, 64 << 20)])  # beyond an int, too: a block, and all
def test_memory_that_is_taken_again_costs_no_page_faults(blocks, size):
    program = PROGRAM.replace("BLOCKS", str(blocks)).replace("SIZE", str(size))
    kept, first, second = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    if kept != "True":
        pytest.skip("another C library")
    assert int(second) <= 8 <= int(first)  # 4,096 pages a block, or 8 huge ones


def test_another_system_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert keep_memory.__wrapped__() is False
