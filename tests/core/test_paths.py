"""One cache folder, by the documented precedence."""

from __future__ import annotations

from pathlib import Path

import pytest

from armillary.core.errors import InputError
from armillary.core.paths import cache_dir


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    both = {"ARMILLARY_HOME": str(tmp_path / "own"), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    assert cache_dir(both) == tmp_path / "own"
    assert cache_dir({"XDG_CACHE_HOME": str(tmp_path / "xdg")}) == tmp_path / "xdg" / "armillary"
    assert cache_dir({}) == tmp_path / ".cache" / "armillary"
    assert cache_dir({"XDG_CACHE_HOME": "relative"}) == tmp_path / ".cache" / "armillary"
    assert cache_dir({"ARMILLARY_HOME": "~/here"}) == tmp_path / "here"


def test_relative_home_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cache_dir({"ARMILLARY_HOME": "sub"}) == tmp_path / "sub"


def test_a_file_in_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a folder"):
        cache_dir({"ARMILLARY_HOME": str(tmp_path / "file")})
