"""What objects may be in a push: each well-formed and with safe names, and none missing."""

from collections.abc import Iterator

from dulwich.errors import ChecksumMismatch, ObjectFormatException
from dulwich.objects import Commit, ShaFile, Tag, parse_tree

from .errors import InvalidInputError
from .git import EXECUTABLE_MODE, FILE_MODE, FOLDER_MODE, GitRepo
from .names import MAX_PATH_BYTES, check_path
from .packs import BLOB, COMMIT, TAG, TREE

MAX_FILES = 1_000_000
MAX_HISTORY_BYTES = 1 << 20
_MAX_TAGS_OF_TAGS = 10
_LAST_DATE_S = 253_402_300_799  # the year 9999
_WHAT = {0o120000: "a symbolic link", 0o160000: "a submodule"}


def check_object(type_num: int, content: bytes) -> None:
    """Refuse an object that git, a file system or this Hub would stumble over."""
    if type_num == BLOB:
        return
    if type_num in {COMMIT, TAG} and len(content) > MAX_HISTORY_BYTES:
        raise InvalidInputError(f"A commit or tag has at most {MAX_HISTORY_BYTES} bytes.")
    try:
        if type_num == TREE:
            _check_names(content)
        thing = ShaFile.from_raw_string(type_num, content)
        thing.check()
        _check_dates(thing)
    except (ObjectFormatException, ChecksumMismatch, AssertionError, ValueError, AttributeError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"The pack holds a malformed object: {error}.") from None


def _check_names(content: bytes) -> None:
    for raw, mode, _ in parse_tree(content, 20, strict=True):
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            raise InvalidInputError(f"The file name {raw!r} is not UTF-8.") from None
        if "/" in name:
            raise InvalidInputError(f"The file name {name!r} holds a slash.")
        check_path(name)
        if mode not in {FILE_MODE, EXECUTABLE_MODE, FOLDER_MODE}:
            what = _WHAT.get(mode, f"of the mode {mode:06o}")
            raise InvalidInputError(f"{name!r} is {what}; this Hub takes only files and folders.")


def _check_dates(thing: ShaFile) -> None:
    if isinstance(thing, Commit):
        dates = [thing.author_time, thing.commit_time]
        if thing.message is None:
            raise InvalidInputError("The pack holds a commit without a message.")
    else:
        dates = [thing.tag_time or 0] if isinstance(thing, Tag) else []
    if any(not 0 <= date <= _LAST_DATE_S for date in dates):
        raise InvalidInputError("The pack holds a commit or tag whose date no calendar has.")


class Connectivity:
    """Follows new history down to commits that the repo has already."""

    def __init__(self, git: GitRepo, known: set[str]) -> None:
        """`known`: commits whose whole history is in the repo."""
        self._git = git
        self._known = known
        self._older = self._list_older(set(known))
        # one set for each type: what was met as a folder may still be named falsely as a file
        self._trees: dict[str, tuple[int, int]] = {}
        self._commits: set[str] = set()
        self._tags: set[str] = set()
        self._files: set[str] = set()

    def has_met(self, oid: str) -> bool:
        """Whether anything that was checked needs this object."""
        return any(oid in met for met in (self._files, self._trees, self._commits, self._tags))

    def check_tip(self, oid: str, *, is_tag: bool) -> None:
        """InvalidInputError if anything that `oid` needs is missing, or if a ref may not point at it."""
        for _ in range(_MAX_TAGS_OF_TAGS):
            type_num, content = self._read(oid)
            if type_num != TAG:
                break
            if not is_tag:
                raise InvalidInputError("A branch or pull request points at a commit, not at a tag.")
            self._tags.add(oid)
            tag = ShaFile.from_raw_string(TAG, content)
            assert isinstance(tag, Tag)
            oid = tag.object[1].decode()
        if type_num != COMMIT:
            raise InvalidInputError("A ref leads to a commit, not to a file, folder or a long chain of tags.")
        self._check_history(oid)

    def _check_history(self, tip: str) -> None:
        waiting = [tip]
        while waiting:
            oid = waiting.pop()
            if oid in self._commits or self._is_known(oid):
                continue
            self._commits.add(oid)
            commit = self._commit(oid)
            files, longest = self._check_tree(commit.tree.decode(), 0)
            if files > MAX_FILES or longest > MAX_PATH_BYTES:
                raise InvalidInputError(
                    f"The commit {oid} has more than {MAX_FILES} files or a path over {MAX_PATH_BYTES} bytes."
                )
            waiting += [parent.decode() for parent in commit.parents]

    def _check_tree(self, oid: str, depth: int) -> tuple[int, int]:
        """How many files a tree has, counted as often as it names them, and its longest path."""
        if oid in self._trees:
            return self._trees[oid]
        if depth > MAX_PATH_BYTES // 2:
            raise InvalidInputError(f"The pack holds a path over {MAX_PATH_BYTES} bytes.")
        type_num, content = self._read(oid)
        if type_num != TREE:
            raise InvalidInputError(f"The object {oid} should be a folder and is not.")
        is_new = self._git.objects.is_new(oid)
        files = longest = 0
        for name, mode, raw in parse_tree(content, 20):
            child, count, length = raw.decode(), 1, 0
            if mode == FOLDER_MODE:
                count, length = self._check_tree(child, depth + 1)
            elif child not in self._files:
                self._check_file(child, is_trusted=not is_new)
            files += count
            longest = max(longest, len(name) + 1 + length)
        self._trees[oid] = (files, longest)
        return files, longest

    def _check_file(self, oid: str, *, is_trusted: bool) -> None:
        """What a stored tree names was of the right type when it came, but a crash may have kept it from arriving."""
        objects = self._git.objects
        if oid not in objects:
            raise InvalidInputError(f"The push misses the object {oid}, which is not in the repo either.")
        if not is_trusted and objects.type_of(oid) != BLOB:
            raise InvalidInputError(f"The object {oid} should be a file and is not.")
        self._files.add(oid)

    def _is_known(self, oid: str) -> bool:
        """Whether a commit is part of the repo's history; reads back only as far as it must."""
        if oid in self._known:
            return True
        if self._git.objects.is_new(oid):
            return False
        return any(older == oid for older in self._older)

    def _list_older(self, waiting: set[str]) -> Iterator[str]:
        while waiting:
            for parent in self._git.parents(waiting.pop()):
                if parent not in self._known:
                    self._known.add(parent)
                    waiting.add(parent)
                    yield parent

    def _commit(self, oid: str) -> Commit:
        type_num, content = self._read(oid)
        if type_num != COMMIT:
            raise InvalidInputError(f"The object {oid} should be a commit and is not.")
        found = ShaFile.from_raw_string(COMMIT, content)
        assert isinstance(found, Commit)
        return found

    def _read(self, oid: str) -> tuple[int, bytes]:
        try:
            return self._git.objects.read(oid)
        except KeyError:
            raise InvalidInputError(f"The push misses the object {oid}, which is not in the repo either.") from None
