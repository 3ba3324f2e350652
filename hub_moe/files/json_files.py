"""JSON for people and other programs: written whole or not at all; what others wrote is read field by field, and
refused in one sentence where it is damaged.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError

_LIST_OF_NUMBERS = re.compile(r"\[\n([-+.\deE,\s]*)\]")  # strings hold no line breaks in JSON


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` indented, lists of numbers on one line each; a reader sees the old file or the new one.

    Raises:
        OSError: If the folder is missing or the disk is full; an earlier file is then as it was.
    """
    path = Path(path)
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    text = _LIST_OF_NUMBERS.sub(lambda found: f"[{' '.join(found.group(1).split())}]", text)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; `what` names the kind of file in errors: "an expert profile".

    Raises:
        ConfigError: If the file is truncated or no JSON object, or a key is in an object twice.
        OSError: If it cannot be read.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_make_object)
    except ConfigError as error:
        raise ConfigError(f"{path} is not {what}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not {what}: it is truncated or not JSON ({error}).") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not {what}: expected a JSON object, found a {type(data).__name__}.")
    return data


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ConfigError(f"the key {twice!r} is there twice.")
    return found


class JsonObject:
    """A JSON object that is read field by field, so that what is missing, misspelt or of a wrong type is named."""

    def __init__(self, fields: Any, source: str) -> None:
        if not isinstance(fields, dict):
            raise CheckpointError(f"{source} must hold a JSON object, not {shorten(fields)}.")
        self._fields = dict(fields)
        self._source = source

    def take(self, name: str, *types: type) -> Any:
        """The value of a field, which is taken out; bool passes as bool only."""
        if name not in self._fields:
            raise CheckpointError(f"{self._source} lacks the field {name!r}.")
        value = self._fields.pop(name)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            expected = " or ".join("null" if each is type(None) else each.__name__ for each in types)
            raise CheckpointError(f"{self._source}: {name!r} must be {expected}, not {shorten(value)}.")
        return value

    def take_or(self, default: Any, name: str, *types: type) -> Any:
        """The value of a field that may be missing, which is then `default`."""
        return self.take(name, *types) if name in self._fields else default

    def inner(self, name: str) -> "JsonObject":
        """The object in a field."""
        return JsonObject(self.take(name, dict), f"{self._source}: {name!r}")

    def finish(self) -> None:
        """Refuse fields that nobody took."""
        for name in self._fields:
            raise CheckpointError(
                f"{self._source} has the field {name!r}, which this version of hub_moe does not know."
            )


def shorten(value: Any) -> str:
    """A value as an error message quotes it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
