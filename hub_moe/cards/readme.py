"""A README as its parts: front matter, generated blocks between markers, and people's prose, none of which is lost."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError

_FRONT_MATTER = re.compile(
    r"\A(\ufeff?\s*---[ \t]*(?:\r\n|\r|\n))(.*?)(^---[ \t]*(?:\r\n|\r|\n|\Z))", re.DOTALL | re.MULTILINE
)
_UNCLOSED = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n[\w-]+:")
_MARKER = re.compile(r"^[ \t]*<!--[ \t]*hub_moe:(begin|end)[ \t]+([\w-]+)[ \t]*-->[ \t]*\r?$", re.MULTILINE)


@dataclass(frozen=True)
class Part:
    """A stretch of the body as it stands in the file: a generated block, markers included, or prose (name None)."""

    text: str
    name: str | None = None


@dataclass(frozen=True)
class Readme:
    """A README taken apart; `str()` puts it together byte for byte."""

    opening: str
    front_matter: str
    closing: str
    parts: tuple[Part, ...]

    def __str__(self) -> str:
        return "".join([self.opening, self.front_matter, self.closing, *(part.text for part in self.parts)])

    @property
    def line_break(self) -> str:
        """The one that the file uses."""
        return "\r\n" if "\r\n" in str(self) else "\n"

    @property
    def metadata(self) -> dict[str, Any]:
        """The front matter's values."""
        return read_metadata(self.front_matter, where="The front matter of the README")

    @property
    def prose(self) -> str:
        """What people wrote, without the generated blocks."""
        return "".join(part.text for part in self.parts if part.name is None)

    def block(self, name: str) -> str | None:
        """A generated block with its markers and plain line breaks; None if it is not there."""
        return next((part.text.replace("\r\n", "\n") for part in self.parts if part.name == name), None)

    def with_blocks(self, blocks: Mapping[str, str]) -> "Readme":
        """With generated blocks put in place of those of their names.

        A new one comes after the block before it, or at the end; one that is not among `blocks` is taken out.
        """
        texts = {name: text.replace("\n", self.line_break) for name, text in blocks.items()}
        parts = [
            part if part.name is None else Part(texts[part.name], part.name)
            for part in self.parts
            if part.name is None or part.name in texts
        ]
        names = list(texts)
        for place, name in enumerate(names):
            if all(part.name != name for part in parts):
                _insert(parts, Part(texts[name], name), earlier=names[:place], gap=self.line_break)
        return replace(self, parts=tuple(parts))

    def with_metadata(self, values: Mapping[str, Any]) -> "Readme":
        """With these values in the front matter, None taking a key out; all other lines, also comments, stay.

        Raises:
            ConfigError: If the front matter is written in a way that no line of it can be replaced alone.
        """
        text = _edit_front_matter(self.front_matter.replace("\r\n", "\n"), values).replace("\n", self.line_break)
        gap = self.line_break
        return replace(
            self, opening=self.opening or f"---{gap}", front_matter=text, closing=self.closing or f"---{gap}"
        )


def parse_readme(text: str, *, where: str = "The README") -> Readme:
    """The parts of a README.

    Raises:
        ConfigError: If a marker has no partner, blocks are nested or there twice, or the front matter is invalid.
    """
    match = _FRONT_MATTER.match(text)
    if match is None and _UNCLOSED.match(text):
        raise ConfigError(f"The front matter of {where} begins with --- and has no closing --- on a line of its own.")
    opening, front_matter, closing = match.groups() if match else ("", "", "")
    read_metadata(front_matter, where=f"The front matter of {where}")
    return Readme(opening, front_matter, closing, tuple(_split(text[match.end() if match else 0 :], where)))


def read_readme(path: Path) -> Readme:
    """The parts of a README file; an empty one where there is none.

    Raises:
        ConfigError: As `parse_readme`, and if it is not UTF-8.
        OSError: If it cannot be read.
    """
    if not path.exists():
        return Readme("", "", "", ())
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    return parse_readme(text, where=str(path))


def read_metadata(text: str, *, where: str) -> dict[str, Any]:
    """The values of a front matter.

    Raises:
        ConfigError: If it is not valid YAML, not a mapping, or has a key twice.
    """
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ConfigError(f"{where} uses an anchor of YAML; write its value out where it is used.")
        data = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-13-01
        raise ConfigError(f"{where} is not valid YAML: {_one_line(error)}.") from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{where} must be a mapping of names to values, not a {type(data).__name__}.")
    keys = [key.value for key, _ in node.value]
    twice = next((key for key in data if keys.count(key) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where} has the key {twice!r} twice.")
    return data


def make_block(name: str, text: str) -> str:
    """Generated text between its markers, each on a line of its own."""
    return f"<!-- hub_moe:begin {name} -->\n{text.strip()}\n<!-- hub_moe:end {name} -->\n"


def dump_yaml(data: Any) -> str:
    """YAML as the Hub's client writes it: keys in their order, nothing folded, dates as texts in quotes."""
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=math.inf)
    return text


def _split(body: str, where: str) -> list[Part]:
    parts: list[Part] = []
    position, opened = 0, None
    for marker in _MARKER.finditer(body):
        kind, name = marker.groups()
        if kind == "begin":
            if opened is not None:
                raise ConfigError(f"{where} begins the block {name!r} inside of {opened[0]!r}; blocks are not nested.")
            if any(part.name == name for part in parts):
                raise ConfigError(f"{where} has the block {name!r} twice; remove one, markers included.")
            opened = (name, marker.start())
            continue
        if opened is None or opened[0] != name:
            raise ConfigError(f"{where} ends the block {name!r} which was not begun; remove or mend its markers.")
        end = _after_line(body, marker.end())
        parts += [Part(body[position : opened[1]]), Part(body[opened[1] : end], name)]
        position, opened = end, None
    if opened is not None:
        raise ConfigError(f"{where} begins the block {opened[0]!r} and never ends it; remove or mend its markers.")
    return [part for part in [*parts, Part(body[position:])] if part.text]


def _after_line(text: str, position: int) -> int:
    if text.startswith("\r\n", position):
        return position + 2
    return position + text.startswith("\n", position)


def _insert(parts: list[Part], new: Part, *, earlier: list[str], gap: str) -> None:
    places = [place for place, part in enumerate(parts) if part.name in earlier and part.name is not None]
    place = places[-1] + 1 if places else len(parts)
    before = "".join(part.text for part in parts[:place])
    missing = 0 if not before or before.endswith(gap * 2) else 1 if before.endswith(gap) else 2
    parts[place:place] = [*([Part(gap * missing)] if missing else []), new]


def _edit_front_matter(text: str, values: Mapping[str, Any]) -> str:
    kept = read_metadata(text, where="The front matter")
    expected = {key: value for key, value in {**kept, **values}.items() if value is not None or key not in values}
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is not None and node.flow_style:
        raise ConfigError("The front matter is written in braces; write each key on a line of its own.")
    keys = [key for key, _ in node.value] if node is not None else []
    ends = [key.start_mark.index for key in keys[1:]] + [len(text)]
    for key, end in reversed(list(zip(keys, ends, strict=False))):  # without keys there is an end all the same
        start = key.start_mark.index
        if key.value in values and kept[key.value] != values[key.value]:
            end = start + len(_without_comments_after(text[start:end]))
            value = values[key.value]
            text = text[:start] + (dump_yaml({key.value: value}) if value is not None else "") + text[end:]
    if text and not text.endswith("\n"):
        text += "\n"
    text += "".join(dump_yaml({key: value}) for key, value in values.items() if key not in kept and value is not None)
    if read_metadata(text, where="The front matter") != expected:
        raise ConfigError("The front matter uses YAML that cannot be changed in part (such as several documents).")
    return text


def _without_comments_after(segment: str) -> str:
    lines = segment.splitlines(keepends=True)
    while len(lines) > 1 and (not lines[-1].strip() or lines[-1].startswith("#")):
        lines.pop()
    return "".join(lines)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
