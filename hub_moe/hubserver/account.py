"""Who am I, who are others, and who likes what."""

from sqlite3 import Row
from typing import Any

from starlette.responses import JSONResponse, Response

from .calls import Call, route
from .store.errors import ForbiddenError
from .store.names import KINDS


def whoami(call: Call) -> Response:
    """`GET /api/whoami-v2`."""
    who = call.identity
    orgs = [_describe_org(call, name) | {"roleInOrg": role} for name, role in call.store.accounts.orgs(who.user)]
    token = {"displayName": who.token_name, "role": who.token_role, "createdAt": who.token_created_at}
    answer: dict[str, Any] = {"type": "user", "id": who.user, "name": who.user, "fullname": who.fullname}
    answer |= {
        "email": who.email,
        "emailVerified": bool(who.email),
        "canPay": False,
        "isPro": False,
        "avatarUrl": "",
        "orgs": orgs,
    }
    return JSONResponse(answer | {"auth": {"type": "access_token", "accessToken": token}})


def overview(call: Call) -> Response:
    """`GET /api/users/{user}/overview`, and the same of an organisation."""
    row = _find(call)
    counts = {
        f"num{kind.capitalize()}s": sum(
            repo.id.owner.lower() == row["name"].lower() for repo in call.store.repos.visible(kind, call.who)
        )
        for kind in KINDS
    }
    names = {"name": row["name"], "user": row["name"], "fullname": row["fullname"], "type": row["kind"]}
    orgs = [_describe_org(call, name) for name, _ in call.store.accounts.orgs(row["name"])]
    people = {"numFollowers": 0, "numFollowing": 0, "isFollowing": False, "orgs": orgs}
    if row["kind"] == "org":
        people = {"numFollowers": 0, "isFollowing": False, "numUsers": len(call.store.accounts.members(row["name"]))}
    return JSONResponse(names | counts | people | {"avatarUrl": "", "createdAt": row["created_at"]})


def list_members(call: Call) -> Response:
    """`GET /api/organizations/{user}/members`."""
    return JSONResponse([_describe_user(*member) for member in call.store.accounts.members(_find(call)["name"])])


def list_nobody(call: Call) -> Response:
    """Who follows whom: nobody does here."""
    _find(call)
    return JSONResponse([])


def like(call: Call) -> Response:
    """`POST|DELETE /api/{kind}s/{id}/like`."""
    repo = call.repo()
    change = call.store.likes.unlike if call.request.method == "DELETE" else call.store.likes.like
    change(repo, call.identity)
    return JSONResponse({"success": True})


def list_likers(call: Call) -> Response:
    """`GET /api/{kind}s/{id}/likers`."""
    return JSONResponse([_describe_user(*liker) for liker in call.store.likes.likers(call.repo())])


def list_likes(call: Call) -> Response:
    """`GET /api/users/{user}/likes`: those of the liked repos that the caller may see."""
    liked = call.store.likes.liked_by(_find(call)["name"])
    repos = {repo.uid: repo for kind in KINDS for repo in call.store.repos.visible(kind, call.who)}
    return JSONResponse(
        [
            {"createdAt": since, "repo": {"name": str(repos[uid].id), "type": repos[uid].id.kind}}
            for uid, since in liked.items()
            if uid in repos
        ]
    )


def list_own_repos(call: Call) -> Response:
    """`GET /api/settings/repositories`, or of an organisation for its members: each repo with the room it takes."""
    owner = call.identity.user
    if "user" in call.request.path_params:
        owner = _find(call)["name"]
        if call.store.accounts.role_in(owner, call.identity.user) is None:
            raise ForbiddenError(f"You are not a member of {owner}.")
    repos = [repo for repo in call.store.repos.all() if repo.id.owner.lower() == owner.lower()]
    sizes = [call.store.large_files.stored_bytes(repo) for repo in repos]
    total = sum(sizes)
    return JSONResponse(
        [
            {
                "id": str(repo.id),
                "type": repo.id.kind,
                "updatedAt": repo.modified_at,
                "visibility": "private" if repo.private else "public",
                "storage": size,
                "storagePercent": round(100 * size / total, 2) if total else 0,
            }
            for repo, size in zip(repos, sizes, strict=True)
        ]
    )


def harnesses(_: Call) -> Response:
    """`GET /api/agent-harnesses`: the `hf` command asks for it at every start."""
    return JSONResponse({"harnesses": {}})


def nothing(_: Call) -> Response:
    """An empty yes, for telemetry that is neither wanted nor kept."""
    return Response(status_code=200)


def _find(call: Call) -> Row:
    return call.store.accounts.find(call.param("user"))


def _describe_user(name: str, fullname: str) -> dict[str, Any]:
    return {"_id": name, "user": name, "fullname": fullname, "avatarUrl": "", "type": "user", "isPro": False}


def _describe_org(call: Call, name: str) -> dict[str, Any]:
    return {"type": "org", "name": name, "fullname": call.store.accounts.find(name)["fullname"], "avatarUrl": ""}


_REPO = "/api/{kinds:kinds}/{owner}/{name}"
ROUTES = [
    route("/api/whoami-v2", whoami),
    route("/api/users/{user}/overview", overview),
    route("/api/organizations/{user}/overview", overview),
    route("/api/organizations/{user}/members", list_members),
    route("/api/organizations/{user}/followers", list_nobody),
    route("/api/users/{user}/followers", list_nobody),
    route("/api/users/{user}/following", list_nobody),
    route("/api/users/{user}/likes", list_likes),
    route("/api/settings/repositories", list_own_repos),
    route("/api/organizations/{user}/settings/repositories", list_own_repos),
    route(f"{_REPO}/like", like, "POST", "DELETE"),
    route(f"{_REPO}/likers", list_likers),
    route("/api/agent-harnesses", harnesses),
    route("/api/telemetry/{rest:path}", nothing),
]
