"""default < file < environment < flag, for every subset of sources; what is saved reads back; what is unknown is named."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from armillary.core.config import Bytes, Config, Resolved, keys, load_toml, resolve, to_toml
from armillary.core.errors import FormatError, InputError, NotFoundError


class Engine(Config):
    policy: Literal["sarathi", "orca"] = "sarathi"
    max_running: int = Field(64, ge=1, le=4096)
    kv_memory: Bytes | None = None
    window: int | None = 8


class Serve(Config):
    host: str = "127.0.0.1"
    rate: float = 1.0
    stop: tuple[str, ...] = ()
    engine: Engine = Engine()


@given(st.lists(st.tuples(*[st.booleans()] * 3), min_size=2, max_size=2), st.lists(st.integers(1, 4096), min_size=6, max_size=6))
def test_the_strongest_source_that_speaks_wins(
    tmp_path_factory: pytest.TempPathFactory, speaks: list[tuple[bool, ...]], numbers: list[int]
) -> None:
    file = tmp_path_factory.mktemp("config") / "serve.toml"
    running, rate = speaks
    file.write_text((f"rate = {numbers[0]}\n" if rate[0] else "") + "[engine]\n" + (f"max_running = {numbers[1]}\n" if running[0] else ""))
    environment = {"ARMILLARY_HOME": "/somewhere", "PATH": "/bin"}
    if rate[1]:
        environment["ARMILLARY_RATE"] = str(numbers[2])
    if running[1]:
        environment["ARMILLARY_ENGINE__MAX_RUNNING"] = str(numbers[3])
    flags = {"rate": numbers[4] if rate[2] else None, "engine.max_running": numbers[5] if running[2] else None}
    resolved = resolve(Serve, file, environment, flags)

    def expected(spoken: tuple[bool, ...], default: float, given_numbers: list[int], variable: str) -> tuple[float, str]:
        said = [
            (default, "default"),
            (given_numbers[0], f"file {file}"),
            (given_numbers[1], f"environment {variable}"),
            (given_numbers[2], "flag"),
        ]
        return [what for what, spoke in zip(said, (True, *spoken), strict=True) if spoke][-1]

    assert (resolved.value.rate, resolved.provenance["rate"]) == expected(rate, 1.0, numbers[0::2], "ARMILLARY_RATE")
    key = "engine.max_running"
    assert (resolved.value.engine.max_running, resolved.provenance[key]) == expected(
        running, 64, numbers[1::2], "ARMILLARY_ENGINE__MAX_RUNNING"
    )
    assert set(resolved.provenance) == set(keys(Serve))


@given(
    host=st.text(max_size=20),
    rate=st.floats(allow_nan=False),
    stop=st.lists(st.text(max_size=5), max_size=3),
    kv=st.none() | st.integers(0, 2**63 - 1),
    window=st.none() | st.integers(-(2**40), 2**40),
)
def test_a_saved_configuration_reads_back(
    tmp_path_factory: pytest.TempPathFactory, host: str, rate: float, stop: list[str], kv: int | None, window: int | None
) -> None:
    file = tmp_path_factory.mktemp("config") / "serve.toml"
    value = Serve(host=host, rate=rate, stop=tuple(stop), engine=Engine(kv_memory=kv, window=window))
    Resolved(value, {"host": "file a\nb", "engine.window": "flag"}).save(file)
    assert resolve(Serve, file, {}).value == value


def test_the_saved_file_says_where_each_value_came_from(tmp_path: Path) -> None:
    resolved = resolve(Serve, None, {"ARMILLARY_RATE": "2"}, {"engine.kv_memory": "2GB"})
    text = to_toml(resolved.value, resolved.provenance)
    assert "rate = 2.0  # environment ARMILLARY_RATE" in text
    assert "kv_memory = 2000000000  # flag" in text
    assert 'host = "127.0.0.1"  # default' in text


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("ARMILLARY_STOP", '["a", "b"]', Serve(stop=("a", "b"))),
        ("ARMILLARY_HOST", "12", Serve(host="12")),  # a string stays one
        ("ARMILLARY_ENGINE__KV_MEMORY", "512 MiB", Serve(engine=Engine(kv_memory=2**29))),
        ("ARMILLARY_ENGINE__WINDOW", "none", Serve(engine=Engine(window=None))),
    ],
)
def test_the_environment_is_read_by_the_type_of_the_key(variable: str, text: str, value: Serve) -> None:
    assert resolve(Serve, None, {variable: text}).value == value


@pytest.mark.parametrize("flags", [{"engine.max_runing": 3}, {"engine": {"max_runing": 3}}])
def test_an_unknown_key_names_the_closest(flags: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"unknown key 'engine\.max_runing'.*did you mean 'max_running'"):
        resolve(Serve, None, {}, flags)


def test_an_unknown_key_in_code_and_in_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="did you mean 'policy'"):
        Engine(polcy="orca")  # type: ignore[call-arg]
    file = tmp_path / "a.toml"
    file.write_text("hosts = 'x'")
    with pytest.raises(InputError, match=r"unknown key 'hosts' in .*a\.toml: did you mean 'host'"):
        resolve(Serve, file, {})


def test_a_misspelt_variable_is_warned_about_and_a_foreign_one_is_not(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.warns(UserWarning, match="did you mean ARMILLARY_ENGINE__MAX_RUNNING"):
        resolve(Serve, None, {"ARMILLARY_ENGINE__MAX_RUNNIN": "3"})
    recwarn.clear()
    resolve(Serve, None, {"ARMILLARY_NATIVE": "0", "ARMILLARY_HOME": "x", "OTHER_HOSTS": "y"})
    assert not recwarn.list


def test_a_bad_value_names_key_source_and_bound() -> None:
    with pytest.raises(
        InputError, match=r"engine\.max_running = 0 \(from environment ARMILLARY_ENGINE__MAX_RUNNING\).*greater than or equal to 1"
    ) as caught:
        resolve(Serve, None, {"ARMILLARY_ENGINE__MAX_RUNNING": "0"})
    assert caught.value.field == "engine.max_running"
    with pytest.raises(InputError, match=r"kv_memory.*from flag.*'lots' is not a size in bytes"):
        resolve(Serve, None, {}, {"engine.kv_memory": "lots"})
    with pytest.raises(InputError, match="not a group of keys"):
        resolve(Serve, None, {}, {"engine": 3})


def test_files_that_are_not_toml(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="cannot read"):
        load_toml(tmp_path / "missing.toml")
    for content in (b"a = ", b"\xff\xfe", b"a = " + b"[" * 5000):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(FormatError, match="not TOML"):
            load_toml(tmp_path / "bad.toml")
    (tmp_path / "big.toml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(FormatError, match="over 1,000,000 bytes"):
        load_toml(tmp_path / "big.toml")


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Engine().policy = "orca"  # type: ignore[misc]
