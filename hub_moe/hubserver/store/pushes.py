"""git push: nothing of it becomes part of the repo unless every object and every ref of it may."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import IO

from .accounts import Identity
from .commits import Commits
from .discussions import Discussion, Discussions
from .errors import InvalidInputError, NotFoundError, StoreError
from .git import GitRepo, parse_pointer
from .names import check_ref_name, is_commit_id
from .packs import BLOB
from .pushed import Connectivity, check_object
from .repos import Repo, Repos
from .unpacking import PackReader

MAX_REFS = 10_000
_MAX_EVENTS = 100


@dataclass(frozen=True)
class RefUpdate:
    """What a client asks of one ref; `old` or `new` None means that it is not there."""

    ref: str
    old: str | None
    new: str | None
    refusal: str = ""


@dataclass(frozen=True)
class PushResult:
    """What became of a push: `unpack` is `ok` or why its objects were refused; a ref without refusal was moved."""

    unpack: str
    updates: list[RefUpdate]


class Pushes:
    """Receives pushes for all repos."""

    def __init__(self, repos: Repos, commits: Commits, discussions: Discussions) -> None:
        self._repos = repos
        self._commits = commits
        self._discussions = discussions

    def receive(self, repo: Repo, who: Identity, updates: list[RefUpdate], pack: IO[bytes]) -> PushResult:
        """Move the refs if all of them may be moved and every object is sound; otherwise change nothing.

        `pack` is read from where it stands; a push that only deletes refs has none.
        """
        with self._repos.open(repo) as git:
            checked = [self._check_ref(repo, who, update) for update in updates]
            if any(update.refusal for update in checked):
                return PushResult("ok", _refuse_the_rest(checked))
            try:
                if any(update.new for update in updates):
                    self._unpack(repo, git, pack)
                with self._commits.exclusively(repo):
                    return self._apply(repo, who, git, checked)
            except StoreError as error:
                reason = _one_line(str(error))
                return PushResult(reason, [replace(update, refusal=reason) for update in updates])

    def _apply(self, repo: Repo, who: Identity, git: GitRepo, updates: list[RefUpdate]) -> PushResult:
        """The repo's commit lock is held."""
        moved = _check_names_fit(git, [_check_old(git, update) for update in updates])
        if any(update.refusal for update in moved):
            return PushResult("ok", _refuse_the_rest(moved))
        _check_connectivity(git, updates)
        done = [_move(git, update) for update in sorted(updates, key=lambda update: update.new is not None)]
        for update in done:
            if update.ref.startswith("refs/pr/") and not update.refusal:
                self._tell(repo, who, git, update)
        self._repos.touch(repo)
        return PushResult("ok", done)

    def _unpack(self, repo: Repo, git: GitRepo, pack: IO[bytes]) -> None:
        def check(type_num: int, content: bytes) -> None:
            check_object(type_num, content)
            pointer = parse_pointer(content) if type_num == BLOB else None
            if pointer and not self._commits.may_point(repo, *pointer):
                raise InvalidInputError(
                    f"A pointer names the large file {pointer[0]}, which was never uploaded to this repo: "
                    "push it with git-lfs."
                )

        PackReader(pack, git.objects, check).read()

    def _check_ref(self, repo: Repo, who: Identity, update: RefUpdate) -> RefUpdate:
        try:
            if update.ref.startswith("refs/pr/"):
                self._check_pull_request(repo, who, update)
            else:
                _check_name(update)
                self._repos.require_write(repo, who)
        except StoreError as error:
            return replace(update, refusal=_one_line(str(error)))
        return update

    def _check_pull_request(self, repo: Repo, who: Identity, update: RefUpdate) -> None:
        discussion = self._find_pull_request(repo, update.ref)
        self._discussions.require_commit(repo, discussion, who)
        if update.new is None:
            raise InvalidInputError("A pull request's ref cannot be deleted; close the pull request.")

    def _find_pull_request(self, repo: Repo, ref: str) -> Discussion:
        number = ref.removeprefix("refs/pr/")
        if not number.isascii() or not number.isdigit() or len(number) > 9 or number.startswith("0"):
            raise NotFoundError("discussion", f"{ref[:60]!r} is not the ref of a pull request.")
        return self._discussions.find(repo, int(number))

    def _tell(self, repo: Repo, who: Identity, git: GitRepo, update: RefUpdate) -> None:
        """Show the new commits in the pull request, oldest first."""
        assert update.new is not None
        discussion = self._find_pull_request(repo, update.ref)
        for entry in reversed(list(git.log(update.new, without=update.old, limit=_MAX_EVENTS))):
            subject = entry.message.partition("\n")[0]
            self._discussions.add_event(repo, discussion, who, "commit", {"subject": subject, "oid": entry.oid})


def _check_name(update: RefUpdate) -> None:
    for prefix in ("refs/heads/", "refs/tags/"):
        if update.ref.startswith(prefix):
            check_ref_name(update.ref.removeprefix(prefix))
            break
    else:
        raise InvalidInputError("Only branches, tags and open pull requests can be pushed.")
    if update.ref == "refs/heads/main" and update.new is None:
        raise InvalidInputError("The branch main cannot be deleted.")


def _check_old(git: GitRepo, update: RefUpdate) -> RefUpdate:
    if git.read_ref(update.ref) != update.old:
        return replace(update, refusal="The ref was changed at the same time; fetch and try again.")
    return update


def _check_names_fit(git: GitRepo, updates: list[RefUpdate]) -> list[RefUpdate]:
    """A ref cannot stand above another: `a` and `a/b` are a file and a folder of one name."""
    names = {prefix + name for prefix in ("refs/heads/", "refs/tags/") for name in git.list_refs(prefix)}
    names |= {update.ref for update in updates if update.new}
    names -= {update.ref for update in updates if not update.new}
    above = {name[: place.start()] for name in names for place in re.finditer("/", name)}
    below = {name for name in names if any(name[: place.start()] in names for place in re.finditer("/", name))}
    reason = "This ref and a ref above or below it cannot both exist."
    return [
        replace(update, refusal=reason) if update.new and update.ref in (above & names) | below else update
        for update in updates
    ]


def _check_connectivity(git: GitRepo, updates: Iterable[RefUpdate]) -> None:
    """Everything that the new tips need is there, and everything that was sent is needed."""
    known = {oid for prefix in ("refs/heads/", "refs/tags/", "refs/pr/") for oid in git.list_refs(prefix).values()}
    connectivity = Connectivity(git, known)
    for update in updates:
        if update.new is not None:
            connectivity.check_tip(update.new, is_tag=update.ref.startswith("refs/tags/"))
    unneeded = sum(not connectivity.has_met(oid) for oid in git.objects.new())
    if unneeded:
        raise InvalidInputError(f"The pack holds {unneeded} objects that no pushed ref needs.")


def _move(git: GitRepo, update: RefUpdate) -> RefUpdate:
    try:
        if update.old != update.new:
            git.move_ref(update.ref, old=update.old, new=update.new)
    except StoreError as error:
        return replace(update, refusal=_one_line(str(error)))
    return update


def _refuse_the_rest(updates: list[RefUpdate]) -> list[RefUpdate]:
    bad = next(update for update in updates if update.refusal)
    reason = f"Not changed, because {bad.ref} was refused."
    return [update if update.refusal else replace(update, refusal=reason) for update in updates]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:1000]


def parse_update(old: str, new: str, ref: str) -> RefUpdate:
    """A ref update as git's protocol writes it, where forty zeros stand for nothing."""
    if not (is_commit_id(old) and is_commit_id(new)):
        raise InvalidInputError("An object's id has 40 lower-case hex digits.")
    absent = "0" * 40
    return RefUpdate(ref, None if old == absent else old, None if new == absent else new)
