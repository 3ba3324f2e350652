"""A unified diff as a page shows it: files, and lines with their numbers; never more than a page can bear."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from ..store import GitRepo, Store
from ..store.diffs import FileDiff
from ..store.files import FileFacts
from .rendering import format_size

_MAX_FILES = 200
_MAX_LINES = 6000
_MAX_LINE = 2000
_OPEN_LINES = 400
_HUNK = re.compile(r"@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@")
_RECORD = re.compile(r"(?:^|/)evals/[^/]+-[0-9a-f]{16}\.json\Z")
_KINDS = {"+": "added", "-": "removed", " ": "same"}


@dataclass(frozen=True)
class Line:
    """A line of a diff; `kind` is added, removed, same, or gap between two places of the file."""

    kind: str
    old: int | None
    new: int | None
    text: str


@dataclass(frozen=True)
class ShownFile:
    """A changed file; without lines, `note` says why."""

    path: str
    change: str
    lines: list[Line]
    note: str
    is_open: bool

    @property
    def added(self) -> int:
        """How many lines were added."""
        return sum(line.kind == "added" for line in self.lines)

    @property
    def removed(self) -> int:
        """How many lines were removed."""
        return sum(line.kind == "removed" for line in self.lines)


@dataclass(frozen=True)
class ShownDiff:
    """The files of a diff, and whether there are more than these."""

    files: list[ShownFile]
    is_cut: bool

    @property
    def added(self) -> int:
        """How many lines were added in the files shown."""
        return sum(file.added for file in self.files)

    @property
    def removed(self) -> int:
        """How many lines were removed in the files shown."""
        return sum(file.removed for file in self.files)


def lay_out(store: Store, git: GitRepo, changes: Iterable[FileDiff]) -> ShownDiff:
    """The first files of a diff; what comes after the limits is only named, or left out."""
    pending = iter(changes)
    files: list[ShownFile] = []
    lines_left = _MAX_LINES
    for change in islice(pending, _MAX_FILES):
        files.append(_lay_out_file(store, git, change, lines_left))
        lines_left -= len(files[-1].lines)
    return ShownDiff(files, is_cut=next(pending, None) is not None)


def parse_hunks(diff: str) -> list[Line]:
    """The lines of a unified diff of one file."""
    lines: list[Line] = []
    old = new = 0
    _, mark, body = diff.partition("\n@@ ")
    for text in (mark + body).strip("\n").split("\n") if mark else []:
        match = _HUNK.match(text)
        if match:
            old, new = int(match.group(1)), int(match.group(2))
            lines += [Line("gap", None, None, "")] if lines else []
        elif text[:1] in _KINDS:
            kind = _KINDS[text[0]]
            shown = text[1 : _MAX_LINE + 1] + ("…" if len(text) > _MAX_LINE + 1 else "")
            lines.append(Line(kind, None if kind == "added" else old, None if kind == "removed" else new, shown))
            old, new = old + (kind != "added"), new + (kind != "removed")
    return lines


def _lay_out_file(store: Store, git: GitRepo, change: FileDiff, lines_left: int) -> ShownFile:
    kind = "added" if change.old is None else "deleted" if change.new is None else "changed"
    facts = store.files.facts(git, [oid for oid in (change.old, change.new) if oid])
    before, after = (facts[oid] if oid else None for oid in (change.old, change.new))
    if any(one and one.sha256 for one in (before, after)):
        return ShownFile(change.path, kind, [], f"Large file: {_describe(before, after)}.", is_open=True)
    lines = parse_hunks(change.text)
    if not lines:
        is_empty = (before is None or not before.size_bytes) and (after is None or not after.size_bytes)
        note = "Empty file." if is_empty else f"Not shown as text: {_describe(before, after)}."
        return ShownFile(change.path, kind, [], note, is_open=True)
    if len(lines) > lines_left:
        return ShownFile(change.path, kind, [], f"This page is full; {_describe(before, after)}.", is_open=False)
    is_evidence = _RECORD.search(change.path) is not None  # the numbers stand above, and it is long
    return ShownFile(change.path, kind, lines, "", is_open=len(lines) <= _OPEN_LINES and not is_evidence)


def _describe(before: FileFacts | None, after: FileFacts | None) -> str:
    sizes = [format_size(one.size_bytes) if one else "nothing" for one in (before, after)]
    return f"{sizes[0]} before, {sizes[1]} after"
