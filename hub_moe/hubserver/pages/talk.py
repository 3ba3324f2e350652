"""The community tab: discussions and pull requests, and the forms that change them."""

from typing import Any

from markupsafe import Markup
from starlette.responses import RedirectResponse, Response

from ..calls import Call
from ..discussions import find_discussion
from ..sessions import read_own_form
from ..store import GitRepo, Repo
from ..store.diffs import diff_commits
from ..store.discussions import CLOSED, OPEN, Discussion, Event, check_title
from ..store.errors import InvalidInputError, NotFoundError
from ..store.merges import find_conflicts, find_range
from .contribution import read_contribution
from .diffs import ShownDiff, lay_out
from .markdown import Place, render_markdown
from .repo import repo_routes, show_repo_page
from .urls import repo_url

_PER_PAGE = 30
_STATUSES: dict[str, tuple[str, ...]] = {"open": OPEN, "closed": CLOSED, "all": ()}
_TYPES = {"all": None, "discussion": False, "pull_request": True}
_MAX_EVENTS = 500
_MAX_RENDERED = 400_000


def show_discussions(call: Call) -> Response:
    """`GET /{id}/discussions`."""
    repo, query = call.repo_to_read(), call.request.query_params
    status = query.get("status", "open") if query.get("status") in _STATUSES else "open"
    kind = query.get("type", "all") if query.get("type") in _TYPES else "all"
    everything = call.store.discussions.list_all(repo, is_pull_request=_TYPES[kind])
    counts = {name: sum(not group or one.status in group for one in everything) for name, group in _STATUSES.items()}
    found = [one for one in everything if not _STATUSES[status] or one.status in _STATUSES[status]]
    page = max(1, call.number("p", 1, most=10**6))
    return show_repo_page(
        call,
        repo,
        "discussions.html",
        tab="community",
        discussions=found[(page - 1) * _PER_PAGE : page * _PER_PAGE],
        counts=counts,
        status=status,
        type=kind,
        page=page,
        pages=-(-len(found) // _PER_PAGE),
    )


def show_discussion(call: Call) -> Response:
    """`GET /{id}/discussions/{num}`."""
    repo = call.repo_to_read()
    discussion = find_discussion(call, repo)
    events = call.store.discussions.events(repo, discussion)
    may_control = call.who is not None and call.store.discussions.may_control(repo, discussion, call.who)
    return show_repo_page(
        call,
        repo,
        "discussion.html",
        tab="community",
        discussion=discussion,
        events=events[:_MAX_EVENTS],
        more_events=max(0, len(events) - _MAX_EVENTS),
        comments=_render(events[:_MAX_EVENTS], Place(repo.id, "main", origin=call.base_url)),
        may_control=may_control,
        **_read_changes(call, repo, discussion, events),
    )


def create(call: Call) -> Response:
    """`POST /{id}/discussions`: a new discussion."""
    fields = read_own_form(call)
    repo = call.repo_to_contribute()
    title = check_title(fields.get("title", ""))
    description = fields.get("description", "").strip() or "No description."
    num = call.store.repos.next_number(repo)
    call.store.discussions.create(repo, call.identity, num=num, title=title, description=description)
    return RedirectResponse(repo_url(repo.id, "discussions", str(num)), status_code=303)


def answer(call: Call) -> Response:
    """`POST /{id}/discussions/{num}`: comment, close, open, or both at once; or a new title."""
    fields = read_own_form(call)
    repo = call.repo_to_contribute()
    discussion = find_discussion(call, repo)
    text, status, title = (fields.get(name, "") for name in ("comment", "status", "title"))
    if not (text.strip() or status or title):
        raise InvalidInputError("Write something first.")
    comment = text if text.strip() else None
    call.store.discussions.change(
        repo, discussion, call.identity, title=title or None, comment=comment, status=status or None
    )
    return _back(repo, discussion)


def hide(call: Call) -> Response:
    """`POST /{id}/discussions/{num}/hide/{comment}`."""
    read_own_form(call)
    repo = call.repo_to_contribute()
    discussion = find_discussion(call, repo)
    call.store.discussions.hide_comment(repo, discussion, call.identity, call.param("comment"))
    return _back(repo, discussion)


def merge(call: Call) -> Response:
    """`POST /{id}/discussions/{num}/merge`: for who may write to the repo."""
    read_own_form(call)
    repo = call.repo_to_write()
    discussion = find_discussion(call, repo)
    call.store.merges.merge(repo, discussion, call.identity)
    return _back(repo, discussion)


def _back(repo: Repo, discussion: Discussion) -> Response:
    return RedirectResponse(repo_url(repo.id, "discussions", str(discussion.num)), status_code=303)


def _render(events: list[Event], place: Place) -> dict[str, Markup]:
    """The comments that are not hidden, by id; as they were written once there is more than a page can render."""
    shown, left = {}, _MAX_RENDERED
    for event in events:
        if event.type == "comment" and not event.data["hidden"]:
            text = event.data["latest"]["raw"]
            left -= len(text)
            shown[event.id] = render_markdown(text, place) if left >= 0 else Markup("<pre>{}</pre>").format(text)
    return shown


def _read_changes(call: Call, repo: Repo, discussion: Discussion, events: list[Event]) -> dict[str, Any]:
    """The diff of a pull request, the files in conflict and the expert patches; none of it when its ref was deleted."""
    found: dict[str, Any] = {"diff": None, "conflicts": [], "head": None, "contribution": {}}
    if discussion.is_pull_request:
        with call.store.repos.open(repo) as git:
            try:
                found |= {"diff": _read_diff(call, git, discussion), "head": git.resolve(discussion.ref)}
                found["conflicts"] = find_conflicts(git, discussion) if discussion.status in OPEN else []
                found["contribution"] = read_contribution(call.store, repo, git, discussion=discussion, events=events)
            except NotFoundError:
                return found
    return found


def _read_diff(call: Call, git: GitRepo, discussion: Discussion) -> ShownDiff:
    return lay_out(call.store, git, diff_commits(git, *find_range(git, discussion)))


ROUTES = [
    *repo_routes("/discussions", show_discussions),
    *repo_routes("/discussions", create, "POST"),
    *repo_routes("/discussions/{num}", show_discussion),
    *repo_routes("/discussions/{num}", answer, "POST"),
    *repo_routes("/discussions/{num}/merge", merge, "POST"),
    *repo_routes("/discussions/{num}/hide/{comment}", hide, "POST"),
]
