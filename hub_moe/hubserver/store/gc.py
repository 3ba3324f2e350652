"""`hub gc`: delete what nothing reaches any more, while the Hub serves.

Three things keep what somebody needs or is about to: a repository is cleaned only while nobody works in it, and what
its refs lead to is looked at again then; rows and files of large contents go in one transaction that checks them again;
and what is younger than `older_than_s` stays, because its commit may be on the way. A kill at any moment leaves nothing
worse than garbage.
"""

import contextlib
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import ConfigError
from . import Store
from .git import GitRepo
from .git_garbage import GitGarbage
from .locks import take
from .reachable import Reachable
from .repos import IN_USE, Repo

DEFAULT_AGE_S = 24 * 3600
_ACTIVE_S = 3600
_WAIT_S = 10.0
_DAMAGED = (KeyError, AssertionError, ValueError, zlib.error)

OnProgress = Callable[[int, int], None]


@dataclass
class Freed:
    """How many things of each kind were deleted and their bytes; `skipped` says why some repos were left alone."""

    counts: dict[str, int] = field(default_factory=dict)
    sizes_bytes: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def add(self, kind: str, size_bytes: int) -> None:
        """Count one more."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.sizes_bytes[kind] = self.sizes_bytes.get(kind, 0) + size_bytes

    @property
    def size_bytes(self) -> int:
        """All bytes together."""
        return sum(self.sizes_bytes.values())


def collect(
    store: Store, *, older_than_s: float = DEFAULT_AGE_S, dry_run: bool = False, on_progress: OnProgress | None = None
) -> Freed:
    """Delete what nothing needs, or with `dry_run` only count it; `on_progress` gets repos done and repos in all.

    Raises:
        ConfigError: If a backup or another `hub gc` is running.
    """
    with take(store.repos.cleaning_lock) as is_held:
        if not is_held:
            raise ConfigError(f"A backup or another `hub gc` of {store.root} is running; try again when it is done.")
        run = _Run(store, time.time() - older_than_s, dry_run)
        repos = store.repos.all()
        for number, repo in enumerate(repos):
            if on_progress:
                on_progress(number, len(repos))
            run.clean_repo(repo)
        run.clean_folders()
        run.clean_contents()
        run.clean_xorbs()
        run.clean_incoming()
        if on_progress:
            on_progress(len(repos), len(repos))
        return run.freed


class _Run:
    def __init__(self, store: Store, before_s: float, dry_run: bool) -> None:
        self._store = store
        self._before_s = before_s
        self._dry_run = dry_run
        self._forgotten: set[tuple[str, str]] = set()
        self._dead: set[str] = set()
        self.freed = Freed()

    def clean_repo(self, repo: Repo) -> None:
        """Delete a repo's unreachable objects, and forget that large contents belong to it which it names no more."""
        path, reachable = self._store.repos.path(repo), Reachable(self._store.files)
        try:
            with self._store.repos.open(repo) as git:
                reachable.add_refs(git)  # most of the work, while others may work too
            with take(path / IN_USE, wait_s=_WAIT_S) as is_held:
                if not is_held:
                    self.freed.skipped.append(f"{repo.id.kind} {repo.id} was in use all the time.")
                    return
                with GitRepo(path) as git:
                    self._clean_alone(repo, git, reachable)
        except FileNotFoundError:
            self.freed.skipped.append(f"{repo.id.kind} {repo.id} has no git repository.")
        except _DAMAGED as error:
            self.freed.skipped.append(f"{repo.id.kind} {repo.id} is damaged ({error!r}); see `hub check`.")

    def _clean_alone(self, repo: Repo, git: GitRepo, reachable: Reachable) -> None:
        reachable.add_refs(git)
        reachable.add(git, self._list_merges(repo, git))
        garbage = GitGarbage(git, reachable, before_s=self._before_s)
        for size_bytes in garbage.count() if self._dry_run else garbage.delete():
            self.freed.add("git objects", size_bytes)
        rows = self._store.database.rows(
            "SELECT sha256 FROM repo_blobs WHERE repo = ? AND noted_at_s <= ?", repo.uid, int(self._before_s)
        )
        forgotten = [(repo.uid, row["sha256"]) for row in rows if row["sha256"] not in reachable.contents]
        self._forgotten.update(forgotten)
        if forgotten and not self._dry_run:
            with self._store.database.transaction() as connection:
                connection.executemany("DELETE FROM repo_blobs WHERE repo = ? AND sha256 = ?", forgotten)

    def _list_merges(self, repo: Repo, git: GitRepo) -> list[str]:
        """The commits that merged pull requests: their pages show them, even when the branch was squashed since."""
        query = "SELECT DISTINCT merge_commit FROM discussions WHERE repo = ? AND merge_commit IS NOT NULL"
        rows = self._store.database.rows(query, repo.uid)
        return [row["merge_commit"] for row in rows if row["merge_commit"] in git.objects]

    def clean_folders(self) -> None:
        """Delete git repositories that belong to no repo."""
        for path in sorted((self._store.root / "repos").glob("*.git")):
            with contextlib.suppress(FileNotFoundError):  # its repo is being deleted at this moment
                if path.stat().st_mtime <= min(self._before_s, time.time() - 60):
                    self._clean_folder(path)

    def _clean_folder(self, path: Path) -> None:
        with take(path / IN_USE) as is_held:  # who makes a new repo holds it until the repo has its row
            if is_held and not self._store.database.row("SELECT 1 FROM repos WHERE id = ?", path.stem):
                size_bytes = _count_bytes(path)
                if not self._dry_run:
                    shutil.rmtree(path)
                self.freed.add("git repositories", size_bytes)

    def clean_contents(self) -> None:
        """Delete large contents that belong to no repo, and files of those that have a recipe too."""
        blobs, recipes = self._store.contents.blobs, self._store.contents.recipes
        for sha256 in blobs.all():
            path = blobs.path(sha256)
            with self._store.database.transaction():
                has_recipe = recipes.find(sha256) is not None
                if (has_recipe or not self._is_owned(sha256)) and path.stat().st_mtime <= self._before_s:
                    self.freed.add("large files", path.stat().st_size)
                    if not self._dry_run:
                        blobs.delete(sha256)
        for sha256 in recipes.all():
            with self._store.database.transaction() as connection:
                row = connection.execute("SELECT added_at_s FROM recipes WHERE sha256 = ?", (sha256,)).fetchone()
                if row and row["added_at_s"] <= self._before_s and not self._is_owned(sha256):
                    self.freed.add("recipes", 0)
                    self._dead.add(sha256)
                    if not self._dry_run:
                        recipes.delete(connection, sha256)

    def _is_owned(self, sha256: str) -> bool:
        rows = self._store.database.rows("SELECT repo FROM repo_blobs WHERE sha256 = ?", sha256)
        return any((row["repo"], sha256) not in self._forgotten for row in rows)

    def clean_xorbs(self) -> None:
        """Delete xorbs that no recipe needs; clients get a new address first, at which they forget the old ones."""
        xorbs = self._store.xorbs
        doomed = [name for name in xorbs.all() if self._is_unused(name)]
        if doomed and not self._dry_run:
            self._store.xet.start_generation()
        for name in doomed:
            with self._store.database.transaction():
                if self._is_unused(name):
                    self.freed.add("xorbs", xorbs.path(name).stat().st_size)
                    if not self._dry_run:
                        xorbs.delete(name)

    def _is_unused(self, name: str) -> bool:
        if self._store.xorbs.path(name).stat().st_mtime > self._before_s:
            return False
        return all(sha256 in self._dead for sha256 in self._store.contents.recipes.users(name))

    def clean_incoming(self) -> None:
        """Delete uploads that nobody goes on with."""
        for path in sorted(self._store.contents.blobs.incoming.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # an upload that ends while one looks at it
                if _newest_s(path) <= min(self._before_s, time.time() - _ACTIVE_S):
                    size_bytes = _count_bytes(path)
                    if not self._dry_run:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                    self.freed.add("unfinished uploads", size_bytes)


def _count_bytes(path: Path) -> int:
    return sum(one.stat().st_size for one in _walk(path) if one.is_file())


def _newest_s(path: Path) -> float:
    return max(one.stat().st_mtime for one in _walk(path))


def _walk(path: Path) -> Iterator[Path]:
    yield path
    yield from path.rglob("*")
