"""Who am I, and who are others."""

from typing import Any

from starlette.responses import JSONResponse, Response

from .calls import Call, route


def whoami(call: Call) -> Response:
    """`GET /api/whoami-v2`."""
    who = call.identity
    orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in call.store.accounts.orgs(who.user)]
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
    row = call.store.accounts.find(call.param("user"))
    counts = {
        f"num{kind.capitalize()}s": sum(
            repo.id.owner.lower() == row["name"].lower() for repo in call.store.repos.visible(kind, call.who)
        )
        for kind in ("model", "dataset", "space")
    }
    names = {"name": row["name"], "user": row["name"], "fullname": row["fullname"], "type": row["kind"]}
    return JSONResponse(names | counts | {"avatarUrl": "", "createdAt": row["created_at"]})


def harnesses(_: Call) -> Response:
    """`GET /api/agent-harnesses`: the `hf` command asks for it at every start."""
    return JSONResponse({"harnesses": {}})


def nothing(_: Call) -> Response:
    """An empty yes, for telemetry that is neither wanted nor kept."""
    return Response(status_code=200)


ROUTES = [
    route("/api/whoami-v2", whoami),
    route("/api/users/{user}/overview", overview),
    route("/api/organizations/{user}/overview", overview),
    route("/api/agent-harnesses", harnesses),
    route("/api/telemetry/{rest:path}", nothing),
]
