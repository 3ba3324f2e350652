"""A `DataSource` from words: `split=test`, `columns.prompt=question`."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..errors import ConfigError
from .source import DataSource


def read_source(names: Sequence[str], settings: Mapping[str, str]) -> DataSource:
    """The source `names` with `settings`, whose keys are fields of `DataSource` or `columns.PART`.

    Raises:
        ConfigError: If a key is unknown (the message names the nearest) or a value does not fit.
    """
    known = [field.name for field in fields(DataSource) if field.name not in ("source", "columns")]
    values: dict[str, Any] = {"columns": {}}
    for key, value in settings.items():
        if key.startswith("columns."):
            values["columns"][key.removeprefix("columns.")] = value
        elif key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)} and columns.PART."
            raise ConfigError(f"{key!r} is no setting of a data source; {hint}")
        else:
            values[key] = _read_value(key, value)
    return DataSource(names[0] if len(names) == 1 else tuple(names), **values)


def _read_value(key: str, value: str) -> Any:
    if key == "limit":
        if not value.isdigit():
            raise ConfigError(f"limit={value} is not a number of rows.")
        return int(value)
    if key == "streaming":
        if value not in ("true", "false"):
            raise ConfigError(f"streaming={value} is neither true nor false.")
        return value == "true"
    return value
