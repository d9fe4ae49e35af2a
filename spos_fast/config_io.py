"""Settings as plain values: out of presets, TOML files and flags, into JSON, and what ``--help`` says about them."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from spos_fast.config import SECTIONS, Config
from spos_fast.errors import InputError
from spos_fast.spaces.settings import SPACE_CONFIGS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "presets"
# Settings that are paths of tables.
TABLES = (("search", "latency_table"), ("consistency", "table"))


def config_from(values: Mapping[str, Any], origin: str) -> Config:
    """A configuration from nested plain values, defaults elsewhere.

    Args:
        values: ``{"seed": 1, "train": {"steps": 10}, ...}``.
        origin: where they come from, for error messages.

    Raises:
        InputError: unknown keys, wrong types or values out of range.
    """
    parts: dict[str, Any] = {}
    for name, value in values.items():
        if name in SECTIONS:
            if not isinstance(value, Mapping):
                raise InputError(f"{origin}: [{name}] must be a table, got {value!r}")
            section = _section(name, value)
            hints = get_type_hints(section)
            fields = {field.name for field in dataclasses.fields(section)}
            unknown = sorted(set(value) - fields)
            if unknown:
                raise InputError(f"{origin}: {name}.{unknown[0]} is no setting; there are {', '.join(sorted(fields))}")
            typed = {key: _typed(f"{name}.{key}", entry, hints[key]) for key, entry in value.items()}
            try:
                parts[name] = section(**typed)
            except InputError as error:
                raise InputError(f"{name}.{error}") from None
        elif name == "seed":
            parts[name] = _typed("seed", value, int)
            if not 0 <= parts[name] < 2**63:
                raise InputError(f"seed: got {value}; expected 0 or more, below 2**63")
        else:
            raise InputError(f"{origin}: {name} is no setting; there are seed, {', '.join(SECTIONS)}")
    return Config(**parts)


def _section(name: str, value: Mapping[str, Any]) -> Any:
    """The dataclass of a section with these values."""
    if name != "space":
        return SECTIONS[name][0]
    chosen = value.get("name", next(iter(SPACE_CONFIGS)))
    if chosen not in SPACE_CONFIGS:
        raise InputError(f"space.name: got {chosen!r}; expected one of {', '.join(SPACE_CONFIGS)}")
    return SPACE_CONFIGS[chosen]


def read_config(name_or_path: str) -> dict[str, Any]:
    """The plain values of a preset (``digits``, ``imagenet``, ...) or of a TOML file, in which a relative path of a
    table is one beside the file.

    Raises:
        InputError: no such preset or file, or no TOML.
    """
    presets = {path.stem: path for path in sorted(PRESETS.glob("*.toml"))}
    path = presets.get(name_or_path, Path(name_or_path))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"config: {name_or_path!r} could not be read ({error.strerror}); expected a TOML file or a preset: "
            f"{', '.join(presets)}"
        ) from None
    try:
        values = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config: {path} is not TOML ({error})") from None
    for section, name in TABLES:
        given = values.get(section)
        table = given.get(name) if isinstance(given, dict) else None
        if table and isinstance(table, str):
            given[name] = str((path.parent / Path(table).expanduser()).resolve())
    return values


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values, later layers over earlier ones."""
    out: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            nested = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
            out[key] = merged(out[key], value) if nested else value
    return out


def plain(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values that JSON and TOML can hold."""

    def convert(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {field.name: convert(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return list(value) if isinstance(value, tuple) else value

    return convert(config)


def settings_of(section: str) -> list[tuple[str, Any, Any, str]]:
    """(name, type, default, description) of every setting that a section may have, whatever it names. Where several
    spaces have a setting, its text is that of the first one.
    """
    found: dict[str, tuple[str, Any, Any, str]] = {}
    for variant in SECTIONS[section]:
        for field in documented_fields(variant):
            found.setdefault(field[0], field)
    return list(found.values())


def documented_fields(section: type) -> list[tuple[str, Any, Any, str]]:
    """(name, type, default, description) of every field; the descriptions are the ``Attributes`` of the docstrings."""
    docs: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        _, _, attributes = (cls.__doc__ or "").partition("Attributes:\n")
        for match in re.finditer(r"^ {8}(\w+(?:, \w+)*): (.*(?:\n {12}.*)*)", attributes, re.MULTILINE):
            for name in match[1].split(", "):
                docs[name] = " ".join(match[2].split())
    hints = get_type_hints(section)
    return [(field.name, hints[field.name], field.default, docs[field.name]) for field in dataclasses.fields(section)]


def parse_flag(name: str, text: str, kind: Any) -> Any:
    """The value of a command-line flag, by the type of its field.

    Raises:
        InputError: the text is no such value.
    """
    if kind is bool:
        if text.lower() in ("true", "yes", "1", "on"):
            return True
        if text.lower() in ("false", "no", "0", "off"):
            return False
        raise InputError(f"{name}: got {text!r}; expected true or false")
    if kind in (int, float):
        try:
            number = float(text)
        except ValueError:
            raise InputError(f"{name}: got {text!r}; expected a number") from None
        return _typed(name, int(number) if kind is int and number.is_integer() else number, kind)
    if get_origin(kind) is tuple:
        element = get_args(kind)[0]
        return _typed(name, [parse_flag(name, part, element) for part in text.split(",") if text], kind)
    return text


def _typed(name: str, value: Any, kind: Any) -> Any:
    """``value`` if it is of the field's type; numbers are widened and lists become tuples."""
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(option for option in get_args(kind) if option is not type(None))
    if get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{name}: got {value!r}; expected a list")
        return tuple(_typed(name, entry, get_args(kind)[0]) for entry in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = kind if isinstance(kind, type) else str
    if expected is str and type(value) is int:  # n = 500, where "all" is the other answer
        return str(value)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise InputError(f"{name}: got {value!r}; expected {expected.__name__}")
    return value
