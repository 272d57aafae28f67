"""Where there is a compiler the kernels build: their tests may only be skipped where there is none."""

from __future__ import annotations

import os

import pytest

from armillary.core import native
from armillary.core.errors import MissingDependencyError
from armillary.kernels import cpu_library, training_library


@pytest.mark.parametrize("isa", ["native", "avx512", "avx2", "portable"])
def test_every_instruction_set_compiles(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        native.find_compiler()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    if not native.enabled():
        pytest.skip("ARMILLARY_NATIVE=0 switches the kernels off")
    monkeypatch.setenv("ARMILLARY_ISA", isa)
    if isa != "native" and os.uname().machine != "x86_64":
        pytest.skip(f"{isa} is an x86 instruction set")
    folder = cpu_library.FOLDER
    assert native.build("decoder_step", [folder / name for name in cpu_library.SOURCES], cpu_library.flags()).exists()
    assert native.build("training", [folder / name for name in training_library.SOURCES], cpu_library.flags(), openmp=True).exists()
