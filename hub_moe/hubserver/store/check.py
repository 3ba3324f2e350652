"""Whether a store is whole: every object reachable and well-formed, every large file there and of the right sha256."""

import hashlib
import zlib
from collections.abc import Callable, Iterator
from functools import partial

from dulwich.errors import ChecksumMismatch, ObjectFormatException

from . import Store
from .errors import InvalidInputError, NotFoundError
from .git import GitRepo, TreeEntry, parse_pointer
from .packs import hash_object
from .repos import Repo

_BROKEN = (KeyError, AssertionError, ObjectFormatException, ChecksumMismatch, NotFoundError, zlib.error, ValueError)


OnProgress = Callable[[int, int], None]


def find_faults(store: Store, *, read_blobs: bool = True, on_progress: OnProgress | None = None) -> Iterator[str]:
    """One sentence for each fault. `read_blobs=False` trusts the content of large files and checks only their size.

    `on_progress` gets how many files and repos are checked, and how many there are in all.
    """
    repos, contents = store.repos.all(), sorted(store.contents.all()) if read_blobs else []
    xorbs = sorted({*store.xorbs.all(), *store.contents.recipes.xorbs()})
    checks = [
        *(partial(_check_xorb, store, name, read=read_blobs) for name in xorbs),
        *(partial(_check_content, store, sha256) for sha256 in contents),
        *(partial(_check_repo, store, repo) for repo in repos),
    ]
    for number, check in enumerate(checks, start=1):
        yield from check()
        if on_progress:
            on_progress(number, len(checks))


def find_orphans(store: Store) -> list[str]:
    """Git repositories that belong to no repo: a creation or deletion was cut short. Harmless, but they take space."""
    known = {f"{repo.uid}.git" for repo in store.repos.all()}
    return sorted(path.name for path in (store.root / "repos").iterdir() if path.name not in known)


def _check_xorb(store: Store, name: str, *, read: bool) -> Iterator[str]:
    if not store.xorbs.has(name):
        if store.contents.recipes.users(name):
            yield f"xorb {name}: it is missing."
    elif read and not store.xorbs.is_true(name):
        yield f"xorb {name}: it is damaged."


def _check_content(store: Store, sha256: str) -> Iterator[str]:
    digest = hashlib.sha256()
    try:
        for piece in store.contents.read(sha256):
            digest.update(piece)
    except (NotFoundError, InvalidInputError) as error:
        if store.contents.size_bytes(sha256) is not None:  # else `hub gc` has deleted it meanwhile
            yield f"large file {sha256}: {error}"
        return
    if digest.hexdigest() != sha256:
        yield f"large file {sha256}: its content has the sha256 {digest.hexdigest()}."


def _check_repo(store: Store, repo: Repo) -> Iterator[str]:
    if not store.repos.path(repo).is_dir():
        yield f"{repo.id.kind} {repo.id}: its git repository is missing."
        return
    with store.repos.open(repo) as git:
        yield from _check_refs(store, repo, git)


def _check_refs(store: Store, repo: Repo, git: GitRepo) -> Iterator[str]:
    name = f"{repo.id.kind} {repo.id}"
    for discussion in store.discussions.list_all(repo, is_pull_request=True):
        if git.read_ref(discussion.ref) is None:
            yield f"{name}: the pull request {discussion.num} has no ref."
    seen: set[str] = set()
    for prefix in ("refs/heads/", "refs/tags/", "refs/pr/"):
        try:
            commits = git.list_refs(prefix)
        except _BROKEN as error:
            yield f"{name}: a ref below {prefix} leads nowhere: {error}"
            continue
        for ref, commit in commits.items():
            try:
                yield from _check_history(store, repo, git, commit, seen)
            except _BROKEN as error:
                yield f"{name}: {prefix}{ref} reaches a missing or damaged object: {error!r}"


def _check_history(store: Store, repo: Repo, git: GitRepo, commit: str, seen: set[str]) -> Iterator[str]:
    for entry in git.log(commit):
        if entry.oid in seen:
            continue
        seen.add(entry.oid)
        if not _is_sound(git, entry.oid):
            yield f"{repo.id.kind} {repo.id}: the commit {entry.oid} is damaged."
        for item in git.walk(git.tree_of(entry.oid)):
            if item.oid in seen:
                continue
            seen.add(item.oid)
            if not _is_sound(git, item.oid):
                yield f"{repo.id.kind} {repo.id}: the object {item.oid} ({item.path}) is damaged."
            if item.is_folder:
                continue
            yield from _check_pointer(store, repo, git, item)


def _check_pointer(store: Store, repo: Repo, git: GitRepo, item: TreeEntry) -> Iterator[str]:
    pointer = parse_pointer(git.read_file(item.oid))
    if pointer is None or store.commits.was_deleted(repo, pointer[0]):
        return
    if store.contents.size_bytes(pointer[0]) != pointer[1]:
        yield f"{repo.id.kind} {repo.id}: the large file {pointer[0]} ({item.path}) is missing or cut."
    if not store.commits.has_content(repo, pointer[0]):
        yield f"{repo.id.kind} {repo.id}: the large file {pointer[0]} ({item.path}) was not uploaded to it."


def _is_sound(git: GitRepo, oid: str) -> bool:
    return hash_object(*git.objects.read(oid)) == oid
