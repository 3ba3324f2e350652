"""Commits: all their changes or none, on top of exactly the commit that was the head."""

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .accounts import Identity
from .contents import Contents
from .database import Database
from .errors import ConflictError, InvalidInputError, NotFoundError, StaleParentError, TooLargeError
from .files import MAX_REGULAR_BYTES
from .git import GitRepo, format_pointer, parse_pointer
from .locks import share
from .names import check_path, check_ref_name, check_sha256
from .repos import Repo, Repos

MAX_INLINE_BYTES = 5 * MAX_REGULAR_BYTES
MAX_MESSAGE_CHARACTERS = 65_536


@dataclass(frozen=True)
class AddFile:
    """Put these bytes at a path, inside git."""

    path: str
    content: bytes


@dataclass(frozen=True)
class AddLargeFile:
    """Put at a path a content that was uploaded to this repo before."""

    path: str
    sha256: str


@dataclass(frozen=True)
class DeleteFile:
    """Remove a file or folder; a path that ends in a slash is a folder."""

    path: str


Operation = AddFile | AddLargeFile | DeleteFile


class Commits:
    """Changes the history of repos, one change at a time for each repo."""

    def __init__(self, database: Database, repos: Repos, contents: Contents) -> None:
        self._database = database
        self._repos = repos
        self._contents = contents
        self._locks: dict[str, threading.Lock] = {}

    def commit(
        self,
        repo: Repo,
        operations: Iterable[Operation],
        *,
        revision: str,
        who: Identity,
        message: str,
        parent: str | None = None,
    ) -> str:
        """Apply all operations to a branch; the id of its head afterwards (the old head when nothing changed).

        Raises:
            NotFoundError: If the branch, or a file to delete, does not exist.
            StaleParentError: If `parent` (a commit id or its beginning) is not the branch's head.
            InvalidInputError: If an operation is impossible; then nothing has changed.
        """
        check_message(message)
        with self._repos.open(repo) as git:
            ref = git.find_writable_ref(revision)
            added, deleted = self._store(repo, git, operations)
            with self.exclusively(repo):
                head = git.resolve(ref)
                if parent is not None and not head.startswith(parent):
                    raise StaleParentError(
                        "The branch was updated since you opened this page. Please refresh and try again."
                    )
                tree = _build_tree(git, head, added, deleted)
                if tree == git.tree_of(head):
                    return head
                commit = git.write_commit(tree=tree, parents=[head], author=format_author(who), message=message)
                git.move_ref(ref, old=head, new=commit)
        self._repos.touch(repo)
        return commit

    def propose(
        self, repo: Repo, operations: Iterable[Operation], *, ref: str, revision: str, who: Identity, message: str
    ) -> str:
        """Like `commit`, but the head of `revision` stays and a new ref gets the commit: a pull request's first."""
        check_message(message)
        with self._repos.open(repo) as git:
            head = git.resolve(git.find_writable_ref(revision))
            added, deleted = self._store(repo, git, operations)
            tree = _build_tree(git, head, added, deleted)
            commit = git.write_commit(tree=tree, parents=[head], author=format_author(who), message=message)
            with self.exclusively(repo):
                git.move_ref(ref, old=None, new=commit)
        return commit

    @contextmanager
    def changing(self, repo: Repo) -> Iterator[GitRepo]:
        """The git repository, while nobody else changes its refs."""
        with self.exclusively(repo), self._repos.open(repo) as git:
            yield git

    def squash(self, repo: Repo, *, branch: str, who: Identity, message: str) -> str:
        """Replace the history of a branch or pull request by one commit with the same files."""
        message = check_message(message.strip() or f"Squash {branch}")
        with self.exclusively(repo), self._repos.open(repo) as git:
            ref = git.find_writable_ref(branch)
            head = git.resolve(ref)
            commit = git.write_commit(tree=git.tree_of(head), parents=[], author=format_author(who), message=message)
            git.move_ref(ref, old=head, new=commit)
        self._repos.touch(repo)
        return commit

    def create_branch(self, repo: Repo, branch: str, *, start: str) -> None:
        """A new branch at a revision; ConflictError if there is one of this name."""
        ref = f"refs/heads/{check_ref_name(branch)}"
        with self.exclusively(repo), self._repos.open(repo) as git:
            commit = git.resolve(start)
            if git.read_ref(ref):
                raise ConflictError(f"Reference {ref} already exists.")
            git.move_ref(ref, old=None, new=commit)

    def create_tag(self, repo: Repo, tag: str, *, at: str, who: Identity, message: str = "") -> None:
        """A new tag at a revision, annotated when it has a message; ConflictError if there is one of this name."""
        message = check_message(message) if message.strip() else ""
        with self.exclusively(repo), self._repos.open(repo) as git:
            oid = commit = git.resolve(at)
            ref = f"refs/tags/{check_ref_name(tag)}"
            if git.read_ref(ref):
                raise ConflictError(f"Tag reference exists already: {ref}")
            if message:
                oid = git.write_tag(name=tag, commit=commit, author=format_author(who), message=message)
            git.move_ref(ref, old=None, new=oid)

    def delete_ref(self, repo: Repo, ref: str) -> None:
        """Remove a branch or tag by its full name; `main` cannot be removed."""
        if ref == "refs/heads/main":
            raise InvalidInputError("Cannot delete refs/heads/main: a repo always has it.")
        with self.exclusively(repo), self._repos.open(repo) as git:
            oid = git.read_ref(ref)
            if oid is None:
                raise NotFoundError("revision", f"Invalid rev id: there is no {ref}.")
            git.move_ref(ref, old=oid, new=None)

    def register(self, repo_uid: str, sha256: str) -> None:
        """Note that a stored content was uploaded to a repo, so that commits there may name it."""
        with self._database.transaction() as connection:
            self.note(connection, repo_uid, sha256)

    def note(self, connection: sqlite3.Connection, repo_uid: str, sha256: str) -> None:
        """Like `register`, inside a transaction: `hub gc` deletes a content in one too, so it is here and stays."""
        if self._contents.size_bytes(sha256) is None:
            raise NotFoundError("upload", f"No content with the sha256 {sha256} has been uploaded.")
        query = "INSERT OR REPLACE INTO repo_blobs (repo, sha256) SELECT id, ? FROM repos WHERE id = ?"
        connection.execute(query, (sha256, repo_uid))
        connection.execute("DELETE FROM deleted_blobs WHERE repo = ? AND sha256 = ?", (repo_uid, sha256))

    def copy_notes(self, connection: sqlite3.Connection, source: Repo, target_uid: str, sha256s: Iterable[str]) -> None:
        """Note that a copy has the contents of a repo, as they are in this transaction; NotFoundError if it is gone.

        A content that the repo names and has no more was deleted from it for good, and so from the copy.
        """
        if connection.execute("SELECT 1 FROM repos WHERE id = ?", (source.uid,)).fetchone() is None:
            raise NotFoundError("repo", "Repository not found")
        for sha256 in sha256s:
            query = "SELECT 1 FROM repo_blobs WHERE repo = ? AND sha256 = ?"
            is_owned = connection.execute(query, (source.uid, sha256)).fetchone() is not None
            table = "repo_blobs" if is_owned and self._contents.size_bytes(sha256) is not None else "deleted_blobs"
            connection.execute(f"INSERT INTO {table} (repo, sha256) VALUES (?, ?)", (target_uid, sha256))

    def has_content(self, repo: Repo, sha256: str) -> bool:
        """Whether a commit to this repo may name this content: knowing a sha256 is not owning the bytes."""
        return self.has_uploaded(repo.uid, sha256) and self._contents.size_bytes(sha256) is not None

    def may_point(self, repo: Repo, sha256: str, size_bytes: int) -> bool:
        """Whether a pointer to this content may be put into this repo."""
        return self.has_content(repo, sha256) and self._contents.size_bytes(sha256) == size_bytes

    def has_uploaded(self, repo_uid: str, sha256: str) -> bool:
        """Whether a content was ever uploaded to a repo."""
        query = "SELECT 1 FROM repo_blobs WHERE repo = ? AND sha256 = ?"
        return self._database.row(query, repo_uid, sha256) is not None

    def was_deleted(self, repo: Repo, sha256: str) -> bool:
        """Whether a content was deleted from a repo for good, although commits there may still name it."""
        query = "SELECT 1 FROM deleted_blobs WHERE repo = ? AND sha256 = ?"
        return self._database.row(query, repo.uid, sha256) is not None

    @contextmanager
    def exclusively(self, repo: Repo) -> Iterator[None]:
        """While this is held, nobody else changes the refs of a repo, and no backup notes what refs and rows are."""
        with self._locks.setdefault(repo.uid, threading.Lock()), share(self._repos.changing_lock):
            yield

    def _store(
        self, repo: Repo, git: GitRepo, operations: Iterable[Operation]
    ) -> tuple[dict[str, str], list[DeleteFile]]:
        """Write the new files as objects that no commit names yet."""
        added: dict[str, str] = {}
        deleted: list[DeleteFile] = []
        for operation in operations:
            check_path(operation.path.removesuffix("/") if isinstance(operation, DeleteFile) else operation.path)
            if isinstance(operation, DeleteFile):
                deleted.append(operation)
            elif isinstance(operation, AddFile):
                self._check_content(repo, operation)
                added[operation.path] = git.write_file(operation.content)
            else:
                added[operation.path] = git.write_file(self._pointer(repo, operation))
        return added, deleted

    def _check_content(self, repo: Repo, operation: AddFile) -> None:
        if len(operation.content) > MAX_INLINE_BYTES:
            raise TooLargeError(f"{operation.path} has more than {MAX_INLINE_BYTES} bytes; upload it as a large file.")
        pointer = parse_pointer(operation.content)
        if pointer and not self.may_point(repo, *pointer):
            raise InvalidInputError(f"{operation.path} points at a large file that was never uploaded to this repo.")

    def _pointer(self, repo: Repo, operation: AddLargeFile) -> bytes:
        size_bytes = self._contents.size_bytes(check_sha256(operation.sha256))
        if size_bytes is None or not self.has_content(repo, operation.sha256):
            raise InvalidInputError(
                f"{operation.path} names the large file {operation.sha256}, which was never uploaded to this repo."
            )
        return format_pointer(operation.sha256, size_bytes)


def check_message(message: str) -> str:
    """`message` if a commit or tag may carry it: 1 to 65,536 characters, not all of them spaces."""
    if not message.strip() or len(message) > MAX_MESSAGE_CHARACTERS:
        raise InvalidInputError(f"A commit message has 1 to {MAX_MESSAGE_CHARACTERS} characters.")
    return message


def format_author(who: Identity) -> str:
    """How a user stands in a commit; addresses are not published."""
    return f"{who.user} <{who.user}@users.noreply>"


def _build_tree(git: GitRepo, head: str, added: dict[str, str], deleted: list[DeleteFile]) -> str | None:
    for operation in deleted:
        entry = git.find_entry(head, operation.path.removesuffix("/"))
        if entry is None or (operation.path.endswith("/") and not entry.is_folder):
            raise NotFoundError("entry", f"A file with this name doesn't exist: {operation.path}")
    removals: dict[str, str | None] = {operation.path.removesuffix("/"): None for operation in deleted}
    kept = {path: oid for path, oid in removals.items() if not _is_below(path, removals)}
    tree = git.write_tree(git.tree_of(head), kept) if kept else git.tree_of(head)
    return git.write_tree(tree, added) if added else tree


def _is_below(path: str, folders: dict[str, str | None]) -> bool:
    parts = path.split("/")
    return any("/".join(parts[:depth]) in folders for depth in range(1, len(parts)))
