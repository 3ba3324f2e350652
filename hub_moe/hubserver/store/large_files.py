"""Every large file of a repo in all of its history: to list, to copy to another repo, to delete for good."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from .accounts import Identity
from .commits import Commits
from .contents import Contents
from .database import Database
from .files import FileFacts, Files
from .git import GitRepo
from .names import RepoId, check_sha256
from .repos import OnCreated, Repo, Repos

_PREFIXES = ("refs/heads/", "refs/tags/", "refs/pr/")


@dataclass(frozen=True)
class StoredFile:
    """A large file, and the first place in the history where it is named; `path` and `ref` empty if nowhere."""

    sha256: str
    size_bytes: int
    pushed_at: str
    path: str = ""
    ref: str = ""


class LargeFiles:
    """The large files of repos, as far as they take up room there."""

    def __init__(self, database: Database, contents: Contents, repos: Repos, files: Files, commits: Commits) -> None:
        self._database = database
        self._contents = contents
        self._repos = repos
        self._files = files
        self._commits = commits

    def list_all(self, repo: Repo) -> list[StoredFile]:
        """What was uploaded to a repo and not deleted for good, used by a commit or not."""
        with self._repos.open(repo) as git:
            named = {file.sha256: file for file in self._find_named(git, _list_heads(git))}
        rows = self._database.rows("SELECT sha256 FROM repo_blobs WHERE repo = ? ORDER BY sha256", repo.uid)
        found = []
        for sha256 in [row["sha256"] for row in rows]:
            size_bytes = self._contents.size_bytes(sha256)
            if size_bytes is not None:
                found.append(named.get(sha256) or StoredFile(sha256, size_bytes, repo.modified_at))
        return found

    def stored_bytes(self, repo: Repo) -> int:
        """The size of all large files of a repo, used by a commit or not."""
        rows = self._database.rows("SELECT sha256 FROM repo_blobs WHERE repo = ?", repo.uid)
        return sum(self._contents.size_bytes(row["sha256"]) or 0 for row in rows)

    def duplicate(self, source: Repo, target: RepoId, who: Identity, *, private: bool) -> Repo:
        """A new repo with the branches, tags, large files and gate of another one, without its pull requests."""

        def fill(git: GitRepo) -> OnCreated:
            with self._repos.open(source) as original:
                refs = {ref: oid for ref, oid in _list_refs(original).items() if not ref.startswith("refs/pr/")}
                original.copy_history(git, refs)
                named = {file.sha256 for file in self._find_named(original, refs)}
            return lambda connection, uid: self._commits.copy_notes(connection, source, uid, named)

        # A gated copy is private until it has its gate: at no moment may everybody read it.
        repo = self._repos.create(target, who, private=private or bool(source.gated), sdk=source.sdk, fill=fill)
        if source.gated:
            self._repos.update(target, who, private=private, gated=source.gated)
        return self._repos.find(repo.id, who)

    def delete(self, repo: Repo, sha256s: Iterable[str], *, rewrite_history: bool) -> None:
        """Forget large files of a repo. With `rewrite_history` no commit names them any more; all its ids change.

        Without it the commits stay and the files in them can no longer be read. The bytes leave the disk when nothing
        else uses them and the store is cleared up.
        """
        doomed = {check_sha256(sha256) for sha256 in sha256s}
        if rewrite_history:
            with self._commits.changing(repo) as git:
                self._rewrite(repo, git, doomed)
        with self._database.transaction() as connection:
            for sha256 in doomed:
                values = (repo.uid, sha256)
                done = connection.execute("DELETE FROM repo_blobs WHERE repo = ? AND sha256 = ?", values)
                if done.rowcount:
                    connection.execute("INSERT OR IGNORE INTO deleted_blobs VALUES (?, ?)", values)
        self._repos.touch(repo)

    def _rewrite(self, repo: Repo, git: GitRepo, doomed: set[str]) -> None:
        refs = _list_refs(git)
        rewriting = _Rewriting(git, {oid for oid, sha256 in self._pointers(git, refs).items() if sha256 in doomed})
        for commit in git.history({git.resolve(ref) for ref in refs}):
            rewriting.copy(commit)
        for ref, oid in refs.items():
            commit = git.resolve(ref)
            if rewriting.commits[commit] != commit:  # an annotated tag becomes a plain one: it says another commit's id
                git.move_ref(ref, old=oid, new=rewriting.commits[commit])
        with self._database.transaction() as connection:
            for old, new in rewriting.commits.items():
                query = "UPDATE discussions SET merge_commit = ? WHERE repo = ? AND merge_commit = ?"
                connection.execute(query, (new, repo.uid, old))

    def _pointers(self, git: GitRepo, refs: Iterable[str]) -> dict[str, str]:
        """By git id, the sha256 of each large file that the refs reach."""
        facts = (one for _, _, found in self._walk(git, refs) for one in found.values())
        return {one.oid: one.sha256 for one in facts if one.sha256}

    def _find_named(self, git: GitRepo, refs: Iterable[str]) -> Iterator[StoredFile]:
        seen = set()
        for ref, date_s, facts in self._walk(git, refs):
            for path, one in facts.items():
                if one.sha256 and one.sha256 not in seen:
                    seen.add(one.sha256)
                    pushed_at = datetime.fromtimestamp(date_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
                    yield StoredFile(one.sha256, one.size_bytes, pushed_at, path, ref)

    def _walk(self, git: GitRepo, refs: Iterable[str]) -> Iterator[tuple[str, int, dict[str, FileFacts]]]:
        """Each commit that the refs reach: a ref, when it was made, and the files in folders not met before."""
        trees: set[str] = set()
        commits: set[str] = set()
        for ref in refs:
            for commit in git.history([git.resolve(ref)]):
                if commit not in commits:
                    commits.add(commit)
                    paths = dict(_walk_new(git, git.tree_of(commit), trees))
                    facts = self._files.facts(git, paths.values())
                    yield ref, git.date_of(commit), {path: facts[oid] for path, oid in paths.items()}


class _Rewriting:
    """Commits without certain git blobs, and which commit became which."""

    def __init__(self, git: GitRepo, doomed: set[str]) -> None:
        self._git = git
        self._doomed = doomed
        self._trees: dict[str, str | None] = {}
        self.commits: dict[str, str] = {}

    def copy(self, commit: str) -> None:
        """Rewrite one commit whose parents are rewritten; its own id if nothing in it changes."""
        tree, parents = self._git.tree_of(commit), self._git.parents(commit)
        new_tree, new_parents = self._copy_tree(tree), [self.commits[parent] for parent in parents]
        is_same = (tree, parents) == (new_tree, new_parents)
        self.commits[commit] = commit if is_same else self._git.copy_commit(commit, tree=new_tree, parents=new_parents)

    def _copy_tree(self, tree: str) -> str | None:
        if tree not in self._trees:
            changes: dict[str, str | None] = {}
            for entry in self._git.walk(tree, recursive=False):
                if entry.is_folder:
                    new = self._copy_tree(entry.oid)
                    if new != entry.oid:
                        changes[entry.path] = new
                elif entry.oid in self._doomed:
                    changes[entry.path] = None
            self._trees[tree] = self._git.replace_entries(tree, changes) if changes else tree
        return self._trees[tree]


def _list_heads(git: GitRepo) -> list[str]:
    """Every ref, `main` first."""
    return sorted(_list_refs(git), key=lambda ref: (ref != "refs/heads/main", ref))


def _list_refs(git: GitRepo) -> dict[str, str]:
    names = [prefix + name for prefix in _PREFIXES for name in git.list_refs(prefix)]
    return {name: git.read_ref(name) or "" for name in names}


def _walk_new(git: GitRepo, tree: str, seen: set[str], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The path and git id of each file in trees that are not in `seen`, which grows."""
    if tree in seen:
        return
    seen.add(tree)
    for entry in git.walk(tree, recursive=False):
        path = prefix + entry.path
        if entry.is_folder:
            yield from _walk_new(git, entry.oid, seen, f"{path}/")
        else:
            yield path, entry.oid
