"""Which commit changed a file last, for many files at once."""

from collections.abc import Iterable, Iterator

from .git import GitRepo, LogEntry

_MAX_READ_BYTES = 64 << 20
_COMMIT_BYTES = 10_000  # looking at a commit takes as long as reading this much


def find_last_commits(git: GitRepo, commit: str, paths: Iterable[str], *, limit: int = 2000) -> dict[str, LogEntry]:
    """For each path the newest commit that changed it; a merge brings what it merged.

    Looks at the last `limit` commits, and at fewer where folders are so large that reading them would take long; paths
    that were not changed in these are left out.
    """
    folders: dict[str, set[str]] = {}
    for path in paths:
        folders.setdefault(path.rpartition("/")[0], set()).add(path.rpartition("/")[2])
    trees = _Trees(git)
    found = {
        f"{folder}/{name}" if folder else name: oid
        for folder, names in folders.items()
        for name, oid in _search(trees, commit, folder, names, limit)
    }
    entries = {oid: next(iter(git.log(oid, limit=1))) for oid in set(found.values())}
    return {path: entries[oid] for path, oid in found.items()}


def _search(trees: "_Trees", commit: str, folder: str, names: set[str], limit: int) -> Iterator[tuple[str, str]]:
    """Each of `names` in a folder with the id of the commit that changed it last."""
    tree = trees.find(commit, folder)
    pending = _find_entries(trees.read(tree), names) if tree else {}
    for _ in range(limit):
        older = trees.parent(commit)
        older_tree = trees.find(older, folder) if older else None
        if older is None or older_tree is None:
            yield from ((name, commit) for name in pending)
            return
        if older_tree != tree:
            content = trees.read(older_tree)
            changed = {name for name, entry in pending.items() if entry not in content}
            yield from ((name, commit) for name in changed)
            pending = {name: entry for name, entry in pending.items() if name not in changed}
        if not pending or trees.read_bytes > _MAX_READ_BYTES:
            return
        commit, tree = older, older_tree


class _Trees:
    """Reads trees as git stores them, many times faster than entry by entry, and counts what was read."""

    def __init__(self, git: GitRepo) -> None:
        self._git = git
        self.read_bytes = 0

    def read(self, oid: str) -> bytes:
        content = self._git.objects.read(oid)[1]
        self.read_bytes += len(content)
        return content

    def parent(self, commit: str) -> str | None:
        """The first parent of a commit."""
        return next(iter(self._git.parents(commit)), None)

    def find(self, commit: str, folder: str) -> str | None:
        """The tree of a folder in a commit."""
        self.read_bytes += _COMMIT_BYTES
        oid = self._git.tree_of(commit)
        for segment in folder.split("/") if folder else []:
            content, mark = self.read(oid), b"40000 %b\0" % segment.encode()
            start = content.find(mark)
            if start < 0:
                return None
            oid = content[start + len(mark) : start + len(mark) + 20].hex()
        return oid


def _find_entries(tree: bytes, names: set[str]) -> dict[str, bytes]:
    """The bytes that stand for each name in a tree: mode, name and id."""
    found, start = {}, 0
    while start < len(tree):
        end = tree.index(b"\0", start) + 21
        name = tree[tree.index(b" ", start) + 1 : end - 21].decode("utf-8", "replace")
        if name in names:
            found[name] = tree[start:end]
        start = end
    return found
