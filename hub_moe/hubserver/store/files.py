"""The files of a commit as people see them: large files by their real size and sha256, not by their pointer."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .contents import Contents
from .database import Database
from .errors import NotFoundError
from .git import GitRepo, TreeEntry, format_pointer, parse_pointer
from .names import check_path
from .sized_cache import SizedCache

MAX_REGULAR_BYTES = 10_000_000
_ROWS_PER_QUERY = 500
_MAX_LISTED = 200_000


@dataclass(frozen=True)
class FileFacts:
    """What a git blob stands for: its own bytes (`sha256` None), or a large file."""

    oid: str
    size_bytes: int
    sha256: str | None = None

    @property
    def pointer_size_bytes(self) -> int | None:
        """The size of the pointer inside git, None for a file that is not large."""
        return len(format_pointer(self.sha256, self.size_bytes)) if self.sha256 else None


class Files:
    """Reads trees and files; remembers the facts of every git blob, which can never change."""

    def __init__(self, database: Database, contents: Contents) -> None:
        self._database = database
        self._contents = contents
        self._listings: SizedCache[list[TreeEntry]] = SizedCache(_MAX_LISTED)

    def facts(self, git: GitRepo, oids: Iterable[str]) -> dict[str, FileFacts]:
        """The facts of git blobs, by oid."""
        wanted = list(dict.fromkeys(oids))
        known = self._read_facts(wanted)
        missing = [_measure(oid, git.read_file(oid)) for oid in wanted if oid not in known]
        if missing:
            query = "INSERT OR IGNORE INTO file_facts (oid, size_bytes, sha256) VALUES (?, ?, ?)"
            rows = [(facts.oid, facts.size_bytes, facts.sha256) for facts in missing]
            self._database.try_to_write(query, rows, what="What is known of files")
        return known | {facts.oid: facts for facts in missing}

    def find(self, git: GitRepo, commit: str, path: str) -> FileFacts:
        """The file at `path`; NotFoundError("entry") if there is none or it is a folder."""
        entry = git.find_entry(commit, check_path(path))
        if entry is None or entry.is_folder:
            raise NotFoundError("entry", "Entry not found")
        return self.facts(git, [entry.oid])[entry.oid]

    def list_entries(self, git: GitRepo, commit: str, *, folder: str = "", recursive: bool = True) -> list[TreeEntry]:
        """Files and folders below `folder`, in git's order; NotFoundError("entry") if it is not a folder."""
        entry = git.find_entry(commit, check_path(folder) if folder else "")
        if entry is None or not entry.is_folder:
            raise NotFoundError("entry", f"{folder} does not exist on this revision")
        key = (git.path.name, entry.oid, folder, recursive)  # a tree never changes, and is asked for page by page
        listing = self._listings.get(key)
        if listing is None:
            listing = list(git.walk(entry.oid, prefix=f"{folder}/" if folder else "", recursive=recursive))
            self._listings.put(key, listing, size=len(listing) + 1)
        return listing

    def read(self, git: GitRepo, facts: FileFacts, *, limit_bytes: int = MAX_REGULAR_BYTES) -> bytes:
        """The first `limit_bytes` of a file's real content; NotFoundError("entry") if it was deleted for good."""
        if facts.sha256 is None:
            return git.read_file(facts.oid)[:limit_bytes]
        try:
            return b"".join(self._contents.read(facts.sha256, 0, limit_bytes))
        except NotFoundError:
            raise NotFoundError("entry", f"The large file {facts.sha256} was deleted.") from None

    def wants_large(self, git: GitRepo, commit: str, path: str, *, size_bytes: int, sample: bytes) -> bool:
        """Whether a new file belongs into the large-file store: by `.gitattributes`, by size, or by being binary."""
        if size_bytes > MAX_REGULAR_BYTES or b"\0" in sample:
            return True
        return any(_matches(pattern, path) for pattern in self._large_patterns(git, commit))

    def _large_patterns(self, git: GitRepo, commit: str) -> list[str]:
        """The patterns that `.gitattributes` marks with `filter=lfs`."""
        entry = git.find_entry(commit, ".gitattributes")
        if entry is None or entry.is_folder:
            return []
        lines = git.read_file(entry.oid).decode("utf-8", "replace").splitlines()
        words = [line.split() for line in lines if not line.lstrip().startswith("#")]
        return [line[0] for line in words if "filter=lfs" in line[1:]]

    def _read_facts(self, oids: list[str]) -> dict[str, FileFacts]:
        known = {}
        for start in range(0, len(oids), _ROWS_PER_QUERY):
            some = oids[start : start + _ROWS_PER_QUERY]
            marks = ",".join("?" * len(some))
            query = f"SELECT oid, size_bytes, sha256 FROM file_facts WHERE oid IN ({marks})"
            known.update({row["oid"]: FileFacts(*row) for row in self._database.rows(query, *some)})
        return known


def _measure(oid: str, content: bytes) -> FileFacts:
    pointer = parse_pointer(content)
    if pointer is None:
        return FileFacts(oid, len(content))
    return FileFacts(oid, pointer[1], pointer[0])


def _matches(pattern: str, path: str) -> bool:
    """gitattributes' rule: a pattern without a slash is compared with the last segment only."""
    if "/" not in pattern.strip("/"):
        return fnmatchcase(path.rsplit("/", 1)[-1], pattern.strip("/"))
    return fnmatchcase(path, pattern.lstrip("/").replace("**/", "*"))
