"""Open pull requests at another Hub: same commits, and what people said, as text that names who said it.

On huggingface.co a pull request made by the client is a draft, and its author may push to refs/pr/N
(https://huggingface.co/docs/hub/repositories-pull-requests-discussions); that could not be tried here.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from huggingface_hub import DiscussionComment, DiscussionStatusChange, DiscussionWithDetails

from .mirror_address import RepoAddress, Side

_OPEN = ("open", "draft")
_MENTION = re.compile(r"@(?=[A-Za-z0-9])")
_MARK = re.compile(r"<!-- hub-moe mirror: (\S+) -->\s*$")
_MAX_TEXT = 60_000


@dataclass(frozen=True)
class PullRequestPlan:
    """A pull request of SRC (`source` None: it is closed there by now) and its copy at DST, if there is one already."""

    number: int
    source: DiscussionWithDetails | None
    copy: DiscussionWithDetails | None

    @property
    def is_left_alone(self) -> bool:
        """Whether the copy was merged or closed by people at DST: then it is theirs."""
        if self.copy is None or self.copy.status in _OPEN:
            return False
        changes = [event for event in self.copy.events if isinstance(event, DiscussionStatusChange)]
        return self.copy.status == "merged" or not changes or changes[-1].author != self.copy.author


class PullRequests:
    """The open pull requests of one repo at SRC, and their copies at DST."""

    def __init__(self, source: tuple[Side, RepoAddress], target: tuple[Side, RepoAddress]) -> None:
        self._source_side, self._source = source
        self._target_side, self._target = target

    def list_open(self) -> dict[int, str]:
        """The pull requests that are open or drafts at SRC: each number with the commit it proposes."""
        api, repo_id, kind = self._source_side.api, self._source.repo_id, self._source.kind
        found = api.get_repo_discussions(repo_id, discussion_type="pull_request", repo_type=kind)
        numbers = sorted(one.num for one in found if one.is_pull_request and one.status in _OPEN)
        if not numbers:
            return {}
        refs = api.list_repo_refs(repo_id, repo_type=kind, include_pull_requests=True).pull_requests or []
        heads = {ref.ref: ref.target_commit for ref in refs}
        return {number: heads[f"refs/pr/{number}"] for number in numbers if f"refs/pr/{number}" in heads}

    def plan(self, numbers: Iterable[int], *, is_target_new: bool) -> list[PullRequestPlan]:
        """What is to be done for each: those that are open at SRC, and copies of those that are not any more."""
        copies = {} if is_target_new else self._find_copies()
        plans = [PullRequestPlan(number, self._read_source(number), copies.pop(number, None)) for number in numbers]
        plans += [PullRequestPlan(number, None, copy) for number, copy in copies.items() if copy.status in _OPEN]
        return plans

    def create(self, plan: PullRequestPlan) -> int:
        """The number of the copy at DST, made as a draft, or opened again, so that it takes commits."""
        api, repo_id, kind = self._target_side.api, self._target.repo_id, self._target.kind
        if plan.copy is None:
            assert plan.source is not None
            text = self._describe(plan.source)
            return int(api.create_pull_request(repo_id, plan.source.title, description=text, repo_type=kind).num)
        if plan.source is not None and plan.copy.status == "closed":
            api.change_discussion_status(repo_id, plan.copy.num, "open", repo_type=kind)
        return plan.copy.num

    def is_outdated(self, plan: PullRequestPlan) -> bool:
        """Whether `create` or `finish` has anything to do."""
        if plan.copy is None or plan.source is None:
            return True
        is_shut = plan.copy.status != "open" and plan.source.status == "open"
        return is_shut or plan.copy.title != plan.source.title or bool(self._find_changes(plan.source, plan.copy))

    def finish(self, plan: PullRequestPlan, number: int) -> None:
        """After the commits were pushed: bring title, description, comments and status up to date."""
        api, repo_id, kind = self._target_side.api, self._target.repo_id, self._target.kind
        copy = api.get_discussion_details(repo_id, number, repo_type=kind)
        if plan.source is None:
            text = f"The pull request that this one mirrors is not open any more: {self._url(plan.number)}"
            api.change_discussion_status(repo_id, number, "closed", comment=text, repo_type=kind)
            return
        if copy.title != plan.source.title:
            api.rename_discussion(repo_id, number, plan.source.title, repo_type=kind)
        for present, text in self._find_changes(plan.source, copy):
            if present is None:
                api.comment_discussion(repo_id, number, text, repo_type=kind)
            else:
                api.edit_discussion_comment(repo_id, number, present.id, text, repo_type=kind)
        if copy.status != "open" and plan.source.status == "open":
            api.change_discussion_status(repo_id, number, "open", repo_type=kind)

    def _find_changes(
        self, source: DiscussionWithDetails, copy: DiscussionWithDetails
    ) -> list[tuple[DiscussionComment | None, str]]:
        """Each text that the copy lacks, with the comment that holds an older state of it."""
        there = {mark: event for event in _comments(copy) if (mark := _read_mark(event))}
        wanted = {_mark(source): self._describe(source)}
        for one in _comments(source)[1:]:
            if not one.hidden:
                wanted[_mark(source, one.id)] = self._quote(one, source)
        return [
            (there.get(mark), text)
            for mark, text in wanted.items()
            if mark not in there or there[mark].content.strip() != text.strip() and not there[mark].hidden
        ]

    def _find_copies(self) -> dict[int, DiscussionWithDetails]:
        """By the mark in its description; only in pull requests of our own, since anybody can write a mark."""
        api, repo_id, kind = self._target_side.api, self._target.repo_id, self._target.kind
        me = api.whoami()["name"]
        found: dict[int, DiscussionWithDetails] = {}
        for one in api.get_repo_discussions(repo_id, author=me, discussion_type="pull_request", repo_type=kind):
            if one.author != me or not one.is_pull_request:
                continue
            details = api.get_discussion_details(repo_id, one.num, repo_type=kind)
            mark = next((_read_mark(event) for event in _comments(details)), None) or ""
            number = mark.removeprefix("#").partition("@")[0]
            if number.isdigit():
                found.setdefault(int(number), details)
        return found

    def _read_source(self, number: int) -> DiscussionWithDetails:
        found: DiscussionWithDetails = self._source_side.api.get_discussion_details(
            self._source.repo_id, number, repo_type=self._source.kind
        )
        return found

    def _describe(self, source: DiscussionWithDetails) -> str:
        first = next(iter(_comments(source)), None)
        head = f"*Mirrored from {self._url(source.num)}, opened by {source.author} on {source.created_at:%Y-%m-%d}.*"
        return _join(head, first.content if first and not first.hidden else "", _mark(source))

    def _quote(self, comment: DiscussionComment, source: DiscussionWithDetails) -> str:
        head = f"*{comment.author} wrote on {comment.created_at:%Y-%m-%d %H:%M} UTC at {self._url(source.num)}:*"
        return _join(head, comment.content, _mark(source, comment.id))

    def _url(self, number: int) -> str:
        return f"{self._source}/discussions/{number}"


def _mark(source: DiscussionWithDetails, comment: str = "") -> str:
    """By number and time, not by address: a Hub may move to another port or host."""
    return f"#{source.num}@{source.created_at:%Y-%m-%dT%H:%M:%S.%f}" + (f"/{comment}" if comment else "")


def _comments(discussion: DiscussionWithDetails) -> list[DiscussionComment]:
    return [event for event in discussion.events if isinstance(event, DiscussionComment)]


def _read_mark(comment: DiscussionComment) -> str | None:
    match = _MARK.search(comment.content)
    return match.group(1) if match else None


def _join(head: str, text: str, mark: str) -> str:
    """Names with `@` get a word joiner, so that a copy calls nobody; a text that carries a mark loses it."""
    quiet = _MENTION.sub("@\u2060", _MARK.sub("", text))[:_MAX_TEXT]
    return f"{head}\n\n{quiet}\n\n<!-- hub-moe mirror: {mark} -->"
