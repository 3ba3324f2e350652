"""Files into a repo: compared first, sent once, committed in one piece; after an interruption the same call goes on.

What the Hub has already is not sent again: files of the commit that is written to, and large files that an interrupted
upload left there.
"""

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from ..errors import ConfigError, HubError
from .pull_requests import Listed, describing, list_files

_BATCH_FILES = 50
_BATCH_BYTES = 1_000_000_000
_STALE = (409, 412)
_VERSION = re.compile(r"v([1-9]\d{0,8})")
_TAG = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")

Advance = Callable[[int, int], None]
"""Told how many bytes were sent, and how many there are in all."""


@dataclass(frozen=True)
class UploadPlan:
    """What an upload changes in a repo.

    Attributes:
        head: The commit that it was compared with; None where the repo is not there yet.
        is_private: Whether the repo is; None where it is not there yet.
        new, changed, same: Names in the repo of the files to upload, by what is there now.
        others: Files of the repo that are not among those to upload.
        deleted: Those of them that are taken away.
    """

    repo: str
    files: Mapping[str, Path]
    revision: str = "main"
    head: str | None = None
    is_private: bool | None = None
    new: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether the repo holds all of it already."""
        return not (self.new or self.changed or self.deleted) and self.head is not None

    @property
    def size_bytes(self) -> int:
        """Of the files that are sent."""
        return sum(self.files[name].stat().st_size for name in (*self.new, *self.changed))


def plan_upload(
    api: HfApi, repo: str, files: Mapping[str, Path], *, revision: str = "main", prune: Callable[[str], bool]
) -> UploadPlan:
    """Compare `files`, by their names in the repo, with what is there; `prune` says which others are to go.

    Raises:
        HubError: If the Hub refuses or cannot be reached; a repo that is not there is no error.
    """
    try:
        info = api.model_info(repo, revision=revision, expand=["sha", "private"])
    except RepositoryNotFoundError:
        return UploadPlan(repo, files, revision, new=tuple(files))
    except HfHubHTTPError:
        with describing(api, repo):
            raise
    there = list_files(api, repo, str(info.sha))
    same = [name for name, path in files.items() if name in there and _is_same(path, there[name])]
    others = [name for name in there if name not in files and name != ".gitattributes"]
    return UploadPlan(
        repo,
        files,
        revision,
        head=str(info.sha),
        is_private=bool(info.private),
        new=tuple(name for name in files if name not in there),
        changed=tuple(name for name in files if name in there and name not in same),
        same=tuple(same),
        others=tuple(others),
        deleted=tuple(filter(prune, others)),
    )


def upload(api: HfApi, plan: UploadPlan, *, message: str, advance: Advance = lambda done, total: None) -> str:
    """Send what the plan says and commit it in one piece; returns the commit, the present one if nothing changes.

    Interrupted, it leaves the repo as it was, and large files that were sent whole are not sent again.

    Raises:
        HubError: If the repo was changed since it was compared, the Hub refuses, or cannot be reached.
    """
    if plan.is_done:
        return str(plan.head)
    wanted = sorted((*plan.new, *plan.changed), key=lambda name: (plan.files[name].stat().st_size, name))
    additions = [CommitOperationAdd(name, plan.files[name]) for name in wanted]
    done, total = 0, plan.size_bytes
    with describing(api, plan.repo), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
        for batch in _batches(additions, plan):
            api.preupload_lfs_files(plan.repo, batch, revision=plan.revision, free_memory=False)
            done += sum(plan.files[each.path_in_repo].stat().st_size for each in batch)
            advance(done, total)
        try:
            info = api.create_commit(
                plan.repo,
                [*additions, *(CommitOperationDelete(name) for name in plan.deleted)],
                commit_message=message,
                revision=plan.revision,
                parent_commit=plan.head,
            )
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code in _STALE:
                raise HubError(
                    f"{plan.repo} was changed by somebody else meanwhile; run the same command again."
                ) from error
            raise
    return str(info.oid)


def create_repo(api: HfApi, repo: str, *, private: bool) -> None:
    """Make a model repo.

    Raises:
        HubError: If the Hub refuses, as it does for another's name.
    """
    with describing(api, repo):
        api.create_repo(repo, private=private, exist_ok=True)


def require_writer(api: HfApi) -> str:
    """The name of who is logged in, whose token may write.

    Raises:
        HubError: If nobody is, or the token may only read.
    """
    with describing(api, "Your account"):
        who: dict[str, Any] = api.whoami()
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"The token of {who['name']} may only read; make one that may write, then run `hf auth login`.")
    return str(who["name"])


def choose_tag(api: HfApi, repo: str, wanted: str | None, *, at: str | None) -> tuple[str, bool]:
    """The tag for a version at the commit `at` (None: one that is yet to be made), and whether it is there already.

    Without `wanted` it is the version tag that this commit has, or the next one of v1, v2, ...

    Raises:
        ConfigError: If `wanted` is no name for a tag.
        HubError: If another commit has it, or the Hub refuses.
    """
    if wanted is not None and not _TAG.fullmatch(wanted):
        raise ConfigError(f"{wanted!r} is no name for a tag; use letters, digits, '.', '_' and '-'.")
    try:
        with describing(api, repo):
            tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}
    except HubError as error:
        if not isinstance(error.__cause__, RepositoryNotFoundError):
            raise
        tags = {}
    if wanted is not None:
        if wanted in tags and tags[wanted] != at:
            raise HubError(f"{repo} has the tag {wanted} at the commit {tags[wanted][:12]}; choose another by --tag.")
        return wanted, wanted in tags
    versions = {int(match[1]): name for name in tags if (match := _VERSION.fullmatch(name))}
    here = [number for number, name in versions.items() if tags[name] == at]
    return (versions[max(here)], True) if here else (f"v{max(versions, default=0) + 1}", False)


def create_tag(api: HfApi, repo: str, tag: str, commit: str) -> None:
    """Give a commit a name.

    Raises:
        HubError: If the Hub refuses.
    """
    with describing(api, repo):
        api.create_tag(repo, tag=tag, revision=commit)


def _is_same(path: Path, listed: Listed) -> bool:
    if path.stat().st_size != listed.size_bytes:
        return False
    if listed.sha256 is not None:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == listed.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == listed.blob


def _batches(additions: Sequence[CommitOperationAdd], plan: UploadPlan) -> Iterator[list[CommitOperationAdd]]:
    batch: list[CommitOperationAdd] = []
    size_bytes = 0
    for each in additions:
        batch.append(each)
        size_bytes += plan.files[each.path_in_repo].stat().st_size
        if len(batch) == _BATCH_FILES or size_bytes >= _BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch
