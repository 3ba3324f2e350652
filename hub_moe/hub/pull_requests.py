"""Pull requests on a model's repo as a reviewer meets them: the proposed files by name and size, before any is read.

Everything here was written by strangers. Nothing is downloaded but what is asked for, up to a limit in bytes.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import httpx2
from huggingface_hub import DiscussionComment, HfApi, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import get_session, hf_raise_for_status

from ..errors import ConfigError, HubError

MAX_LISTED = 20_000
"""Files and folders of a repo that are looked at; whoever proposes more hides something."""

_REFERENCE = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)#(?P<number>[1-9]\d{0,8})")


@dataclass(frozen=True)
class Listed:
    """A file of a repo at a commit: its size, and what tells it from others, the sha256 of a large one among it."""

    path: str
    size_bytes: int
    blob: str
    sha256: str | None = None


@dataclass(frozen=True)
class Comment:
    """What somebody said; the first one of a pull request is its description."""

    id: str
    author: str
    text: str


@dataclass(frozen=True)
class PullRequest:
    """A pull request as it stands: `head` is the commit that it proposes now."""

    repo: str
    number: int
    title: str
    author: str
    status: str
    head: str
    comments: tuple[Comment, ...]

    def __str__(self) -> str:
        return f"{self.repo}#{self.number}"

    @property
    def description(self) -> str:
        """What its author says of it."""
        return self.comments[0].text if self.comments else ""


@dataclass(frozen=True)
class Proposal:
    """What a pull request changes, against the commit of main that it began from.

    Attributes:
        fork: That commit.
        added: New and changed files.
        deleted: Names of files that it takes away.
        existing: All files at the fork, by name.
        num_listed: Files that it holds in all; `MAX_LISTED` where it holds more than anybody should look at.
    """

    fork: str
    added: tuple[Listed, ...]
    deleted: tuple[str, ...]
    existing: Mapping[str, Listed]
    num_listed: int

    @property
    def is_too_large(self) -> bool:
        """Whether not even all names were read."""
        return self.num_listed >= MAX_LISTED


def parse_reference(reference: str) -> tuple[str, int]:
    """`OWNER/NAME#3` as repo and number.

    Raises:
        ConfigError: If it is none.
    """
    found = _REFERENCE.fullmatch(reference)
    if found is None:
        raise ConfigError(f"{reference!r} is no pull request; expected OWNER/NAME#NUMBER, such as alice/base#3.")
    return found["repo"], int(found["number"])


@contextmanager
def describing(api: HfApi, what: str) -> Iterator[None]:
    """Turns what the client says of a refusal or a broken connection into one sentence about `what`.

    Raises:
        HubError: With that sentence.
    """
    try:
        yield
    except GatedRepoError as error:
        raise HubError(f"{what} is gated; ask for access on its page, then run `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{what} is not on {api.endpoint}: it was deleted or renamed, or it is private and needs `hf auth login`."
        ) from error
    except HfHubHTTPError as error:
        raise HubError(f"{what}: {_explain(error)}") from error
    except (httpx2.HTTPError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise HubError(f"{what}: {api.endpoint} cannot be reached ({error or type(error).__name__}).") from error


def fetch_pull_request(api: HfApi, repo: str, number: int) -> PullRequest:
    """A pull request with its head and everything said in it.

    Raises:
        HubError: If there is none of this number, or the Hub refuses.
    """
    with describing(api, f"{repo}#{number}"):
        details = api.get_discussion_details(repo, number)
        if not details.is_pull_request:
            raise HubError(f"{repo}#{number} is a discussion and no pull request.")
        # without its card, which may have keys that the client cannot read, such as `self`
        head = api.model_info(repo, revision=f"refs/pr/{number}", expand=["sha"]).sha
    comments = tuple(
        Comment(event.id, event.author, event.content)
        for event in details.events
        if isinstance(event, DiscussionComment) and not event.hidden
    )
    return PullRequest(repo, number, details.title, details.author, details.status, str(head), comments)


def list_open(api: HfApi, repo: str) -> list[int]:
    """The numbers of the open pull requests, oldest first.

    Raises:
        HubError: If the Hub refuses.
    """
    with describing(api, repo):
        found = api.get_repo_discussions(repo, discussion_type="pull_request", discussion_status="open")
        return sorted(each.num for each in found if each.is_pull_request and each.status == "open")


def list_files(api: HfApi, repo: str, revision: str) -> dict[str, Listed]:
    """The files of a repo by name, at most `MAX_LISTED` of them; reads names and sizes only.

    Raises:
        HubError: If the Hub refuses.
    """
    with describing(api, repo):
        entries = islice(api.list_repo_tree(repo, recursive=True, revision=revision), MAX_LISTED)
        return {
            entry.path: Listed(entry.path, entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
            for entry in entries
            if isinstance(entry, RepoFile)
        }


def list_history(api: HfApi, repo: str, revision: str = "main") -> list[str]:
    """Commits, newest first.

    Raises:
        HubError: If the Hub refuses.
    """
    with describing(api, repo):
        return [commit.commit_id for commit in api.list_repo_commits(repo, revision=revision)]


def read_proposal(api: HfApi, pull_request: PullRequest) -> Proposal:
    """What the pull request's head changes; reads names and sizes only.

    Raises:
        HubError: If it shares no commit with main, or the Hub refuses.
    """
    repo = pull_request.repo
    of_main = set(list_history(api, repo))
    fork = next((each for each in list_history(api, repo, pull_request.head) if each in of_main), None)
    if fork is None:
        raise HubError(f"{pull_request} shares no commit with main, so nothing says what it changes.")
    before, after = list_files(api, repo, fork), list_files(api, repo, pull_request.head)
    added = [each for path, each in after.items() if path not in before or before[path].blob != each.blob]
    return Proposal(fork, tuple(added), tuple(sorted(before.keys() - after.keys())), before, len(after))


def read_bytes(api: HfApi, repo: str, path: str, *, revision: str, count: int) -> bytes:
    """The first `count` bytes of a file, or all if it has less; no more than that crosses the network.

    Raises:
        HubError: If the Hub refuses, or there is no such file.
    """
    url = hf_hub_url(repo, path, revision=revision, endpoint=api.endpoint)
    headers = build_hf_headers(token=api.token) | {"Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    found = b""
    with describing(api, f"{repo}/{path}"), get_session().stream("GET", url, headers=headers) as response:
        hf_raise_for_status(response)
        for piece in response.iter_bytes(1 << 16):
            found += piece
            if len(found) >= count:
                break
    return found[:count]


def _explain(error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else None
    if isinstance(error, EntryNotFoundError):
        return "there is no such file."
    said = (error.server_message or str(error)).strip().splitlines()[0].rstrip(".")
    reasons = {
        401: "you are not logged in, or your token is not valid any more; run `hf auth login`",
        403: "you may not do this; it takes a token that may write to it",
        404: "it is not there",
    }
    return f"{reasons.get(status or 0, 'the Hub refused')} ({said})."
