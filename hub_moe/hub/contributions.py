"""What strangers gave a model: patches in its repo, open pull requests with one, and the reviews of these.

All of it was written by others: it is read strictly and up to limits, and what does not parse is left out or named.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.hf_api import RepoFolder

from ..errors import CheckpointError, HubError
from ..patches.metadata import METADATA_FILE, PatchMetadata
from .marks import ContributionMark, ReviewMark, read_mark
from .pull_requests import PullRequest, describing, fetch_pull_request, read_bytes

PATCHES_FOLDER = "patches"
OPEN = ("open", "draft")
REPRODUCED = ("bit-equal", "within tolerance")

_MAX_METADATA_BYTES = 20_000_000
_MAX_DISCUSSIONS = 1000
_MAX_MEMBERS = 1000
_MAX_LETTERS = 200


@dataclass(frozen=True)
class FoundPatch:
    """An expert patch in a repo, by its metadata; `fault` says why that cannot be read."""

    name: str
    base: str | None = None
    base_commit: str | None = None
    weights_sha256: str | None = None
    num_experts: int = 0
    num_layers: int = 0
    num_parameters: int = 0
    method: str | None = None
    fault: str | None = None


@dataclass(frozen=True)
class FoundReview:
    """Somebody's verdict on a commit of a pull request.

    Attributes:
        is_maintainer: Whether the reviewer owns the repo, or is a member of the organisation that does.
        is_author: Whether the reviewer is who opened the pull request.
        is_current: Whether the commit is still what the pull request proposes.
    """

    reviewer: str
    mark: ReviewMark
    is_maintainer: bool
    is_author: bool
    is_current: bool

    @property
    def counts(self) -> bool:
        """Whether it is the word of somebody whom the repo's owner trusts, about somebody else's work."""
        return self.is_maintainer and not self.is_author


@dataclass(frozen=True)
class ProposedPatch:
    """A pull request whose description says that it brings a patch, with the last review of each reviewer."""

    pull_request: PullRequest
    mark: ContributionMark
    reviews: tuple[FoundReview, ...]


class Maintainers:
    """Who may speak for a repo: its owner, or who is seen to be a member of the organisation that owns it."""

    def __init__(self, api: HfApi, repo: str) -> None:
        self._api, self._owner = api, repo.partition("/")[0]

    def __contains__(self, user: object) -> bool:
        return isinstance(user, str) and user.lower() in self._names

    @cached_property
    def _names(self) -> set[str]:
        found = {self._owner.lower()}
        try:
            members = islice(self._api.list_organization_members(self._owner), _MAX_MEMBERS)
            return found | {member.username.lower() for member in members}
        except HfHubHTTPError:  # a person, or an organisation that does not show its members
            return found


def list_patches(api: HfApi, repo: str, revision: str) -> list[str]:
    """The names of the folders in `patches/`.

    Raises:
        HubError: If the Hub refuses.
    """
    try:
        with describing(api, repo):
            entries = list(islice(_walk_folder(api, repo, revision), _MAX_DISCUSSIONS))
    except HubError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return []
        raise
    return sorted(entry.path.rpartition("/")[2] for entry in entries if isinstance(entry, RepoFolder))


def read_patch(api: HfApi, repo: str, name: str, *, revision: str) -> FoundPatch:
    """The patch in `patches/NAME`, or with an empty name the one that the repo itself is."""
    folder = f"{PATCHES_FOLDER}/{name}/" if name else ""
    try:
        metadata = read_metadata(api, repo, f"{folder}{METADATA_FILE}", revision=revision)
    except (HubError, CheckpointError) as error:
        return FoundPatch(one_line(name), fault=one_line(str(error)))
    return FoundPatch(
        name=one_line(name),
        base=one_line(metadata.base.repo),
        base_commit=metadata.base.commit,
        weights_sha256=metadata.weights_sha256,
        num_experts=metadata.num_experts,
        num_layers=len(metadata.experts),
        num_parameters=metadata.num_parameters,
        method=one_line(metadata.method) if metadata.method else None,
    )


def read_metadata(api: HfApi, repo: str, path: str, *, revision: str) -> PatchMetadata:
    """An `expert_patch.json` on a Hub.

    Raises:
        HubError: If it is not there, or the Hub refuses.
        CheckpointError: If it is damaged, or larger than any patch needs.
    """
    content = read_bytes(api, repo, path, revision=revision, count=_MAX_METADATA_BYTES + 1)
    if len(content) > _MAX_METADATA_BYTES:
        raise CheckpointError(f"{path} has more than {_MAX_METADATA_BYTES:,} bytes, which is not read from a Hub.")
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    return PatchMetadata.from_dict(fields, source=path)


def list_pull_requests(api: HfApi, repo: str, statuses: Sequence[str]) -> list[int]:
    """The numbers of a repo's pull requests in one of these states, newest first.

    Raises:
        HubError: If the Hub refuses.
    """
    with describing(api, repo):
        found = islice(api.get_repo_discussions(repo, discussion_type="pull_request"), _MAX_DISCUSSIONS)
        return [each.num for each in found if each.is_pull_request and each.status in statuses]


def read_proposed_patch(api: HfApi, repo: str, number: int, maintainers: Maintainers) -> ProposedPatch | None:
    """The contribution in a pull request; None if its description does not say that it is one.

    Raises:
        HubError: If it is gone, or the Hub refuses.
    """
    pull_request = fetch_pull_request(api, repo, number)
    mark = read_mark(ContributionMark, pull_request.description)
    if mark is None:
        return None
    return ProposedPatch(pull_request, mark, tuple(_find_reviews(pull_request, maintainers)))


def one_line(text: str) -> str:
    """A stranger's words for a terminal: one line, without control characters, not long."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text[: 4 * _MAX_LETTERS]).split())
    return plain if len(plain) <= _MAX_LETTERS else f"{plain[: _MAX_LETTERS - 1]}…"


def _find_reviews(pull_request: PullRequest, maintainers: Maintainers) -> list[FoundReview]:
    found: dict[str, FoundReview] = {}
    for comment in pull_request.comments[1:]:
        mark = read_mark(ReviewMark, comment.text)
        if mark is not None:
            reviewer = one_line(comment.author)
            found.pop(reviewer.lower(), None)  # the last one stands, and stands last
            found[reviewer.lower()] = FoundReview(
                reviewer=reviewer,
                mark=mark,
                is_maintainer=comment.author in maintainers,
                is_author=comment.author.lower() == pull_request.author.lower(),
                is_current=mark.commit == pull_request.head,
            )
    return list(found.values())


def _walk_folder(api: HfApi, repo: str, revision: str) -> Iterator[object]:
    yield from api.list_repo_tree(repo, PATCHES_FOLDER, revision=revision)
