"""The numbers of the GPU kernels, in Triton's interpreter: the tests of the files beside this one named `interpreted_*.py`.

Triton decides at its import whether it interprets, and other tests may have imported it: so each file has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def triton_version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in metadata.version("triton").split(".")[:2])
    except metadata.PackageNotFoundError:
        return (0,)


@pytest.mark.slow
@pytest.mark.skipif(triton_version() == (0,), reason="triton is not installed: pip install 'armillary[gpu]'")
@pytest.mark.skipif((0,) < triton_version() < (3, 7), reason="triton 3.5's interpreter fails with NumPy 2.4; 3.7's does not")
@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("interpreted_*.py")))
def test_interpreted(file: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[2] / "src"), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(command, cwd=HERE.parents[2], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
