"""Configuration: typed values from a default, a TOML file, the environment and flags, in that order, each knowing where it came from."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
import types
import typing
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from armillary.core.errors import FormatError, InputError, NotFoundError
from armillary.core.units import parse_bytes, parse_duration

MAX_FILE_BYTES: Final = 1_000_000
RESERVED: Final = frozenset({"HOME", "NATIVE"})
"""Variables with the prefix that are not config keys: ARMILLARY_HOME (core.paths), ARMILLARY_NATIVE (core.native)."""

Bytes = Annotated[int, BeforeValidator(parse_bytes)]
"""A size in a config: `"2GB"`, `"512 MiB"` or an int."""

Duration = Annotated[int, BeforeValidator(parse_duration)]
"""A duration in a config, in ns: `"50ms"`, `"1.5 s"` or an int of ns."""


class Config(BaseModel):
    """A frozen group of options. An unknown key is an error that names the closest match; nest groups as fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise unknown_key(str(key), cls, "the configuration")
        return data


ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True, slots=True)
class Resolved(Generic[ConfigT]):
    """A configuration and, for every dotted key, `default`, `file X`, `environment VAR` or `flag`."""

    value: ConfigT
    provenance: Mapping[str, str]

    def save(self, path: str | Path) -> None:
        """Write TOML that `resolve(..., file=path)` reads back to the same value, with where each value came from as a comment."""
        Path(path).write_text(to_toml(self.value, self.provenance), encoding="utf-8")


def resolve(
    model_cls: type[ConfigT],
    file: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    prefix: str = "ARMILLARY",
) -> Resolved[ConfigT]:
    """Merge default < file < environment < flag and validate.

    `environment` defaults to `os.environ`; the variable of `serve.max_running` is `ARMILLARY_SERVE__MAX_RUNNING`.
    `flags` maps dotted keys (or nested mappings) to values; a flag that is None was not given, "none" is None.
    Raises InputError (an unknown key with its closest match, a value out of bounds), NotFoundError or FormatError (the file).
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if file is not None:
        for key, value in _flat(model_cls, load_toml(file), f"in {file}"):
            values[key], origin[key] = _none_for(_annotation(model_cls, key), value), f"file {file}"
    for key, variable, text in _from_environment(model_cls, environment, prefix):
        values[key], origin[key] = _literal(_annotation(model_cls, key), text), f"environment {variable}"
    for key, value in _flat(model_cls, _nest({k: v for k, v in (flags or {}).items() if v is not None}), "among the flags"):
        if value is not None:
            values[key], origin[key] = _none_for(_annotation(model_cls, key), value), "flag"
    try:
        value = model_cls.model_validate(_nest(values))
    except ValidationError as error:
        raise _as_input_error(error, origin) from error
    return Resolved(value, types.MappingProxyType({key: origin.get(key, "default") for key in keys(model_cls)}))


def keys(model_cls: type[Config]) -> Iterator[str]:
    """Every dotted key of a configuration, in order of definition."""
    for name, field in model_cls.model_fields.items():
        group = _group(field.annotation)
        if group is None:
            yield name
        else:
            yield from (f"{name}.{key}" for key in keys(group))


def documented_keys(model_cls: type[Config], prefix: str = "") -> list[tuple[str, Any, str]]:
    """(dotted key, default, what it means) of every key, in order of definition."""
    rows: list[tuple[str, Any, str]] = []
    for name, field in model_cls.model_fields.items():
        group = _group(field.annotation)
        if group is None:
            rows.append((prefix + name, field.get_default(call_default_factory=True), " ".join((field.description or "").split())))
        else:
            rows += documented_keys(group, f"{prefix}{name}.")
    return rows


def from_text(model_cls: type[Config], key: str, text: str) -> Any:
    """What a flag's text says for a dotted key: as an environment variable's, `[1, 2]`, `true`, `3`, `none` or the text itself.

    Raises InputError for a key that does not exist, with the closest one.
    """
    if key not in keys(model_cls):
        close = difflib.get_close_matches(key, keys(model_cls), n=1, cutoff=0.5)
        raise InputError(f"unknown key {key[:80]!r} among the flags", f"did you mean --{close[0]}?" if close else "see the keys", field=key)
    return _literal(_annotation(model_cls, key), text)


def unknown_key(key: str, model_cls: type[Config], where: str) -> InputError:
    """The error for a key that `model_cls` does not have."""
    last = key.rpartition(".")[2]
    known = list(model_cls.model_fields)
    close = difflib.get_close_matches(last.replace("-", "_").lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
    return InputError(f"unknown key {key[:80]!r} {where}", hint, field=key)


def load_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as a dict. Raises NotFoundError, or FormatError with the line, or when it is over 1 MB."""
    path = Path(path)
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise NotFoundError(f"cannot read the configuration {path} ({error.strerror})", "check the path") from error
    if len(content) > MAX_FILE_BYTES:
        raise FormatError(f"the configuration {path} is over {MAX_FILE_BYTES:,} bytes", "is it a TOML file?")
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{path} is not TOML: {error}", "correct that line") from error


def to_toml(value: Config, provenance: Mapping[str, str] | None = None) -> str:
    """A configuration as TOML, each line with its provenance."""
    lines: list[str] = []
    _write(value, "", provenance or {}, lines)
    return "\n".join(lines) + "\n"


def _write(group: Config, path: str, provenance: Mapping[str, str], lines: list[str]) -> None:
    if path:
        lines += ["", f"[{path}]"]
    groups: list[tuple[str, Config]] = []
    for name, field in type(group).model_fields.items():
        value = getattr(group, name)
        dotted = f"{path}.{name}" if path else name
        if isinstance(value, Config):
            groups.append((dotted, value))
            continue
        comment = f"  # {_one_line(provenance[dotted])}" if dotted in provenance else ""
        if value is not None:
            lines.append(f"{name} = {_toml(value, dotted)}{comment}")
        elif field.default is None:
            lines.append(f"# {name} = none{comment}")  # TOML has no null
        elif not _admits(field.annotation, str):
            lines.append(f'{name} = "none"{comment}')
        else:
            raise InputError(f"{dotted} is None, which TOML cannot say apart from its default {field.default!r}", "set it to a value")
    for dotted, value in groups:  # tables come last in TOML, or they would swallow the keys after them
        _write(value, dotted, provenance, lines)


def _toml(value: Any, key: str) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        text = str(value).replace("\\", "\\\\").replace('"', '\\"')
        return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\u{ord(match[0]):04x}", text) + '"'
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_toml(str(name), key)} = {_toml(item, key)}" for name, item in value.items() if item is not None)
        return "{ " + inner + " }" if inner else "{}"
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return "[" + ", ".join(_toml(item, key) for item in items) + "]"
    raise InputError(f"{key} is a {type(value).__name__}, which TOML cannot say", "use numbers, strings, lists or tables")


def _flat(model_cls: type[Config], data: Mapping[str, Any], where: str, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping; the keys are checked, the values not yet."""
    for name, value in data.items():
        field = model_cls.model_fields.get(name)
        if field is None:
            raise unknown_key(path + name, model_cls, where)
        group = _group(field.annotation)
        if group is None:
            yield path + name, value
        elif isinstance(value, Mapping):
            yield from _flat(group, value, where, f"{path}{name}.")
        elif isinstance(value, Config):
            yield from _flat(group, dict(value), where, f"{path}{name}.")
        else:
            raise InputError(f"{path + name} {where} is {value!r}, not a group of keys", f"write {path + name}.KEY", field=path + name)


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, name = key.split(".")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise InputError(f"key {key!r} goes through {part!r}, which is given a value too", "give one of them", field=key)
        if isinstance(value, Mapping) and isinstance(inner.get(name), dict):
            inner[name].update(value)
        else:
            inner[name] = dict(value) if isinstance(value, Mapping) else value
    return nested


def _from_environment(model_cls: type[Config], environment: Mapping[str, str], prefix: str) -> Iterator[tuple[str, str, str]]:
    """(dotted key, variable, text) of the variables that name keys; one that nearly does gets a warning, for it is ignored."""
    variables = {f"{prefix}_{key.replace('.', '__').upper()}": key for key in keys(model_cls)}
    for variable, text in environment.items():
        if variable in variables:
            yield variables[variable], variable, text
        elif variable.startswith(f"{prefix}_") and variable[len(prefix) + 1 :] not in RESERVED:
            close = difflib.get_close_matches(variable, variables, n=1, cutoff=0.9)
            if close:
                warnings.warn(f"{variable} is set but names no option and is ignored: did you mean {close[0]}?", stacklevel=3)


def _annotation(model_cls: type[Config], key: str) -> Any:
    *path, name = key.split(".")
    for part in path:
        group = _group(model_cls.model_fields[part].annotation)
        assert group is not None  # `key` came from `keys` or `_flat`
        model_cls = group
    return model_cls.model_fields[name].annotation


def _group(annotation: Any) -> type[Config] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Config) else None


def _admits(annotation: Any, kind: type) -> bool:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_admits(part, kind) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is Annotated:
        return _admits(typing.get_args(annotation)[0], kind)
    if typing.get_origin(annotation) is typing.Literal:
        return any(isinstance(choice, kind) for choice in typing.get_args(annotation))
    return annotation is Any or (isinstance(annotation, type) and issubclass(annotation, kind))


def _none_for(annotation: Any, value: Any) -> Any:
    """The string "none" means None where None is allowed and a string is not."""
    said = isinstance(value, str) and value.strip().lower() == "none"
    return None if said and _admits(annotation, type(None)) and not _admits(annotation, str) else value


def _literal(annotation: Any, text: str) -> Any:
    """What an environment variable says: the text itself for a string, else a TOML literal (`[1, 2]`, `true`, `3`), else the text."""
    if _admits(annotation, str):
        return text
    try:
        return tomllib.loads(f"value = {text.strip()}")["value"] if "\n" not in text else text
    except (tomllib.TOMLDecodeError, RecursionError):
        return _none_for(annotation, text)


def _as_input_error(error: ValidationError, origin: Mapping[str, str]) -> InputError:
    """The first problem of a pydantic error, with the key and where its value came from; the rest are counted."""
    problems = error.errors(include_url=False)
    first = problems[0]
    cause = first.get("ctx", {}).get("error")
    parts = [str(part) for part in first["loc"]]
    key = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in origin), ".".join(parts))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    where = f" (from {origin[key]})" if key in origin else ""
    if isinstance(cause, InputError):
        return InputError(f"{key}{where}: {cause.problem}{more}" if key else cause.problem + more, cause.fix, field=key or cause.field)
    shown = repr(first["input"])
    shown = shown if len(shown) <= 80 else shown[:80] + "..."
    message = first["msg"][:1].lower() + first["msg"][1:]
    return InputError(f"{key} = {shown}{where} is out of bounds{more}", message, field=key)


def _one_line(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f]", "?", text)
