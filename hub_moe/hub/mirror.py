"""Copy repos from one Hub to another: history, branches, tags, large files, settings and open pull requests.

The order makes it safe to stop at any moment: settings, then large files, then the refs that need them, then pull
requests. A second run does what is left. Written for the embedded Hub and for huggingface.co alike; with the latter it
could not be tried here.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from ..errors import HubError
from .mirror_address import RepoAddress, Side, in_one_sentence
from .mirror_content import ABSENT, Advance, FileCopier, History, LargeFile, Missing, list_refs
from .mirror_pulls import PullRequestPlan, PullRequests

_MAIN = "refs/heads/main"
_PULLS = "refs/pr/"


@dataclass
class Report:
    """What was done, or in a dry run would be done, for one repo."""

    source: str
    target: str
    status: str = "planned"
    """`planned`, `copied`, `unchanged` or `failed`."""
    refs: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    """Refs that only DST has."""
    commits: int = 0
    files: int = 0
    bytes: int = 0
    skipped: int = 0
    """Large files that DST had already."""
    verified: int = 0
    """Files found at DST with the right sha256 or git id after the copy."""
    pull_requests: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What was left different on purpose, in sentences."""
    is_new: bool = False
    error: str = ""


class RepoMirror:
    """One repo from SRC to DST: `plan`, then `apply`. Use it in a `with` block."""

    def __init__(
        self, source: tuple[Side, RepoAddress], target: tuple[Side, RepoAddress], *, advance: Advance, force: bool
    ) -> None:
        self.source_side, self.source = source
        self.target_side, self.target = target
        self.report = Report(str(self.source), str(self.target))
        self._files = FileCopier(source, target, advance)
        self._pulls = PullRequests(source, target)
        self._force = force
        self._folder = tempfile.TemporaryDirectory(prefix="hub-moe-mirror-")
        self._history = History(Path(self._folder.name) / "history.git")
        self._refs: dict[str, str] = {}
        self._plans: list[PullRequestPlan] = []
        self._missing = Missing(0, {})
        self._sdk: str | None = None

    def __enter__(self) -> "RepoMirror":
        return self

    def __exit__(self, *_: object) -> None:
        self._history.close()
        self._folder.cleanup()

    def plan(self) -> Report:
        """Read both sides and fill the report with what there is to do; nothing is written at DST.

        Raises:
            HubError: If a side cannot be read, or DST has another history and `force` is not set.
        """
        if self.target_side.token is None:
            raise HubError(
                f"{self.target} cannot be written without a token: name the environment variable that holds it "
                "with --dst-token-env."
            )
        with in_one_sentence(self.source):
            info = self.source_side.api.repo_info(self.source.repo_id, repo_type=self.source.kind)
            self._sdk = getattr(info, "sdk", None) or ("static" if self.source.kind == "space" else None)
            numbers = self._pulls.list_open()
        heads = {f"{_PULLS}{number}": head for number, head in numbers.items()}
        self._refs = self._history.fetch(self.source_side, self.source, pull_requests=heads)
        with in_one_sentence(self.target):
            there = self._read_target()
            self.report.is_new = there is None
            self._plan_settings(info, there)
            self._plans = self._pulls.plan(numbers, is_target_new=there is None)
        now = list_refs(self.target_side, self.target) if there is not None else {}
        changes = self._plan_refs(now, is_pristine=there is None or self._is_pristine(now))
        self._plan_objects(now)
        self._plan_pulls(now)
        self.report.refs += [ref for ref, (_, new) in changes.items() if new != ABSENT]
        self.report.deleted = [ref for ref, (_, new) in changes.items() if new == ABSENT]
        self.report.kept = [ref for ref in now if ref not in self._refs and ref not in changes and _PULLS not in ref]
        return self.report

    @property
    def has_work(self) -> bool:
        """Whether anything at DST differs from SRC."""
        report = self.report
        return any((report.is_new, report.refs, report.deleted, report.pull_requests, report.settings))

    def apply(self) -> Report:
        """Do what was planned, then compare DST with SRC; HubError if they differ."""
        had_work = self.has_work
        with in_one_sentence(self.target):
            self._apply_settings()
            self._files.copy(self._missing.large_files)
            now = list_refs(self.target_side, self.target)
            changes = self._plan_refs(now, is_pristine=self.report.is_new or self._is_pristine(now))
            self._history.push(self.target_side, self.target, changes, haves=self._known(now))
            pulls = [plan for plan in self._plans if not plan.is_left_alone]
            numbers = {plan.number: self._apply_pull(plan) for plan in pulls}
            self._verify(numbers)
        self.report.status = "copied" if had_work else "unchanged"
        return self.report

    def _read_target(self) -> Any:
        try:
            return self.target_side.api.repo_info(self.target.repo_id, repo_type=self.target.kind)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None

    def _plan_settings(self, source: Any, target: Any) -> None:
        """Who may see and read the repo; an existing repo is opened further only with `force`."""
        gated, settings = source.gated or False, self.report.settings
        if target is None:
            settings["private"] = bool(source.private)
            if gated:
                settings["gated"] = gated
            return
        wanted = {"private": bool(source.private), "gated": gated}
        present = {"private": bool(target.private), "gated": target.gated or False}
        for name, value in wanted.items():
            if value == present[name]:
                continue
            if value or self._force:
                settings[name] = value
            else:
                self.report.notes.append(f"DST stays {name}, although SRC is not; --force opens it.")

    def _is_pristine(self, now: dict[str, str]) -> bool:
        """Whether DST holds nothing but the commit that came with its creation."""
        if set(now) != {_MAIN} or self._history.has(now[_MAIN]):
            return False
        api, repo_id, kind = self.target_side.api, self.target.repo_id, self.target.kind
        commits = api.list_repo_commits(repo_id, repo_type=kind)
        return (
            len(commits) == 1
            and commits[0].title == "initial commit"
            and api.list_repo_files(repo_id, repo_type=kind) == [".gitattributes"]
        )

    def _plan_refs(self, now: dict[str, str], *, is_pristine: bool) -> dict[str, tuple[str, str]]:
        """Old and new id of each branch and tag that is to move."""
        changes: dict[str, tuple[str, str]] = {}
        diverged = []
        for ref, new in self._refs.items():
            old = now.get(ref, ABSENT)
            if ref.startswith(_PULLS) or old == new:
                continue
            changes[ref] = (old, new)
            is_forward = ref.startswith("refs/heads/") and old != ABSENT and self._history.descends(new, old)
            if old != ABSENT and not is_forward and not is_pristine:
                diverged.append(ref)
        if diverged and not self._force:
            raise HubError(
                f"{self.target} has another history in {', '.join(sorted(diverged)[:5])}; "
                "--force replaces it by that of SRC and deletes branches and tags that only DST has."
            )
        if self._force:
            kept = {_MAIN, *self._refs}
            changes |= {ref: (old, ABSENT) for ref, old in now.items() if ref not in kept and _PULLS not in ref}
        return changes

    def _plan_objects(self, now: dict[str, str]) -> None:
        self._missing = self._history.missing(list(self._refs.values()), self._known(now))
        files = list(self._missing.large_files)
        absent: list[LargeFile] = files if self.report.is_new else self._files.find_absent(files)
        self.report.commits = self._missing.commits
        self.report.files, self.report.skipped = len(absent), len(files) - len(absent)
        self.report.bytes = sum(file.size_bytes for file in absent)

    def _plan_pulls(self, now: dict[str, str]) -> None:
        for plan in self._plans:
            wanted = self._refs.get(f"{_PULLS}{plan.number}")
            is_there = plan.copy is not None and now.get(f"{_PULLS}{plan.copy.num}") == wanted
            if not plan.is_left_alone and (not is_there or self._pulls.is_outdated(plan)):
                self.report.pull_requests.append(plan.number)

    def _known(self, now: dict[str, str]) -> list[str]:
        return sorted({oid for oid in now.values() if self._history.has(oid)})

    def _apply_settings(self) -> None:
        api, settings = self.target_side.api, self.report.settings
        options: dict[str, Any] = {"repo_type": self.target.kind}
        if self.report.is_new:
            api.create_repo(
                self.target.repo_id,
                private=settings["private"],
                exist_ok=True,
                space_sdk=self._sdk if self.target.kind == "space" else None,
                **options,
            )
        changed = {name: value for name, value in settings.items() if name == "gated" or not self.report.is_new}
        if changed:
            api.update_repo_settings(self.target.repo_id, **changed, **options)

    def _apply_pull(self, plan: PullRequestPlan) -> int:
        """The number at DST. The commits come before the pull request is opened."""
        number = self._pulls.create(plan)
        if plan.source is not None:
            ref = f"{_PULLS}{number}"
            now = list_refs(self.target_side, self.target)
            new = self._refs[f"{_PULLS}{plan.number}"]
            if now.get(ref) != new:
                change = {ref: (now.get(ref, ABSENT), new)}
                self._history.push(self.target_side, self.target, change, haves=self._known(now))
        if plan.number in self.report.pull_requests:
            self._pulls.finish(plan, number)
        return number

    def _verify(self, numbers: dict[int, int]) -> None:
        """Every ref at DST is SRC's, and every file there has the sha256 or git id that it has at SRC."""
        now = list_refs(self.target_side, self.target)
        seen: set[str] = set()
        for ref, oid in self._refs.items():
            number = ref.removeprefix(_PULLS)
            if number != ref and int(number) not in numbers:
                continue
            there = ref if number == ref else f"{_PULLS}{numbers[int(number)]}"
            if now.get(there) != oid:
                raise HubError(f"{self.target}: {there} is not at {oid} after the copy; run the command again.")
            tree = self._history.tree_of(oid)
            if tree not in seen:
                seen.add(tree)
                self.report.verified += self._verify_files(self._history.commit_of(oid))

    def _verify_files(self, commit: str) -> int:
        api, count = self.target_side.api, 0
        listed: dict[str, Any] = {
            one.path: one
            for one in api.list_repo_tree(
                self.target.repo_id, recursive=True, revision=commit, repo_type=self.target.kind
            )
        }
        for path, oid, large in self._history.files(commit):
            if path not in listed or not _is_same(listed[path], oid, large):
                raise HubError(f"{self.target} lists {path} of {commit} differently than SRC has it.")
            count += 1
        return count


def _is_same(listed: Any, oid: str, large: LargeFile | None) -> bool:
    lfs = getattr(listed, "lfs", None)
    if large is None:
        return lfs is None and getattr(listed, "blob_id", None) == oid
    return lfs is not None and (lfs.sha256, listed.size) == (large.sha256, large.size_bytes)


def run_each(mirrors: list[RepoMirror], step: Callable[[RepoMirror], Report]) -> list[RepoMirror]:
    """Do `step` with each mirror and return those that did not fail; one failure does not stop the others."""
    done = []
    for mirror in mirrors:
        try:
            step(mirror)
            done.append(mirror)
        except HubError as error:
            mirror.report.status, mirror.report.error = "failed", str(error)
    return done
