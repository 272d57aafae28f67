"""Attention's loops when the machine has no memory left: in a process of its own, for the limit is the process's."""

import subprocess
import sys

import pytest

from armillary.kernels import training_library

PROGRAM = """
import resource, sys, torch
from pathlib import Path
from armillary.kernels.attention import AttentionSpec, varlen_attention

def attend(tokens):
    q, k, v = torch.ones(3, tokens, 1, 16, requires_grad=True).unbind()
    return varlen_attention(AttentionSpec(0, 1.0), q, k, v, [tokens])

torch.set_num_threads(THREADS)
before = attend(100)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
try:
    attend(1_500_000)
except MemoryError as error:
    print(error)
print(torch.equal(attend(100), before))
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the address space is read from /proc and bounded by RLIMIT_AS, which Linux has"
)
@pytest.mark.skipif(
    training_library.library() is None, reason="without a C++ compiler or AVX2 there are no compiled loops to test: torch's run"
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_lack_of_memory_is_told_and_survived(threads):
    program = PROGRAM.replace("THREADS", str(threads))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["no memory for the scratch space of attention", "True"]
