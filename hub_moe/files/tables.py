"""Tables of TOML or JSON into frozen dataclasses and back: unknown keys, wrong types and values are refused by name."""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError

_T = TypeVar("_T")


def read_toml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tables of a TOML file, with `overrides` such as `training.steps=10` applied.

    The value of an override is TOML; what is no TOML is taken as text, so that names need no quotes. Without a value
    (`data.config=`) the key is taken out.

    Raises:
        ConfigError: If there is no such file, it is not TOML, or an override is not of the form TABLE.KEY=VALUE.
    """
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    for override in overrides:
        _apply_override(tables, override)
    return tables


def read_table(cls: type[_T], table: Any, *, where: str) -> _T:
    """An instance of the dataclass `cls` from a TOML table; `where` is what messages call the table.

    Fields that are dataclasses are tables inside of this one. A field with the metadata `flat` takes its keys from
    this table itself.

    Raises:
        ConfigError: On a key that no field has, a value of another type, or a missing key that has no default.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table, not {_describe(table)}.")
    check_keys(table, known=list(key_names(cls)), where=where)
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint = hints[field.name]
        if field.metadata.get("flat"):
            inner = {key: table[key] for key in key_names(hint) if key in table}
            values[field.name] = read_table(hint, inner, where=where)
        elif field.name in table:
            values[field.name] = read_value(hint, table[field.name], where=f"{where} {field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where} lacks the key {field.name}, which has no default.")
    return cls(**values)


def check_keys(table: Mapping[str, Any], *, known: Sequence[str], where: str) -> None:
    """Refuse the first key that is not among `known`.

    Raises:
        ConfigError: Naming the nearest known key.
    """
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it may hold {', '.join(known)}."
            raise ConfigError(f"{where} has no key {key!r}; {hint}")


def key_names(cls: type[Any]) -> Iterable[str]:
    """The keys that a table for the dataclass `cls` may hold."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield from key_names(hints[field.name]) if field.metadata.get("flat") else [field.name]


def read_value(hint: Any, value: Any, *, where: str) -> Any:
    """`value` as the type `hint` says; whole numbers pass as floats, arrays become tuples.

    Raises:
        ConfigError: If it is of another type, or not one of the values of a Literal.
    """
    if hint is Any:
        return value
    if get_origin(hint) in (Union, UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        options = [option for option in get_args(hint) if option is not type(None)]
        fitting = [option for option in options if _is_of(option, value)]
        return read_value((fitting or options)[0], value, where=where)
    if dataclasses.is_dataclass(hint):
        return read_table(hint, value, where=where)  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{where} is {value!r}; expected one of {', '.join(map(repr, get_args(hint)))}.")
        return value
    if not _is_of(hint, value):
        raise ConfigError(f"{where} must be {_TYPE_NAMES[get_origin(hint) or hint]}, not {_describe(value)}.")
    if get_origin(hint) is Mapping:
        inner = get_args(hint)[1]
        return {key: read_value(inner, item, where=f"{where} {key!r}") for key, item in value.items()}
    if get_origin(hint) in _ARRAYS:
        return tuple(read_value(get_args(hint)[0], item, where=f"{where}, item {i},") for i, item in enumerate(value))
    return _to_float(value, where) if hint is float else value


def write_toml(tables: Mapping[str, Any]) -> str:
    """TOML of nested mappings of numbers, texts and arrays, of mappings too; what is None is left out."""
    return "\n".join(_table_lines(tables, name="")).strip() + "\n"


_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "an array",
    Sequence: "an array",
    dict: "a table",
    Mapping: "a table",
}
_ARRAYS = (tuple, Sequence)


def _apply_override(tables: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(f"--set {override} is not of the form TABLE.KEY=VALUE, such as training.steps=10.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = tables
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {key} is a value and not a table.")
    if not text.strip():
        table.pop(keys[-1], None)
    else:
        table[keys[-1]] = value


def _to_float(value: float, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{where} is too large for a number.") from None


def _is_of(hint: Any, value: Any) -> bool:
    plain = get_origin(hint) or hint
    if plain is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if plain is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if plain in _ARRAYS:
        return isinstance(value, list | tuple)
    if plain is Literal:
        return value in get_args(hint)
    return isinstance(value, Mapping if dataclasses.is_dataclass(plain) else plain)


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a table"
    return f"the array {value!r}" if isinstance(value, list | tuple) else repr(value)


def _table_lines(table: Mapping[str, Any], *, name: str, in_array: bool = False) -> Iterable[str]:
    values = {key: value for key, value in table.items() if value is not None and not _holds_tables(value)}
    if in_array:
        yield f"\n[[{name}]]"
    elif name and (values or not table):
        yield f"\n[{name}]"
    for key, value in values.items():
        yield f"{_key(key)} = {_value(value)}"
    for key, value in table.items():
        inner = f"{name}.{_key(key)}" if name else _key(key)
        if isinstance(value, Mapping):
            yield from _table_lines(value, name=inner)
        elif _holds_tables(value):
            for item in value:
                yield from _table_lines(item, name=inner, in_array=True)


def _holds_tables(value: Any) -> bool:
    is_array = isinstance(value, list | tuple) and bool(value)
    return isinstance(value, Mapping) or (is_array and all(isinstance(item, Mapping) for item in value))


def _key(key: str) -> str:
    is_bare = key and all(char.isascii() and (char.isalnum() or char in "-_") for char in key)
    return key if is_bare else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, float):
        return repr(value)  # inf and nan are TOML too
    text = json.dumps(value, ensure_ascii=False)  # TOML's basic strings take JSON's escapes
    return text.replace("\x7f", "\\u007f")
