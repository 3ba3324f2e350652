"""Git on disk through dulwich: revisions, trees, objects, refs. Paths and names come checked."""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from dulwich.errors import NotTreeError
from dulwich.graph import find_merge_base
from dulwich.object_store import DiskObjectStore, tree_lookup_path
from dulwich.objects import Commit, ObjectID, ShaFile, Tag, Tree
from dulwich.refs import Ref
from dulwich.repo import Repo
from dulwich.walk import ORDER_TOPO

from .blobs import sync_folder
from .errors import ConflictError, InvalidInputError, NotFoundError
from .names import check_ref_name, is_commit_id
from .objects import Objects
from .packs import BLOB

FILE_MODE = 0o100644
EXECUTABLE_MODE = 0o100755
FOLDER_MODE = 0o040000
_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (0|[1-9][0-9]{0,18})\n"
)
_SHORT_ID = re.compile(r"[0-9a-f]{7,39}")
_PR_REF = re.compile(r"refs/pr/[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class TreeEntry:
    """A file or folder of a commit: its full path and git id."""

    path: str
    oid: str
    is_folder: bool
    is_executable: bool = False


@dataclass(frozen=True)
class LogEntry:
    """One commit of a history; `date_s` counts from 1970."""

    oid: str
    message: str
    author: str
    date_s: int


def format_pointer(sha256: str, size_bytes: int) -> bytes:
    """The text that stands for a large file inside git (git-lfs spec v1)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size_bytes}\n".encode()


def parse_pointer(content: bytes) -> tuple[str, int] | None:
    """The sha256 and size that a pointer names, None if `content` is not exactly a pointer."""
    match = _POINTER.fullmatch(content) if len(content) < 200 else None
    return (match.group(1).decode(), int(match.group(2))) if match else None


class GitRepo:
    """An open bare repository; use it in a `with` block and in one thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._repo = Repo(str(path))
        assert isinstance(self._repo.object_store, DiskObjectStore)
        self.objects = Objects(path / "objects", self._repo.object_store)

    @staticmethod
    def create(path: Path) -> None:
        """Make an empty bare repository with `main` as HEAD in a folder that does not exist yet."""
        path.mkdir(parents=True)
        Repo.init_bare(str(path), default_branch=b"main").close()
        for folder in (path / "refs", path, path.parent):
            sync_folder(folder)

    def __enter__(self) -> "GitRepo":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.objects.discard()
        self._repo.close()

    def resolve(self, revision: str) -> str:
        """The commit id of a branch, tag, full ref or commit id; an id may be cut to 7 digits or more if it is unique.

        Raises:
            NotFoundError: If there is none; its `what` is "revision".
        """
        oid = self.read_ref(self.find_ref(revision))
        if oid is None:
            oid = revision if is_commit_id(revision) else self._find_commit(revision)
        commit = self._peel(oid) if oid else None
        if commit is None:
            raise NotFoundError("revision", f"Invalid rev id: {revision}")
        return commit

    def find_ref(self, revision: str) -> str | None:
        """The full name of the ref that `revision` means: a branch before a tag; None if there is none."""
        names = [revision] if revision.startswith("refs/") else [f"refs/heads/{revision}", f"refs/tags/{revision}"]
        return next((name for name in names if self.read_ref(name) is not None), None)

    def find_writable_ref(self, revision: str) -> str:
        """The branch or pull request that commits to `revision` go to."""
        ref = self.find_ref(revision)
        if ref is None or not (ref.startswith("refs/heads/") or _PR_REF.fullmatch(ref)):
            raise NotFoundError("revision", f"Invalid rev id: {revision} is not a branch or pull request.")
        return ref

    def read_ref(self, ref: str | None) -> str | None:
        """What a full ref points at (for an annotated tag: the tag object), None if it does not exist."""
        if ref is None or not _is_safe_ref(ref):
            return None
        oid = self._repo.refs.read_loose_ref(Ref(ref.encode())) or self._repo.refs.get_packed_refs().get(
            Ref(ref.encode())
        )
        return oid.decode() if oid else None

    def list_refs(self, prefix: str) -> dict[str, str]:
        """Every ref below `prefix` (`refs/heads/`), without it, with the commit it leads to."""
        found = {}
        for name in sorted(self._repo.refs.keys(Ref(prefix.rstrip("/").encode()))):
            commit = self.resolve(prefix + name.decode())
            found[name.decode()] = commit
        return found

    def move_ref(self, ref: str, *, old: str | None, new: str | None) -> None:
        """Compare-and-swap of a ref; None means absent. ConflictError if it is not `old` any more.

        Objects that were written before become part of the repo; those of a `with` block that moves no ref do not.
        """
        self.objects.flush()
        name = Ref(ref.encode())
        try:
            if new is None:
                done = self._repo.refs.remove_if_equals(name, ObjectID((old or "").encode()))
            elif old is None:
                done = self._repo.refs.add_if_new(name, ObjectID(new.encode()))
            else:
                done = self._repo.refs.set_if_equals(name, ObjectID(old.encode()), ObjectID(new.encode()))
        except (NotADirectoryError, IsADirectoryError, FileExistsError):
            raise ConflictError(f"{ref} and a ref above or below it cannot both exist.") from None
        if not done:
            raise ConflictError(f"{ref} was changed at the same time; try again.")
        for folder in (self.path / ref).parents:  # some of them may be new, or gone with a ref that was deleted
            if folder == self.path:
                break
            if folder.is_dir():
                sync_folder(folder)

    def tree_of(self, commit: str) -> str:
        """The root tree of a commit."""
        found = self._read(commit)
        assert isinstance(found, Commit)
        return str(found.tree.decode())

    def find_entry(self, commit: str, path: str) -> TreeEntry | None:
        """The file or folder at `path`, None if there is none; the empty path is the root."""
        tree = ObjectID(self.tree_of(commit).encode())
        if not path:
            return TreeEntry("", tree.decode(), is_folder=True)
        try:
            mode, oid = tree_lookup_path(lambda oid: self._read(oid.decode()), tree, path.encode())
        except (KeyError, NotTreeError):
            return None
        return _entry(path, mode, oid)

    def walk(self, tree: str, *, prefix: str = "", recursive: bool = True) -> Iterator[TreeEntry]:
        """The entries of a tree in git's order, each folder before what is inside it."""
        for name, mode, oid in self._tree(tree).iteritems():
            entry = _entry(prefix + name.decode(), mode, oid)
            yield entry
            if entry.is_folder and recursive:
                yield from self.walk(entry.oid, prefix=f"{entry.path}/", recursive=True)

    def read_file(self, oid: str) -> bytes:
        """The content of a git blob (for a large file: its pointer)."""
        type_num, content = self.objects.read(oid)
        assert type_num == BLOB
        return content

    def log(self, commit: str, *, without: str | None = None, limit: int | None = None) -> Iterator[LogEntry]:
        """The history of a commit, newest first; `without` leaves out what that commit's history has too."""
        return self.log_many([commit], without=[without] if without else [], limit=limit)

    def log_many(self, commits: list[str], *, without: list[str], limit: int | None = None) -> Iterator[LogEntry]:
        """Like `log`, for the histories of several commits together."""
        include, exclude = ([ObjectID(oid.encode()) for oid in oids] for oids in (commits, without))
        for entry in self._repo.get_walker(include=include, exclude=exclude, max_entries=limit):
            yield _describe(entry.commit)

    def history(self, heads: Iterable[str]) -> Iterator[str]:
        """Every commit that the heads reach, each after its parents."""
        include = [ObjectID(head.encode()) for head in heads]
        for entry in self._repo.get_walker(include=include, order=ORDER_TOPO, reverse=True):
            yield entry.commit.id.decode()

    def compare(self, old: str | None, new: str) -> dict[str, tuple[str | None, str | None]]:
        """The files that differ between two commits (old None: nothing), each with its oid before and after."""
        before = {entry.path: entry.oid for entry in self.walk(self.tree_of(old)) if not entry.is_folder} if old else {}
        if old and self.tree_of(old) == self.tree_of(new):
            return {}
        after = {entry.path: entry.oid for entry in self.walk(self.tree_of(new)) if not entry.is_folder}
        paths = sorted({*before, *after})
        return {path: (before.get(path), after.get(path)) for path in paths if before.get(path) != after.get(path)}

    def executables(self, commit: str | None) -> set[str]:
        """The files of a commit (None: none) that git marks as executable."""
        entries = self.walk(self.tree_of(commit)) if commit else ()
        return {entry.path for entry in entries if entry.is_executable}

    def parents(self, commit: str) -> list[str]:
        """The commits that a commit was made on; for a merge the target's first."""
        found = self._read(commit)
        assert isinstance(found, Commit)
        return [parent.decode() for parent in found.parents]

    def date_of(self, commit: str) -> int:
        """When a commit was made, in seconds since 1970."""
        found = self._read(commit)
        assert isinstance(found, Commit)
        return int(found.commit_time)

    def find_merge_base(self, one: str, other: str) -> str | None:
        """The newest commit that both histories share, None if they share none."""
        found = find_merge_base(self._repo, [ObjectID(one.encode()), ObjectID(other.encode())])
        return found[0].decode() if found else None

    def write_file(self, content: bytes) -> str:
        """Store a git blob; it belongs to no commit yet."""
        return self.objects.write(BLOB, content)

    def write_tree(
        self, base: str | None, changes: Mapping[str, str | None], *, modes: Mapping[str, int] | None = None
    ) -> str | None:
        """A tree like `base` with files put at paths (oid) or entries removed (None); None if nothing is left.

        A file that was executable stays so unless `modes` says otherwise.

        Raises:
            InvalidInputError: If a path is a file and a folder at once.
        """
        tree = self._tree(base).copy() if base else Tree()
        assert isinstance(tree, Tree)
        modes_inside = _group_modes(modes or {})
        for name, (oid, inside) in _group_by_first_segment(changes).items():
            key = name.encode()
            mode, old = tree[key] if key in tree else (0, None)  # noqa: SIM401 (Tree has no get)
            if inside:
                if mode not in {0, FOLDER_MODE} or oid:
                    raise InvalidInputError(f"{name!r} cannot be a file and a folder at once.")
                subtree = self.write_tree(old.decode() if old else None, inside, modes=modes_inside.get(name))
                _set_entry(tree, key, FOLDER_MODE, subtree)
            elif oid and mode == FOLDER_MODE:
                raise InvalidInputError(f"{name!r} is a folder; delete it before putting a file there.")
            else:
                _set_entry(tree, key, (modes or {}).get(name, mode or FILE_MODE), oid)
        return self._write(tree) if len(tree) else None

    def replace_entries(self, tree: str, changes: Mapping[str, str | None]) -> str | None:
        """A tree like `tree` in which files and folders directly inside have other contents, or are gone (None)."""
        copy = self._tree(tree).copy()
        assert isinstance(copy, Tree)
        for name, oid in changes.items():
            _set_entry(copy, name.encode(), copy[name.encode()][0], oid)
        return self._write(copy) if len(copy) else None

    def write_commit(self, *, tree: str | None, parents: list[str], author: str, message: str) -> str:
        """Store a commit (`tree` None: without files); no ref points at it yet. `author` is `Name <email>`."""
        commit = Commit()
        commit.tree = ObjectID((tree or self._write(Tree())).encode())
        commit.parents = [ObjectID(parent.encode()) for parent in parents]
        commit.author = commit.committer = author.encode()
        commit.author_time = commit.commit_time = int(time.time())
        commit.author_timezone = commit.commit_timezone = 0
        commit.encoding = b"UTF-8"
        commit.message = message.encode()
        return self._write(commit)

    def copy_commit(self, commit: str, *, tree: str | None, parents: list[str]) -> str:
        """Store a commit like another one, its author, time and message included, with other files or parents."""
        found = self._read(commit)
        assert isinstance(found, Commit)
        found.tree = ObjectID((tree or self._write(Tree())).encode())
        found.parents = [ObjectID(parent.encode()) for parent in parents]
        return self._write(found)

    def copy_history(self, target: "GitRepo", refs: Mapping[str, str]) -> None:
        """Give another repository these refs (full names and what they point at) with all that they reach."""
        wanted = [ObjectID(oid.encode()) for oid in refs.values()]
        target._repo.object_store.fsync_object_files = True
        self._repo.fetch(target._repo, determine_wants=lambda *_: wanted)
        sync_folder(target.path / "objects" / "pack")
        for ref, oid in refs.items():
            target.move_ref(ref, old=target.read_ref(ref), new=oid)

    def write_tag(self, *, name: str, commit: str, author: str, message: str) -> str:
        """Store an annotated tag; no ref points at it yet."""
        tag = Tag()
        tag.name, tag.message, tag.tagger = name.encode(), message.encode(), author.encode()
        tag.tag_time, tag.tag_timezone = int(time.time()), 0
        tag.object = (Commit, ObjectID(commit.encode()))
        return self._write(tag)

    def _write(self, thing: ShaFile) -> str:
        return self.objects.write(thing.type_num, thing.as_raw_string())

    def _read(self, oid: str) -> ShaFile:
        type_num, content = self.objects.read(oid)
        return ShaFile.from_raw_string(type_num, content)

    def _tree(self, oid: str) -> Tree:
        found = self._read(oid)
        assert isinstance(found, Tree)
        return found

    def _find_commit(self, start: str) -> str | None:
        """The one commit whose id starts so, None if there is none or more than one."""
        if not _SHORT_ID.fullmatch(start):
            return None
        found = {oid.decode() for oid in self._repo.object_store.iter_prefix(start.encode())}
        commits = [oid for oid in found if isinstance(self._read(oid), Commit)]
        return commits[0] if len(commits) == 1 else None

    def _peel(self, oid: str) -> str | None:
        try:
            found = self._read(oid)
        except KeyError:
            return None
        if isinstance(found, Tag):
            return self._peel(found.object[1].decode())
        return oid if isinstance(found, Commit) else None


def _is_safe_ref(ref: str) -> bool:
    if _PR_REF.fullmatch(ref):
        return True
    for prefix in ("refs/heads/", "refs/tags/", "refs/convert/"):
        if ref.startswith(prefix):
            try:
                check_ref_name(ref.removeprefix(prefix))
            except InvalidInputError:
                return False
            return True
    return False


def _entry(path: str, mode: int, oid: bytes) -> TreeEntry:
    return TreeEntry(path, oid.decode(), is_folder=mode == FOLDER_MODE, is_executable=mode == EXECUTABLE_MODE)


def _group_modes(modes: Mapping[str, int]) -> dict[str, dict[str, int]]:
    groups: dict[str, dict[str, int]] = {}
    for path, mode in modes.items():
        name, slash, rest = path.partition("/")
        if slash:
            groups.setdefault(name, {})[rest] = mode
    return groups


def _group_by_first_segment(changes: Mapping[str, str | None]) -> dict[str, tuple[str | None, dict[str, str | None]]]:
    groups: dict[str, tuple[str | None, dict[str, str | None]]] = {}
    for path, oid in changes.items():
        name, _, rest = path.partition("/")
        own, inside = groups.get(name, (None, {}))
        if rest:
            inside[rest] = oid
        else:
            own = oid
        groups[name] = (own, inside)
    return groups


def _set_entry(tree: Tree, name: bytes, mode: int, oid: str | None) -> None:
    if oid:
        tree[name] = (mode, ObjectID(oid.encode()))
    elif name in tree:
        del tree[name]


def _describe(commit: Commit) -> LogEntry:
    author = commit.author.decode("utf-8", "replace").partition(" <")[0]
    return LogEntry(commit.id.decode(), commit.message.decode("utf-8", "replace"), author, commit.commit_time)
