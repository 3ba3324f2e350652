"""Repos as rows: who owns them, who may see and change them. Their content is in `commits` and `files`."""

import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dulwich.errors import NotGitRepository

from .accounts import Accounts, Identity
from .database import Database, now
from .errors import (
    ConflictError,
    ForbiddenError,
    GatedError,
    InvalidInputError,
    MovedError,
    NotFoundError,
    UnauthenticatedError,
)
from .git import GitRepo
from .locks import share, take
from .names import RepoId

IN_USE = "in-use"
"""The lock in a repository's folder that everybody shares who works in it."""
_FIRST_FILE = Path(__file__).parent / "gitattributes.txt"
_SELECT = "SELECT *, (SELECT COUNT(*) FROM likes WHERE likes.repo = repos.id) AS likes FROM repos"
_INSERT = (
    "INSERT INTO repos (id, kind, owner, name, private, sdk, created_at, modified_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
OnCreated = Callable[[sqlite3.Connection, str], None]
SDKS = ("docker", "gradio", "static", "streamlit")
_GATES = {"": "", False: "", None: "", "auto": "auto", "manual": "manual"}


@dataclass(frozen=True)
class Repo:
    """A repo's settings. `uid` names its folder and never changes, whatever the repo is called."""

    uid: str
    id: RepoId
    private: bool
    gated: str
    sdk: str | None
    downloads: int
    likes: int
    created_at: str
    modified_at: str


class Repos:
    """The repos of a store, as far as a person may see them."""

    def __init__(self, database: Database, accounts: Accounts, folder: Path) -> None:
        self._database = database
        self._accounts = accounts
        self._folder = folder
        self.cleaning_lock = folder.parent / "cleaning.lock"
        self.changing_lock = folder.parent / "changing.lock"
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def open(self, repo: Repo) -> Iterator[GitRepo]:
        """The git repository of a repo, of which `hub gc` deletes nothing as long as it is open.

        Raises:
            NotFoundError: If the repo was deleted in the meantime.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(share(self.path(repo) / IN_USE))
                git = stack.enter_context(GitRepo(self.path(repo)))
            except (NotGitRepository, FileNotFoundError):
                raise NotFoundError("repo", "Repository not found") from None
            try:
                yield git
            except (KeyError, FileNotFoundError):
                if self._database.row("SELECT 1 FROM repos WHERE id = ?", repo.uid) is None:
                    raise NotFoundError("repo", "Repository not found") from None
                raise

    def path(self, repo: Repo) -> Path:
        """The folder of a repo's git repository."""
        return self._folder / f"{repo.uid}.git"

    def create(
        self,
        repo_id: RepoId,
        who: Identity,
        *,
        private: bool = False,
        sdk: str | None = None,
        fill: Callable[[GitRepo], OnCreated] | None = None,
    ) -> Repo:
        """A new repo with one commit (`.gitattributes`, a Space's card); ConflictError if there is one of this name.

        With `fill` it has instead what that function writes. It returns what is to be done in the transaction that
        makes the repo, with the connection and the repo's uid: to note large files that `hub gc` may delete just now.
        """
        self._require_owner(repo_id.owner, who, {"admin", "write"})
        if sdk is not None and sdk not in SDKS:
            raise InvalidInputError(f"The sdk of a Space is one of {', '.join(SDKS)}; got {sdk[:40]!r}.")
        if self._row(repo_id) is not None:
            raise ConflictError(f"You already created this {repo_id.kind} repo")
        uid = uuid.uuid4().hex
        GitRepo.create(path := self._folder / f"{uid}.git")
        with share(path / IN_USE), GitRepo(path) as git:
            owner = self._accounts.find(repo_id.owner)["name"]
            try:
                on_created = fill(git) if fill else _write_first_commit(git, who, _first_files(repo_id, sdk))
                with self._database.transaction() as connection:
                    values = (uid, repo_id.kind, owner, repo_id.name, int(private), sdk, now(), now())
                    connection.execute(_INSERT, values)
                    on_created(connection, uid)
                    _forget_redirect(connection, repo_id)
            except sqlite3.IntegrityError:
                shutil.rmtree(path)
                raise ConflictError(f"You already created this {repo_id.kind} repo") from None
            except NotFoundError:  # what was to be copied has been deleted in the meantime
                shutil.rmtree(path)
                raise
        return self.find(repo_id, who)

    def find(self, repo_id: RepoId, who: Identity | None) -> Repo:
        """A repo that `who` may see; a private one of others is as absent as one that does not exist.

        Raises:
            MovedError: If it has another name now.
        """
        row = self._row(repo_id)
        moved = row is None and self._moved_row(repo_id)
        found = row or moved
        if not found or (found["private"] and not self._is_member(found["owner"], who)):
            raise NotFoundError("repo", "Repository not found")
        repo = _repo(found)
        if moved:
            raise MovedError(f"{repo_id} has moved to {repo.id}.", repo.id)
        return repo

    def name_of(self, uid: str) -> RepoId:
        """What a repo is called now; NotFoundError if it was deleted."""
        row = self._database.row("SELECT kind, owner, name FROM repos WHERE id = ?", uid)
        if row is None:
            raise NotFoundError("repo", "Repository not found")
        return RepoId(*row)

    def find_to_read(self, repo_id: RepoId, who: Identity | None) -> Repo:
        """A repo whose files `who` may read; GatedError while the owner has not granted it."""
        repo = self.find(repo_id, who)
        if not repo.gated or self._is_member(repo.id.owner, who):
            return repo
        if who is None:
            raise GatedError(f"Access to {repo_id.kind} {repo_id} is restricted. Log in to ask for access.")
        if self.access_status(repo, who.user) != "accepted":
            raise GatedError(
                f"Access to {repo_id.kind} {repo_id} is restricted and you are not in the authorized list."
            )
        return repo

    def find_to_write(self, repo_id: RepoId, who: Identity | None) -> Repo:
        """A repo that `who` may commit to."""
        repo = self.find(repo_id, who)
        self._require_owner(repo.id.owner, who, {"admin", "write"})
        return repo

    def find_to_contribute(self, repo_id: RepoId, who: Identity | None) -> Repo:
        """A repo to which `who` may propose changes: anybody who can read it and whose token may write."""
        repo = self.find(repo_id, who)
        if who is None:
            raise UnauthenticatedError("This needs a token; set HF_TOKEN or run `hf auth login`.")
        if not who.can_write:
            raise ForbiddenError("You have read access but not the required permissions: this token cannot write.")
        return self.find_to_read(repo.id, who)

    def require_write(self, repo: Repo, who: Identity | None) -> None:
        """Refuse who may not commit to a repo."""
        self._require_owner(repo.id.owner, who, {"admin", "write"})

    def may_write(self, repo: Repo, who: Identity) -> bool:
        """Whether `who` may commit to a repo."""
        return who.can_write and self._accounts.role_in(repo.id.owner, who.user) in {"admin", "write"}

    def next_number(self, repo: Repo) -> int:
        """A number for a discussion or pull request, never given twice."""
        with self._database.transaction() as connection:
            query = "UPDATE repos SET last_num = last_num + 1 WHERE id = ? RETURNING last_num"
            found = connection.execute(query, (repo.uid,)).fetchall()
        if not found:
            raise NotFoundError("repo", "Repository not found")
        return int(found[0][0])

    def delete(self, repo_id: RepoId, who: Identity | None) -> None:
        """Forget a repo and its history; `hub gc` frees the room that its large files take."""
        repo = self.find_to_write(repo_id, who)
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM repos WHERE id = ?", (repo.uid,))
        with take(self.cleaning_lock, alone=False) as is_held:
            if is_held:  # else a backup copies the folder, and a later `hub gc` deletes it
                shutil.rmtree(self.path(repo), ignore_errors=True)

    def move(self, source: RepoId, target: RepoId, who: Identity | None) -> None:
        """Rename a repo, or give it to a namespace in which `who` may write; its old name leads to the new one."""
        repo = self.find_to_write(source, who)
        self._require_owner(target.owner, who, {"admin", "write"})
        if source.kind != target.kind:
            raise InvalidInputError(f"A {source.kind} cannot become a {target.kind}.")
        owner = self._accounts.find(target.owner)["name"]
        try:
            with self._database.transaction() as connection:
                connection.execute(
                    "UPDATE repos SET owner = ?, name = ?, modified_at = ? WHERE id = ?",
                    (owner, target.name, now(), repo.uid),
                )
                values = (repo.id.kind, repo.id.owner, repo.id.name, repo.uid)
                connection.execute("INSERT OR REPLACE INTO redirects VALUES (?, ?, ?, ?)", values)
                _forget_redirect(connection, target)
        except sqlite3.IntegrityError:
            raise ConflictError(f"A {target.kind} repository called {target} already exists.") from None

    def update(self, repo_id: RepoId, who: Identity | None, *, private: bool | None, gated: object = "keep") -> None:
        """Change who may see a repo and who may read its files (`auto`, `manual` or False)."""
        repo = self.find_to_write(repo_id, who)
        if not isinstance(gated, str | bool | None) or (gated != "keep" and gated not in _GATES):
            raise InvalidInputError(f"gated is 'auto', 'manual' or false; got {gated!r}.")
        gate = repo.gated if gated == "keep" else _GATES[gated]
        is_private = repo.private if private is None else private
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE repos SET private = ?, gated = ?, modified_at = ? WHERE id = ?",
                (int(is_private), gate, now(), repo.uid),
            )

    def visible(self, kind: str, who: Identity | None) -> list[Repo]:
        """Every repo of a kind that `who` may see, the most recently changed first."""
        rows = self._database.rows(f"{_SELECT} WHERE kind = ? ORDER BY modified_at DESC, id", kind)
        return [_repo(row) for row in rows if not row["private"] or self._is_member(row["owner"], who)]

    def all(self) -> list[Repo]:
        """Every repo, for maintenance."""
        return [_repo(row) for row in self._database.rows(f"{_SELECT} ORDER BY kind, owner, name")]

    def touch(self, repo: Repo) -> None:
        """Note that a repo has changed now."""
        with self._database.transaction() as connection:
            connection.execute("UPDATE repos SET modified_at = ? WHERE id = ?", (now(), repo.uid))

    def access_status(self, repo: Repo, user: str) -> str | None:
        """`pending`, `accepted` or `rejected`; None for who never asked."""
        row = self._database.row("SELECT status FROM grants WHERE repo = ? AND user = ?", repo.uid, user)
        return row["status"] if row else None

    def ask_access(self, repo: Repo, who: Identity) -> str:
        """Ask for the files of a gated repo; the state of it, which asking again does not change."""
        if not who.can_write:
            raise ForbiddenError("You have read access but not the required permissions: this token cannot write.")
        if not repo.gated:
            raise InvalidInputError(f"{repo.id} is not gated.")
        self.add_access(repo, who.user, "accepted" if repo.gated == "auto" else "pending")
        return self.access_status(repo, who.user) or "pending"

    def add_access(self, repo: Repo, user: str, status: str) -> bool:
        """Record the state of a user's access, if there is none yet; whether it was recorded."""
        name = self._accounts.find(user)["name"]
        query = "INSERT INTO grants SELECT id, ?, ?, ? FROM repos WHERE id = ? ON CONFLICT DO NOTHING"
        with self._database.transaction() as connection:
            return connection.execute(query, (name, status, now(), repo.uid)).rowcount == 1

    def change_access(self, repo: Repo, user: str, status: str) -> bool:
        """Change the state of access for who has one; whether it was another one before."""
        query = "UPDATE grants SET status = ?, asked_at = ? WHERE repo = ? AND user = ? AND status != ?"
        with self._database.transaction() as connection:
            return connection.execute(query, (status, now(), repo.uid, user, status)).rowcount == 1

    def access_requests(self, repo: Repo, status: str) -> list[tuple[str, str]]:
        """The users with this status and when it was set."""
        rows = self._database.rows(
            "SELECT user, asked_at FROM grants WHERE repo = ? AND status = ? ORDER BY asked_at", repo.uid, status
        )
        return [(row["user"], row["asked_at"]) for row in rows]

    def _row(self, repo_id: RepoId) -> sqlite3.Row | None:
        return self._database.row(
            f"{_SELECT} WHERE kind = ? AND owner = ? AND name = ?", repo_id.kind, repo_id.owner, repo_id.name
        )

    def _moved_row(self, repo_id: RepoId) -> sqlite3.Row | None:
        where = "id = (SELECT repo FROM redirects WHERE kind = ? AND owner = ? AND name = ?)"
        return self._database.row(f"{_SELECT} WHERE {where}", repo_id.kind, repo_id.owner, repo_id.name)

    def _is_member(self, owner: str, who: Identity | None) -> bool:
        return who is not None and self._accounts.role_in(owner, who.user) is not None

    def _require_owner(self, owner: str, who: Identity | None, roles: set[str]) -> None:
        if who is None:
            raise UnauthenticatedError("This needs a token; set HF_TOKEN or run `hf auth login`.")
        if not who.can_write:
            raise ForbiddenError("You have read access but not the required permissions: this token cannot write.")
        if self._accounts.role_in(owner, who.user) not in roles:
            raise ForbiddenError(f"You don't have the rights to write under the namespace {owner!r}.")


def _first_files(repo_id: RepoId, sdk: str | None) -> dict[str, bytes]:
    files = {".gitattributes": _FIRST_FILE.read_bytes()}
    if repo_id.kind == "space":
        files["README.md"] = f"---\ntitle: {repo_id.name}\nsdk: {sdk or 'static'}\n---\n".encode()
    return files


def _write_first_commit(git: GitRepo, who: Identity, files: dict[str, bytes]) -> OnCreated:
    tree = git.write_tree(None, {path: git.write_file(content) for path, content in files.items()})
    author = f"{who.user} <{who.user}@users.noreply>"
    git.move_ref(
        "refs/heads/main",
        old=None,
        new=git.write_commit(tree=tree, parents=[], author=author, message="initial commit"),
    )
    return lambda connection, uid: None


def _repo(row: sqlite3.Row) -> Repo:
    return Repo(
        uid=row["id"],
        id=RepoId(row["kind"], row["owner"], row["name"]),
        private=bool(row["private"]),
        gated=row["gated"],
        sdk=row["sdk"],
        downloads=row["downloads"],
        likes=row["likes"],
        created_at=row["created_at"],
        modified_at=row["modified_at"],
    )


def _forget_redirect(connection: sqlite3.Connection, repo_id: RepoId) -> None:
    """A name that is taken again leads nowhere else any more."""
    query = "DELETE FROM redirects WHERE kind = ? AND owner = ? AND name = ?"
    connection.execute(query, (repo_id.kind, repo_id.owner, repo_id.name))
