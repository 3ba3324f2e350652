"""The one commit by which contributions come to main, with trailers that say what and whose they are."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..errors import HubError
from .pull_requests import PullRequest, describing

_PATCH = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]{0,95}) weights_sha256=(?P<sha256>[0-9a-f]{64})")
_NUMBER = re.compile(r"#(?P<number>[1-9]\d{0,8})")
_TAG = re.compile(r"merge-(\d{1,9})")
_STALE = 412


@dataclass(frozen=True)
class MergedPatch:
    """What a commit's trailers say of a patch in it; `base_commit` is the one that the patch was made for."""

    name: str
    weights_sha256: str
    number: int
    contributor: str
    base_commit: str
    method: str

    def to_trailers(self) -> list[str]:
        """One line for each fact."""
        return [
            f"Merged-Patch: {self.name} weights_sha256={self.weights_sha256}",
            f"Pull-Request: #{self.number}",
            f"Contributor: {self.contributor}",
            f"Base-Commit: {self.base_commit}",
            f"Merge-Method: {self.method}",
        ]


def read_trailers(message: str) -> list[MergedPatch]:
    """The patches that a commit's message says it merged; what is not whole is left out."""
    found: list[MergedPatch] = []
    fields: dict[str, str] = {}
    for line in message.splitlines():
        key, colon, value = line.partition(": ")
        if colon and key == "Merged-Patch":
            fields = {}
        fields[key] = value.strip()
        if key == "Merge-Method" and (patch := _read_patch(fields)) is not None:
            found.append(patch)
    return found


def _read_patch(fields: dict[str, str]) -> MergedPatch | None:
    patch, number = _PATCH.fullmatch(fields.get("Merged-Patch", "")), _NUMBER.fullmatch(fields.get("Pull-Request", ""))
    rest = [fields.get(key, "") for key in ("Contributor", "Base-Commit", "Merge-Method")]
    if patch is None or number is None or not all(rest):
        return None
    return MergedPatch(patch["name"], patch["sha256"], int(number["number"]), *rest)


def find_merge(api: HfApi, repo: str, number: int) -> tuple[str, frozenset[int]] | None:
    """The commit of main that merged a pull request, and the numbers of all that it merged.

    Raises:
        HubError: If the Hub refuses.
    """
    with describing(api, repo):
        for commit in api.list_repo_commits(repo):
            numbers = frozenset(patch.number for patch in read_trailers(commit.message))
            if number in numbers:
                return commit.commit_id, numbers
    return None


def commit_files(
    api: HfApi,
    repo: str,
    files: Sequence[tuple[str, Path]],
    *,
    message: str,
    description: str,
    parent: str,
    deleted: Sequence[str] = (),
) -> str:
    """One commit on main that adds `(path in the repo, file)` and deletes; the new commit.

    Either main is still at `parent` and gets all of it, or nothing happens.

    Raises:
        HubError: If somebody committed in the meantime, the Hub refuses, or the connection breaks.
    """
    operations: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(path) for path in deleted]
    operations += [CommitOperationAdd(path, file) for path, file in files]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tables of samples belong to a model's evidence
        try:
            with describing(api, repo):
                done = api.create_commit(
                    repo,
                    operations,
                    commit_message=message,
                    commit_description=description,
                    revision="main",
                    parent_commit=parent,
                )
        except RuntimeError as error:  # the client's word for a large file that did not get through
            raise HubError(f"{repo}: {error} Nothing was committed; run the command again.") from error
        except HubError as error:
            cause = error.__cause__
            if isinstance(cause, HfHubHTTPError) and cause.response.status_code == _STALE:
                raise HubError(
                    f"Somebody else committed to {repo} while this was prepared, so nothing was written; run the "
                    "command again, which begins from what they made."
                ) from error
            raise
    return done.oid


def tag_merge(api: HfApi, repo: str, commit: str) -> str:
    """The tag `merge-N` of a merge commit, made unless it has one.

    Raises:
        HubError: If the Hub refuses.
    """
    for _ in range(5):
        with describing(api, repo):
            tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags if _TAG.fullmatch(tag.name)}
        for name, target in tags.items():
            if target == commit:
                return name
        name = f"merge-{1 + max((int(each.removeprefix('merge-')) for each in tags), default=0)}"
        try:
            api.create_tag(repo, tag=name, revision=commit)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise HubError(f"{repo}: the tag {name} cannot be made ({error}).") from error
            continue  # somebody else's merge took the number
        except httpx2.HTTPError as error:
            raise HubError(f"{repo}: {api.endpoint} cannot be reached ({error}).") from error
        return name
    raise HubError(f"{repo}: others make tags faster than this can; run the command again.")


def close(api: HfApi, pull_request: PullRequest, text: str) -> None:
    """Say in an open pull request what became of it, and close it.

    Raises:
        HubError: If the Hub refuses.
    """
    with describing(api, str(pull_request)):
        api.change_discussion_status(pull_request.repo, pull_request.number, "closed", comment=text)


def find_owners(api: HfApi, repo: str) -> list[str]:
    """Who may speak for a repo: its owner, and where that is an organisation its members.

    Raises:
        HubError: If the Hub cannot be reached.
    """
    owner = repo.split("/")[0]
    try:
        with describing(api, owner):
            return [owner, *(member.username for member in api.list_organization_members(owner))]
    except HubError as error:
        if isinstance(error.__cause__, HfHubHTTPError):  # a person, or an organisation that keeps its members to itself
            return [owner]
        raise
