"""Branches, tags, history and squashing."""

from datetime import UTC, datetime
from itertools import islice
from typing import Any

from starlette.responses import JSONResponse, Response

from .calls import Call, route
from .store.git import LogEntry

_COMMITS_PER_PAGE = 50


def list_refs(call: Call) -> Response:
    """`GET /api/{kind}s/{id}/refs`; `converts` is there because the client insists on it."""
    with call.store.repos.open(call.repo_to_read()) as git:
        found = {
            "branches": _describe_refs("refs/heads/", git.list_refs("refs/heads/")),
            "tags": _describe_refs("refs/tags/", git.list_refs("refs/tags/")),
            "converts": _describe_refs("refs/convert/", git.list_refs("refs/convert/")),
        }
        if call.flag("include_prs"):
            found["pullRequests"] = _describe_refs("refs/pr/", git.list_refs("refs/pr/"))
    return JSONResponse(found)


def list_commits(call: Call) -> Response:
    """`GET /api/{kind}s/{id}/commits/{rev}`, 50 on a page."""
    page = call.number("p", 0, most=10**6)
    size = max(1, call.number("limit", _COMMITS_PER_PAGE, most=1000))
    with call.store.repos.open(call.repo_to_read()) as git:
        entries = list(islice(git.log(git.resolve(call.param("rev"))), page * size, None))
    is_formatted = "formatted" in call.words("expand")
    headers = {"X-Total-Count": str(page * size + len(entries))}
    if len(entries) > size:
        following = call.request.url.include_query_params(p=page + 1)
        headers["Link"] = f'<{following}>; rel="next"'
    return JSONResponse([describe_commit(entry, is_formatted) for entry in entries[:size]], headers=headers)


def create_branch(call: Call) -> Response:
    """`POST /api/{kind}s/{id}/branch/{branch}`."""
    repo, fields = call.repo_to_write(), call.json()
    call.store.commits.create_branch(
        repo, call.param("branch"), start=call.text(fields, "startingPoint", "main") or "main"
    )
    return JSONResponse({"success": True}, status_code=201)


def delete_branch(call: Call) -> Response:
    """`DELETE /api/{kind}s/{id}/branch/{branch}`."""
    call.store.commits.delete_ref(call.repo_to_write(), f"refs/heads/{call.param('branch')}")
    return JSONResponse({"success": True})


def create_tag(call: Call) -> Response:
    """`POST /api/{kind}s/{id}/tag/{rev}`."""
    repo, fields = call.repo_to_write(), call.json()
    call.store.commits.create_tag(
        repo,
        call.text(fields, "tag"),
        at=call.param("rev"),
        who=call.identity,
        message=call.text(fields, "message", ""),
    )
    return JSONResponse({"success": True}, status_code=201)


def delete_tag(call: Call) -> Response:
    """`DELETE /api/{kind}s/{id}/tag/{tag}`."""
    call.store.commits.delete_ref(call.repo_to_write(), f"refs/tags/{call.param('rev')}")
    return JSONResponse({"success": True})


def squash(call: Call) -> Response:
    """`POST /api/{kind}s/{id}/super-squash/{branch}`."""
    repo, fields = call.repo_to_write(), call.json()
    message = call.text(fields, "message", "")
    commit = call.store.commits.squash(repo, branch=call.param("branch"), who=call.identity, message=message)
    return JSONResponse({"success": True, "commitOid": commit})


def describe_commit(entry: LogEntry, is_formatted: bool = False) -> dict[str, Any]:
    """A commit as the Hub's API shows it."""
    title, _, rest = entry.message.partition("\n")
    shown: dict[str, Any] = {"id": entry.oid, "title": title, "message": rest.strip(), "date": format_date(entry)}
    shown["authors"] = [{"user": entry.author, "avatar": ""}]
    if is_formatted:
        shown["formatted"] = {"title": _escape(title), "message": _escape(rest.strip())}
    return shown


def format_date(entry: LogEntry) -> str:
    """When a commit was made, in the Hub's spelling."""
    return datetime.fromtimestamp(entry.date_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _describe_refs(prefix: str, refs: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "ref": prefix + name, "targetCommit": commit} for name, commit in refs.items()]


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


_REPO = "/api/{kinds:kinds}/{owner}/{name}"
ROUTES = [
    route(f"{_REPO}/refs", list_refs),
    route(f"{_REPO}/commits/{{rev}}", list_commits),
    route(f"{_REPO}/branch/{{branch}}", create_branch, "POST"),
    route(f"{_REPO}/branch/{{branch}}", delete_branch, "DELETE"),
    route(f"{_REPO}/tag/{{rev}}", create_tag, "POST"),
    route(f"{_REPO}/tag/{{rev}}", delete_tag, "DELETE"),
    route(f"{_REPO}/super-squash/{{branch}}", squash, "POST"),
]
