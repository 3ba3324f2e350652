"""One's own pull request with a contribution: found again by its mark, opened as a draft, finished when it is whole."""

import re

from huggingface_hub import HfApi

from ..errors import ConfigError, HubError
from .contributions import OPEN, PATCHES_FOLDER
from .marks import ContributionMark, read_mark
from .pull_requests import PullRequest, describing, fetch_pull_request

MAX_DESCRIPTION = 60_000
"""Characters of a description; a Hub takes 65,536."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def check_name(name: str) -> str:
    """`name` if it may be that of a contribution, which becomes a folder of `patches/`.

    Raises:
        ConfigError: If it may not.
    """
    if not _NAME.fullmatch(name) or ".." in name or name.endswith((".", ".git", ".lock")):
        raise ConfigError(
            f"{name!r} is no name for a patch; use letters, digits, '.', '_' and '-', such as --as law-experts."
        )
    return name


def find_proposals(api: HfApi, repo: str, name: str, *, user: str) -> list[PullRequest]:
    """The open pull requests, drafts among them, that bring a patch of this name, oldest first.

    Those of others are looked at only where their title has the name in it, since each takes a question to the Hub.

    Raises:
        HubError: If the Hub refuses or cannot be reached.
    """
    with describing(api, repo):
        found = [
            each
            for each in api.get_repo_discussions(repo, discussion_type="pull_request")
            if each.is_pull_request and each.status in OPEN
        ]
    numbers = sorted(each.num for each in found if each.author == user or name in each.title)
    proposals = [fetch_pull_request(api, repo, number) for number in numbers]
    return [each for each in proposals if (mark := read_mark(ContributionMark, each.description)) and mark.name == name]


def open_draft(api: HfApi, repo: str, *, title: str, description: str) -> PullRequest:
    """A new pull request that nobody can merge yet; its description carries the mark from its first moment on.

    Raises:
        HubError: If the Hub refuses or cannot be reached.
    """
    with describing(api, repo):
        number = api.create_pull_request(repo, title, description=description).num
    return fetch_pull_request(api, repo, number)


def finish(api: HfApi, proposal: PullRequest, *, title: str, description: str) -> None:
    """Bring title and description up to date, and open what is a draft, now that it is whole.

    Raises:
        HubError: If the Hub refuses or cannot be reached.
    """
    repo, number = proposal.repo, proposal.number
    with describing(api, str(proposal)):
        if not proposal.comments:
            raise HubError(f"{proposal} has no description any more that could be brought up to date.")
        if proposal.description.strip() != description.strip():
            api.edit_discussion_comment(repo, number, proposal.comments[0].id, description)
        if proposal.title != title:
            api.rename_discussion(repo, number, title)
        if proposal.status == "draft":
            api.change_discussion_status(repo, number, "open")


def shorten(text: str, mark: str) -> str:
    """A description that a Hub takes: cut at the end of a line where it is too long, with its mark at the end."""
    if len(text) + len(mark) > MAX_DESCRIPTION:
        text = text[: MAX_DESCRIPTION - len(mark) - 100].rpartition("\n")[0]
        text += f"\n\nThe rest is in the files below `{PATCHES_FOLDER}/`."
    return f"{text}\n\n{mark}"
