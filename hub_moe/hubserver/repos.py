"""Create, delete, move and configure repos; ask for and grant access to gated ones."""

from starlette.responses import JSONResponse, Response

from .calls import Call, route
from .store import RepoId
from .store.errors import ConflictError, InvalidInputError, NotFoundError
from .store.repos import Repo


def create(call: Call) -> Response:
    """`POST /api/repos/create`. When the repo exists, the 409 carries its url: the client reads it."""
    fields = call.json()
    repo_id = _named_repo(call, fields)
    is_private = _read_privacy(call, fields) or False
    sdk = call.text(fields, "sdk", "") or None
    try:
        repo = call.store.repos.create(repo_id, call.identity, private=is_private, sdk=sdk)
    except ConflictError as error:
        return JSONResponse({"error": str(error), "url": call.repo_url(repo_id)}, status_code=409)
    return JSONResponse({"url": call.repo_url(repo.id), "name": str(repo.id), "id": repo.uid})


def delete(call: Call) -> Response:
    """`DELETE /api/repos/delete`, with a JSON body."""
    call.store.repos.delete(_named_repo(call, call.json()), call.identity)
    return JSONResponse({"success": True})


def move(call: Call) -> Response:
    """`POST /api/repos/move`."""
    fields = call.json()
    kind = call.text(fields, "type", "model")
    source, target = (_parse_id(kind, call.text(fields, key)) for key in ("fromRepo", "toRepo"))
    call.store.repos.move(source, target, call.identity)
    return JSONResponse({"success": True, "url": call.repo_url(target)})


def duplicate(call: Call) -> Response:
    """`POST /api/{kind}s/{id}/duplicate`: a copy with its history, as private as the original unless told otherwise."""
    source, fields = call.repo_to_read(), call.json()
    target = _parse_id(source.id.kind, call.text(fields, "repository"))
    is_private = _read_privacy(call, fields)
    try:
        repo = call.store.large_files.duplicate(
            source, target, call.identity, private=source.private if is_private is None else is_private
        )
    except ConflictError as error:
        return JSONResponse({"error": str(error), "url": call.repo_url(target)}, status_code=409)
    return JSONResponse({"url": call.repo_url(repo.id), "filesCopyPending": False})


def update_settings(call: Call) -> Response:
    """`PUT /api/{kind}s/{id}/settings`."""
    fields = call.json()
    is_private = _read_privacy(call, fields)
    gated = fields.get("gated", "keep")
    call.store.repos.update(call.repo_id, call.identity, private=is_private, gated=gated)
    repo = call.repo()
    return JSONResponse({"private": repo.private, "gated": repo.gated or False})


def check_auth(call: Call) -> Response:
    """`GET /api/{kind}s/{id}/auth-check[/write]`."""
    if call.request.url.path.endswith("/write"):
        call.repo_to_write()
    else:
        call.repo_to_read()
    return JSONResponse({})


def ask_access(call: Call) -> Response:
    """`POST /api/{kind}s/{id}/ask-access`: what the button on a gated repo's page does."""
    return JSONResponse({"status": call.store.repos.ask_access(call.repo(), call.identity)})


def list_access(call: Call) -> Response:
    """`GET /api/{kind}s/{id}/user-access-request/{status}`."""
    repo, status = _gated_repo(call), call.param("status")
    requests = call.store.repos.access_requests(repo, status)
    return JSONResponse(
        [
            {"requestId": user, "user": _describe_user(call, user), "status": status, "timestamp": asked}
            for user, asked in requests
        ]
    )


def handle_access(call: Call) -> Response:
    """`POST /api/{kind}s/{id}/user-access-request/handle`: accept, reject or put back a request."""
    repo, fields = _gated_repo(call), call.json()
    user, status = call.text(fields, "requestId" if "requestId" in fields else "user"), call.text(fields, "status")
    if status not in {"pending", "accepted", "rejected"}:
        raise InvalidInputError(f"status is pending, accepted or rejected; got {status!r}.")
    if not call.store.repos.change_access(repo, user, status):
        raise NotFoundError("request", f"{user} has no request for access that is not {status} already.")
    return JSONResponse({"status": status})


def grant_access(call: Call) -> Response:
    """`POST /api/{kind}s/{id}/user-access-request/grant`: let somebody in who has not asked."""
    repo, user = _gated_repo(call), call.text(call.json(), "user")
    if not call.store.repos.add_access(repo, user, "accepted"):
        raise InvalidInputError(f"{user} has asked for access already; handle the request.")
    return JSONResponse({"status": "accepted"})


def _read_privacy(call: Call, fields: dict[str, object]) -> bool | None:
    """Whether a repo is to be private, None if nothing is said. A Space's "protected" hides files, like "private"."""
    visibility, is_private = fields.get("visibility"), fields.get("private")
    if visibility not in (None, "private", "protected", "public"):
        raise InvalidInputError(f"visibility is 'public' or 'private'; got {visibility!r}.")
    if not isinstance(is_private, bool | None):
        raise InvalidInputError("'private' must be true or false.")
    return is_private if visibility is None else visibility != "public"


def _gated_repo(call: Call) -> Repo:
    repo = call.repo_to_write()
    if not repo.gated:
        raise InvalidInputError(f"{repo.id} is not gated.")
    return repo


def _describe_user(call: Call, name: str) -> dict[str, object]:
    row = call.store.accounts.find(name)
    return {"_id": name, "user": name, "fullname": row["fullname"], "isPro": False}


def _named_repo(call: Call, fields: dict[str, object]) -> RepoId:
    name = call.text(fields, "name")
    owner = fields.get("organization") or call.identity.user
    if "/" in name:
        return _parse_id(call.text(fields, "type", "model"), name)
    if not isinstance(owner, str):
        raise InvalidInputError("'organization' must be a string.")
    return RepoId(call.text(fields, "type", "model"), owner, name)


def _parse_id(kind: str, text: str) -> RepoId:
    owner, slash, name = text.partition("/")
    if not slash:
        raise InvalidInputError(f"{text!r} is not OWNER/NAME.")
    return RepoId(kind, owner, name)


_REPO = "/api/{kinds:kinds}/{owner}/{name}"
ROUTES = [
    route("/api/repos/create", create, "POST"),
    route("/api/repos/delete", delete, "DELETE"),
    route("/api/repos/move", move, "POST"),
    route(f"{_REPO}/duplicate", duplicate, "POST"),
    route(f"{_REPO}/settings", update_settings, "PUT"),
    route(f"{_REPO}/auth-check", check_auth),
    route(f"{_REPO}/auth-check/write", check_auth),
    route(f"{_REPO}/ask-access", ask_access, "POST"),
    route(f"{_REPO}/user-access-request/handle", handle_access, "POST"),
    route(f"{_REPO}/user-access-request/grant", grant_access, "POST"),
    route(f"{_REPO}/user-access-request/{{status}}", list_access),
]
