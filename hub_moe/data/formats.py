"""What a row is: a chat, a prompt with its completion, or a text; and why a row is none of them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DatasetError
from .source import FormatName, LoadedRows, Row, RowFormat

Message = dict[str, str]

# Columns that `auto` looks for, the richest format first.
_LAYOUTS: tuple[tuple[RowFormat, dict[str, str]], ...] = (
    ("chat", {"messages": "messages"}),
    ("chat", {"messages": "conversations"}),
    ("prompt-completion", {"prompt": "prompt", "completion": "completion"}),
    ("prompt-completion", {"prompt": "prompt", "completion": "response"}),
    ("prompt-completion", {"prompt": "question", "completion": "answer"}),
    ("prompt-completion", {"prompt": "instruction+input", "completion": "output"}),
    ("prompt-completion", {"prompt": "instruction", "completion": "output"}),
    ("text", {"text": "text"}),
)
_REQUIRED: dict[RowFormat, set[str]] = {
    "chat": {"messages"},
    "prompt-completion": {"prompt", "completion"},
    "text": {"text"},
}
_OPTIONAL = {"chat": set[str](), "prompt-completion": {"system"}, "text": set[str]()}
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_ROLES |= {"developer": "developer", "tool": "tool"}


class BadRowError(DatasetError):
    """A row does not fit its format; the message is the reason."""


@dataclass(frozen=True)
class Layout:
    """Which format rows have, and which columns hold what (several are joined)."""

    format: RowFormat
    columns: Mapping[str, tuple[str, ...]]
    is_detected: bool

    def describe(self) -> str:
        """`chat (column messages), detected`."""
        held = ", ".join(f"{part} = {'+'.join(names)}" for part, names in self.columns.items())
        return f"{self.format} ({held}){', told by the columns' if self.is_detected else ''}"


def find_layout(rows: LoadedRows, format: FormatName = "auto") -> Layout:
    """The layout of `rows`: as the source says, or by its columns.

    Raises:
        DatasetError: If a column is not there, or nothing can be told by the columns; the message lists them.
    """
    wanted = rows.format if format == "auto" else format
    if wanted not in (*_REQUIRED, "auto"):
        raise DatasetError(f"There is no format {wanted!r}; use auto, {', '.join(_REQUIRED)}.")
    if rows.column_map:
        return _mapped_layout(rows, wanted)
    for name, columns in _LAYOUTS:
        needed = {column for joined in columns.values() for column in joined.split("+")}
        if wanted in ("auto", name) and needed <= set(rows.columns):
            return Layout(name, _split(columns), is_detected=wanted == "auto")
    wants = f"as {wanted}" if wanted != "auto" else "as chat, prompt-completion or text"
    raise DatasetError(
        f"{rows.provenance.source} cannot be read {wants}: its columns are {', '.join(rows.columns)}; say which is "
        'which with columns, such as {prompt = "...", completion = "..."}.'
    )


def _mapped_layout(rows: LoadedRows, wanted: FormatName) -> Layout:
    given = set(rows.column_map)
    fits = [name for name in _REQUIRED if _REQUIRED[name] <= given <= _REQUIRED[name] | _OPTIONAL[name]]
    if not fits or wanted not in ("auto", *fits):
        parts = "; ".join(f"{name}: {', '.join(sorted(needed))}" for name, needed in _REQUIRED.items())
        raise DatasetError(f"columns names {', '.join(sorted(given))}, but a format needs its own parts ({parts}).")
    columns = _split(rows.column_map)
    for column in (column for names in columns.values() for column in names):
        if column not in rows.columns:
            raise DatasetError(
                f"{rows.provenance.source} has no column {column!r}; its columns are {', '.join(rows.columns)}."
            )
    return Layout(fits[0], columns, is_detected=False)


def _split(columns: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {part: tuple(name.strip() for name in joined.split("+")) for part, joined in columns.items()}


def read_text(row: Row, layout: Layout) -> str:
    """The text of a row of format text.

    Raises:
        BadRowError: If there is none.
    """
    return _join(row, layout.columns["text"])


def read_messages(row: Row, layout: Layout) -> list[Message]:
    """The conversation in a row of format chat or prompt-completion: role and content, ending with an answer.

    Raises:
        BadRowError: If it is not one.
    """
    if layout.format == "prompt-completion":
        messages = [{"role": "system", "content": _join(row, layout.columns["system"])}] if _has(row, layout) else []
        messages.append({"role": "user", "content": _join(row, layout.columns["prompt"])})
        return [*messages, {"role": "assistant", "content": _join(row, layout.columns["completion"])}]
    column = layout.columns["messages"][0]
    value = row.get(column)
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{column} is {_describe(value)}, not a list of messages")
    messages = [_read_message(message, number) for number, message in enumerate(value)]
    if all(message["role"] != "assistant" for message in messages):
        raise BadRowError("no message is the assistant's, so there is no answer to learn")
    if messages[-1]["role"] != "assistant":
        raise BadRowError(f"the last message is the {messages[-1]['role']}'s, so its answer is missing")
    return messages


def _has(row: Row, layout: Layout) -> bool:
    """Whether the row has a system prompt."""
    return "system" in layout.columns and bool(row.get(layout.columns["system"][0]))


def _read_message(message: Any, number: int) -> Message:
    if not isinstance(message, Mapping):
        raise BadRowError(f"message {number} is {_describe(message)}, not a role with content")
    role, content = message.get("role"), message.get("content")
    if role is None:
        role, content = message.get("from"), message.get("value")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRowError(f"message {number} has the role {role!r}, not one of {', '.join(_ROLES)}")
    if message.get("tool_calls"):
        raise BadRowError(f"message {number} calls tools, which this format does not hold")
    _check_text(f"message {number} ({_ROLES[role]})", content)
    return {"role": _ROLES[role], "content": str(content)}


def _join(row: Row, columns: Collection[str]) -> str:
    first, *others = columns
    _check_text(first, row.get(first))
    parts = [row[first]]
    for column in others:
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            _check_text(column, value)
        if value and value.strip():
            parts.append(value)
    return "\n\n".join(parts)


def _check_text(name: str, value: Any) -> None:
    if value is None:
        raise BadRowError(f"{name} is missing")
    if not isinstance(value, str):
        raise BadRowError(f"{name} is {_describe(value)}, not text")
    if not value.strip():
        raise BadRowError(f"{name} is empty")


def _describe(value: Any) -> str:
    kinds = {type(None): "missing", str: "text", list: "a list", dict: "a mapping", bool: "a truth value"}
    kinds |= {int: "a number", float: "a number"}
    if value == []:
        return "an empty list"
    return kinds.get(type(value), f"a {type(value).__name__}")
