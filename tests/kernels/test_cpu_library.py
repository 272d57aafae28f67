"""Every instruction set that ARMILLARY_ISA may name compiles, whatever this machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from armillary.core import native
from armillary.core.errors import MissingDependencyError
from armillary.kernels import cpu_library, training_library

SETS = ("native", "avx512", "avx2", "portable")


@pytest.fixture(scope="module")
def builds() -> Iterator[Mapping[str, list[Future[Path]]]]:
    """Both libraries for each instruction set, as many at a time as there are cores: the longest source of each is compiled by one."""
    try:
        native.find_compiler()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    if not native.enabled():
        pytest.skip("ARMILLARY_NATIVE=0 switches the kernels off")
    libraries = (("decoder_step", cpu_library.SOURCES, False), ("training", training_library.SOURCES, True))
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(os.cpu_count()) as pool:
        coming: dict[str, list[Future[Path]]] = {}
        for isa in SETS if os.uname().machine == "x86_64" else SETS[:1]:
            patch.setenv("ARMILLARY_ISA", isa)
            flags = cpu_library.flags()
            coming[isa] = [
                pool.submit(native.build, name, [cpu_library.FOLDER / source for source in sources], flags, openmp=openmp)
                for name, sources, openmp in libraries
            ]
        yield coming


@pytest.mark.timeout(900)
@pytest.mark.parametrize("isa", SETS)
def test_every_instruction_set_compiles(isa: str, builds: Mapping[str, list[Future[Path]]]) -> None:
    if isa not in builds:
        pytest.skip(f"{isa} is an x86 instruction set")
    assert all(library.result().exists() for library in builds[isa])
