"""The part of the Xet protocol by which clients with hf_xet upload. They download over plain HTTP like all others.

The routes of version 2, the global search for chunks and xorb grants answer 404; the client then does without.
"""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .calls import Call, route
from .signing import read_signed, sign
from .store.errors import TooLargeError, UnauthenticatedError
from .store.xet import MAX_SHARD_BYTES

_LIFE_S = 3600


def give_write_token(call: Call) -> Response:
    """`GET /api/{kind}s/{id}/xet-write-token/{rev}`: the client reads the headers, hf_xet the JSON."""
    repo, until = call.repo_to_contribute(), int(time.time()) + _LIFE_S
    token = sign(call.store.secret, "xet", {"repo": repo.uid}, life_s=_LIFE_S)
    url = f"{call.base_url}/xet"
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(until)}
    return JSONResponse({"casUrl": url, "accessToken": token, "exp": until}, headers=headers)


def add_xorb(call: Call) -> Response:
    """`POST /xet/v1/xorbs/{prefix}/{hash}`."""
    return JSONResponse({"was_inserted": call.store.xet.add_xorb(call.param("hash"), call.body)})


def add_shard(call: Call) -> Response:
    """`POST /xet/v1/shards`: when this answers, every file of the shard is whole and can be committed."""
    fields = _read_token(call.request)
    shard = call.body.read(MAX_SHARD_BYTES + 1)
    if len(shard) > MAX_SHARD_BYTES:
        raise TooLargeError(f"A shard has at most {MAX_SHARD_BYTES} bytes.")
    call.store.xet.add_shard(fields["repo"], shard)
    return JSONResponse({"result": 1})


def _check_token(request: Request) -> None:
    _read_token(request)


def _read_token(request: Request) -> dict[str, Any]:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise UnauthenticatedError("This needs a token from xet-write-token.")
    return read_signed(request.app.state.store.secret, "xet", token.strip())


ROUTES = [
    route("/api/{kinds:kinds}/{owner}/{name}/xet-write-token/{rev}", give_write_token),
    route("/xet/v1/xorbs/{prefix}/{hash}", add_xorb, "POST", identify=_check_token),
    route("/xet/v1/shards", add_shard, "POST", identify=_check_token),
]
