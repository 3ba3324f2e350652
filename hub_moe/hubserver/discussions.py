"""Discussions and pull requests over HTTP."""

from typing import Any

from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from .calls import Call, route
from .downloads import SAFE_HEADERS
from .store.discussions import CLOSED, OPEN, Discussion, Event, check_comment, check_title
from .store.errors import ForbiddenError, InvalidInputError, NotFoundError
from .store.merges import find_conflicts, render_diff
from .store.repos import Repo

_PER_PAGE = 50
_STATUSES: dict[str, tuple[str, ...]] = {"": (), "all": (), "open": OPEN, "closed": CLOSED}
_TYPES = {"": None, "all": None, "discussion": False, "pull_request": True}


def list_discussions(call: Call) -> Response:
    """`GET /api/{kind}s/{id}/discussions`."""
    repo, query = call.repo_to_read(), call.request.query_params
    status, kind = query.get("status", ""), query.get("type", "")
    if status not in _STATUSES or kind not in _TYPES:
        raise InvalidInputError("status is open or closed, type is discussion or pull_request.")
    found = call.store.discussions.list_all(
        repo, author=query.get("author", ""), is_pull_request=_TYPES[kind], statuses=_STATUSES[status]
    )
    start = call.number("p", 0, most=10**6) * _PER_PAGE
    shown = [_describe(repo, one) for one in found[start : start + _PER_PAGE]]
    return JSONResponse({"discussions": shown, "count": len(found), "start": start})


def create(call: Call) -> Response:
    """`POST /api/{kind}s/{id}/discussions`; a pull request made so is a draft on the target's head."""
    repo, fields = call.repo_to_contribute(), call.json()
    title = check_title(call.text(fields, "title"))
    description = check_comment(call.text(fields, "description", "").strip() or "No description.")
    num = call.store.repos.next_number(repo)
    is_pull_request = fields.get("pullRequest") is True
    if is_pull_request:
        with call.store.commits.changing(repo) as git:
            git.move_ref(f"refs/pr/{num}", old=None, new=git.resolve("refs/heads/main"))
    call.store.discussions.create(
        repo,
        call.identity,
        num=num,
        title=title,
        description=description,
        status="draft" if is_pull_request else "open",
        target="refs/heads/main" if is_pull_request else None,
    )
    return JSONResponse(
        {"num": num, "pullRequest": is_pull_request, "url": f"{call.repo_url(repo.id)}/discussions/{num}"}
    )


def show(call: Call) -> Response:
    """`GET /api/{kind}s/{id}/discussions/{num}[?diff=1]`."""
    repo = call.repo_to_read()
    discussion = find_discussion(call, repo)
    shown = _describe(repo, discussion)
    shown["events"] = [_describe_event(event) for event in call.store.discussions.events(repo, discussion)]
    if discussion.is_pull_request:
        shown["changes"] = {"base": discussion.target, "mergeCommitId": discussion.merge_commit}
        shown |= _describe_changes(call, repo, discussion)
    return JSONResponse(shown)


def comment(call: Call) -> Response:
    """`POST …/{num}/comment`."""
    repo = call.repo_to_contribute()
    discussion = find_discussion(call, repo)
    event = call.store.discussions.comment(repo, discussion, call.identity, call.text(call.json(), "comment"))
    return JSONResponse({"newMessage": _describe_event(event)})


def edit_comment(call: Call) -> Response:
    """`POST …/{num}/comment/{id}/edit`."""
    repo = call.repo_to_contribute()
    discussion = find_discussion(call, repo)
    event = call.store.discussions.edit_comment(
        repo, discussion, call.identity, call.param("comment"), call.text(call.json(), "content")
    )
    return JSONResponse({"updatedComment": _describe_event(event)})


def hide_comment(call: Call) -> Response:
    """`POST …/{num}/comment/{id}/hide`."""
    repo = call.repo_to_contribute()
    discussion = find_discussion(call, repo)
    event = call.store.discussions.hide_comment(repo, discussion, call.identity, call.param("comment"))
    return JSONResponse({"updatedComment": _describe_event(event)})


def rename(call: Call) -> Response:
    """`POST …/{num}/title`."""
    repo = call.repo_to_contribute()
    discussion = find_discussion(call, repo)
    event = call.store.discussions.rename(repo, discussion, call.identity, call.text(call.json(), "title"))
    return JSONResponse({"newTitle": _describe_event(event)})


def change_status(call: Call) -> Response:
    """`POST …/{num}/status`."""
    repo = call.repo_to_contribute()
    discussion = find_discussion(call, repo)
    fields = call.json()
    status, text = call.text(fields, "status"), _read_comment(call, fields)
    event = call.store.discussions.change_status(repo, discussion, call.identity, status, comment=text)
    return JSONResponse({"newStatus": _describe_event(event)})


def merge(call: Call) -> Response:
    """`POST …/{num}/merge`: for who may write to the repo."""
    repo = call.repo_to_write()
    discussion = find_discussion(call, repo)
    text = _read_comment(call, call.json_or_null())
    commit = call.store.merges.merge(repo, discussion, call.identity)
    if text:
        call.store.discussions.comment(repo, discussion, call.identity, text)
    return JSONResponse({"success": True, "mergeCommitId": commit})


def attach(call: Call) -> Response:
    """`POST /uploads`: keep a picture, video or sound to show in a comment; the answer is its address as plain text."""
    if not call.identity.can_write:
        raise ForbiddenError("You have read access but not the required permissions: this token cannot write.")
    media_type = call.request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return PlainTextResponse(f"{call.base_url}/uploads/{call.store.attachments.add(call.body, media_type)}")


def show_attachment(call: Call) -> Response:
    """`GET /uploads/{name}`: for whoever has the address."""
    path, media_type = call.store.attachments.find(call.param("name"))
    return FileResponse(path, media_type=media_type, headers=SAFE_HEADERS)


def _describe_changes(call: Call, repo: Repo, discussion: Discussion) -> dict[str, Any]:
    """Conflicts and diff; neither when the branch that the pull request is for was deleted."""
    with call.store.repos.open(repo) as git:
        try:
            conflicts = find_conflicts(git, discussion) if discussion.status in OPEN else []
            return {
                "filesWithConflicts": conflicts,
                "diff": render_diff(git, discussion) if call.flag("diff") else None,
            }
        except NotFoundError:
            return {"filesWithConflicts": [], "diff": None}


def _read_comment(call: Call, fields: dict[str, Any]) -> str | None:
    """What is to be said along with a change."""
    text = call.text(fields, "comment") if fields.get("comment") else ""
    return check_comment(text) if text.strip() else None


def find_discussion(call: Call, repo: Repo) -> Discussion:
    """The discussion whose number is in the path."""
    text = call.param("num")
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise NotFoundError("discussion", f"{repo.id} has no discussion {text[:40]}.")
    return call.store.discussions.find(repo, int(text))


def _describe(repo: Repo, discussion: Discussion) -> dict[str, Any]:
    return {
        "num": discussion.num,
        "title": discussion.title,
        "status": discussion.status,
        "isPullRequest": discussion.is_pull_request,
        "createdAt": discussion.created_at,
        "author": {"name": discussion.author},
        "repo": {"name": str(repo.id), "type": repo.id.kind},
    }


def _describe_event(event: Event) -> dict[str, Any]:
    shown = {"id": event.id, "type": event.type, "createdAt": event.created_at, "author": {"name": event.author}}
    return shown | {"data": event.data}


_ALL = "/api/{kinds:kinds}/{owner}/{name}/discussions"
_ONE = f"{_ALL}/{{num}}"
ROUTES = [
    route(_ALL, list_discussions),
    route(_ALL, create, "POST"),
    route(_ONE, show),
    route(f"{_ONE}/comment", comment, "POST"),
    route(f"{_ONE}/comment/{{comment}}/edit", edit_comment, "POST"),
    route(f"{_ONE}/comment/{{comment}}/hide", hide_comment, "POST"),
    route(f"{_ONE}/title", rename, "POST"),
    route(f"{_ONE}/status", change_status, "POST"),
    route(f"{_ONE}/merge", merge, "POST"),
    route("/uploads", attach, "POST"),
    route("/uploads/{name}", show_attachment, "GET", "HEAD"),
]
