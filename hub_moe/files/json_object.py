"""Reads JSON that somebody else wrote, field by field."""

from typing import Any

from ..errors import CheckpointError


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
