"""What changed between two commits, file by file."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from .git import GitRepo

_MAX_DIFFED_BYTES = 200_000
_MAX_DIFFED_LINES = 20_000


@dataclass(frozen=True)
class FileDiff:
    """A file that changed: its git ids before and after (None: absent), and the change as a unified diff."""

    path: str
    old: str | None
    new: str | None
    text: str


def diff_commits(git: GitRepo, old: str | None, new: str) -> Iterator[FileDiff]:
    """The files that differ between two commits (old None: nothing), each diffed when it is asked for."""
    for path, (before, after) in git.compare(old, new).items():
        yield FileDiff(path, before, after, _diff_file(git, path, before, after))


def _diff_file(git: GitRepo, path: str, old: str | None, new: str | None) -> str:
    before, after = (git.read_file(oid) if oid else b"" for oid in (old, new))
    header = f"diff --git a/{path} b/{path}\n"
    header += "new file mode 100644\n" if old is None else "deleted file mode 100644\n" if new is None else ""
    header += f"index {(old or '0' * 40)[:10]}..{(new or '0' * 40)[:10]}\n"
    if max(len(before), len(after)) > _MAX_DIFFED_BYTES or b"\0" in before or b"\0" in after:
        return f"{header}Binary files a/{path} and b/{path} differ\n"
    names = f"a/{path}" if old else "/dev/null", f"b/{path}" if new else "/dev/null"
    old_lines, new_lines = (content.decode("utf-8", "replace").splitlines(keepends=True) for content in (before, after))
    if max(len(old_lines), len(new_lines)) > _MAX_DIFFED_LINES:  # difflib's time grows with the square
        return f"{header}Files a/{path} and b/{path} differ, too long to compare\n"
    lines = difflib.unified_diff(old_lines, new_lines, *names)
    return header + "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    )
