"""What a `.gitignore` leaves out (gitignore(5)), in time that a hostile pattern cannot make long.

The usual way, one regular expression for each pattern, takes time exponential in its stars and holds the whole process
meanwhile. Here names are matched one by one, and a star that has found the text after it never looks further.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from .errors import InvalidInputError

MAX_CHARACTERS = 65_536
MAX_LINES = 1000
MAX_LINE_CHARACTERS = 512
MAX_STEPS = 10_000_000
_TOKEN = re.compile(r"\\.|\[[!^]?\]?(?:\[:[a-z]+:\]|\\.|[^\]\\])*+\]|\*+|[^\\\[]", re.DOTALL)
_MEMBER = re.compile(r"\[:([a-z]+):\]|(\\.|[^\\])(?:-(\\.|[^\\]))?", re.DOTALL)
_CLASSES = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "blank": r"\t ",
    "digit": "0-9",
    "lower": "a-z",
    "punct": r"!-/:-@\[-`{-~",
    "space": r"\s",
    "upper": "A-Z",
    "xdigit": "0-9A-Fa-f",
}
_DEEP: None = None
"""Stands for `**`: any number of folders."""


@dataclass(frozen=True)
class _Rule:
    names: tuple[re.Pattern[str] | None, ...]
    is_exclusion: bool
    is_for_folders: bool
    is_anchored: bool

    def fits(self, names: list[str], *, is_folder: bool) -> bool:
        if self.is_for_folders and not is_folder:
            return False
        return _fits(self.names, names if self.is_anchored else names[-1:])


class Ignores:
    """The rules of one file; a pattern that git would not understand matches nothing."""

    def __init__(self, rules: Iterable[_Rule] = ()) -> None:
        self._rules = list(rules)
        self._folders: dict[str, bool] = {}
        self._steps = 0

    @classmethod
    def from_client(cls, text: str) -> "Ignores":
        """Rules that a client sent; InvalidInputError if they are too long."""
        lines = text.splitlines()
        if len(text) > MAX_CHARACTERS or len(lines) > MAX_LINES:
            raise InvalidInputError(
                f"'gitIgnore' has at most {MAX_LINES} lines and {MAX_CHARACTERS} characters; got {len(lines)} lines."
            )
        if any(len(line) > MAX_LINE_CHARACTERS for line in lines):
            raise InvalidInputError(f"A line of 'gitIgnore' has at most {MAX_LINE_CHARACTERS} characters.")
        return cls(filter(None, map(_parse, lines)))

    @classmethod
    def from_repo(cls, content: bytes) -> "Ignores":
        """The rules of a file in a repo; what is too long there counts for nothing."""
        lines = content[:MAX_CHARACTERS].decode("utf-8", "replace").splitlines()[:MAX_LINES]
        return cls(filter(None, (_parse(line) for line in lines if len(line) <= MAX_LINE_CHARACTERS)))

    def ignores(self, path: str) -> bool:
        """Whether a file is left out; what is in a folder that is left out cannot be taken back in.

        Raises:
            InvalidInputError: If all files asked for so far were too many and too deep for so many patterns.
        """
        names = path.split("/")
        for end in range(1, len(names)):
            folder = "/".join(names[:end])
            if folder not in self._folders:
                self._folders[folder] = self._excludes(names[:end], is_folder=True)
            if self._folders[folder]:
                return True
        return self._excludes(names, is_folder=False)

    def _excludes(self, names: list[str], *, is_folder: bool) -> bool:
        self._steps += len(names) * sum(len(rule.names) for rule in self._rules)
        if self._steps > MAX_STEPS:
            raise InvalidInputError("There are too many patterns in .gitignore for so many nested files; send fewer.")
        found = (rule.is_exclusion for rule in reversed(self._rules) if rule.fits(names, is_folder=is_folder))
        return next(found, False)


def _parse(line: str) -> _Rule | None:
    if not line.strip() or line.startswith("#"):
        return None
    while line.endswith(" ") and not line.endswith("\\ "):
        line = line[:-1]
    is_exclusion, pattern = not line.startswith("!"), line.removeprefix("!")
    is_for_folders, pattern = pattern.endswith("/"), pattern.rstrip("/")
    parts = pattern.removeprefix("/").split("/")
    try:
        names = tuple(_DEEP if part == "**" and "/" in pattern else _compile(part) for part in parts)
    except ValueError:
        return None
    return _Rule(names, is_exclusion, is_for_folders, is_anchored="/" in pattern)


def _fits(rule: tuple[re.Pattern[str] | None, ...], names: list[str]) -> bool:
    """Go through the names with every place in the rule that may be reached; a final `**` needs a name."""
    last = len(rule) - 1
    places = _skip_deep(rule, {0})
    for name in names:
        following = set()
        for place in places - {last + 1}:
            one = rule[place]
            if one is None:
                following |= {place, place + 1} if place == last else {place}
            elif one.fullmatch(name):
                following.add(place + 1)
        places = _skip_deep(rule, following)
    return last + 1 in places


def _skip_deep(rule: tuple[re.Pattern[str] | None, ...], places: set[int]) -> set[int]:
    for place, one in enumerate(rule[:-1]):
        if one is None and place in places:
            places.add(place + 1)
    return places


@lru_cache(maxsize=4096)
def _compile(glob: str) -> re.Pattern[str]:
    """One name of a pattern as a regular expression; ValueError if git would not understand it."""
    runs, end = [""], 0
    for match in _TOKEN.finditer(glob):
        if match.start() != end:
            break
        token, end = match.group(), match.end()
        if token.startswith("*"):
            runs.append("")
        else:
            runs[-1] += _translate(token)
    if end != len(glob) or not glob:
        raise ValueError(glob)
    first, *middle = runs
    if not middle:
        return re.compile(first, re.DOTALL)
    *middle, last = middle
    return re.compile(first + "".join(f"(?>.*?{run})" for run in middle) + f".*{last}", re.DOTALL)


def _translate(token: str) -> str:
    """A part of a pattern that stands for one letter."""
    if token == "?":
        return "."
    if not token.startswith("[") or len(token) == 1:
        return re.escape(token[-1])
    is_negated = token[1] in "!^"
    members = ""
    for match in _MEMBER.finditer(token[2 if is_negated else 1 : -1]):
        name, low, high = match.groups()
        if name:
            if name not in _CLASSES:
                raise ValueError(token)
            members += _CLASSES[name]
        else:
            low, high = low[-1], (high or low)[-1]
            members += f"{re.escape(low)}-{re.escape(high)}" if low <= high else re.escape(low)
    return f"[{'^' if is_negated else ''}{members}]"
