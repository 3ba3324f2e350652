"""The Xet protocol, by which clients with hf_xet send and fetch large files (hub-docs, docs/xet/api.md).

hf_xet remembers by address which xorbs a server has, and sends them no more. So the address that goes with a token
holds a number, which changes when `hub gc` has deleted xorbs.

What came by Xet can be fetched by Xet; everything can be fetched over plain HTTP. Nobody learns here what private repos
of others hold: the search for chunks looks at what the token may read, and a grant for a xorb that this repo does not
have answers 404, upon which the client sends it.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .calls import Call, route
from .downloads import answer_part
from .permits import repo_to_contribute, repo_to_read, sign_for
from .receiving import receive
from .signing import LinkExpiredError, read_signed, sign
from .store import Store
from .store.errors import ForbiddenError, NotFoundError, StoreError, TooLargeError, UnauthenticatedError
from .store.recipes import Recipe
from .store.repos import Repo
from .store.shards import MAX_SHARD_BYTES, ShardFile, Term, parse_shard

_LIFE_S = 3600
_RANGE = re.compile(r"bytes=([0-9]{1,15})-([0-9]{1,15})")


def give_write_token(call: Call) -> Response:
    """`GET /api/{kind}s/{id}/xet-write-token/{rev}`: the client reads the headers, hf_xet the JSON."""
    return _give_token(call, call.repo_to_contribute(), "xet-write")


def give_read_token(call: Call) -> Response:
    """`GET /api/{kind}s/{id}/xet-read-token/{rev}`."""
    return _give_token(call, call.repo_to_read(), "xet-read")


def _give_token(call: Call, repo: Repo, purpose: str) -> Response:
    until = int(time.time()) + _LIFE_S
    token = sign_for(call, purpose, repo, {}, life_s=_LIFE_S)
    url = f"{call.base_url}/xet/{call.store.xet.generation()}"
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(until)}
    return JSONResponse({"casUrl": url, "accessToken": token, "exp": until}, headers=headers)


def grant_xorb(call: Call) -> Response:
    """`POST {address}/v1/xorb-grants/{prefix}/{hash}`: 200 when this repo has the xorb already."""
    fields = _read_token(call.request, "xet-write")
    if not call.store.xet.has_xorb(fields["repo"], call.param("hash")):
        raise NotFoundError("upload", "Send the xorb to /v1/xorbs.")
    return JSONResponse({})


def find_chunk(call: Call) -> Response:
    """`GET {address}/v1/chunks/{prefix}/{hash}`: which xorbs hold a chunk, and what else they hold."""
    fields = _read_token(call.request, "xet-write")
    shard = call.store.xet.similar.find(fields["repo"], call.param("hash"))
    if shard is None:
        raise NotFoundError("upload", "No file here that this token may read holds the chunk.")
    return Response(shard, media_type="application/octet-stream")


async def add_xorb(request: Request) -> Response:
    """`POST {address}/v1/xorbs/{prefix}/{hash}`.

    Who has the xorb already sends and proves it all the same, so that the answer does not tell whether anybody has it.
    """
    store: Store = request.app.state.store
    await run_in_threadpool(_read_token, request, "xet-write")
    await run_in_threadpool(store.xet.renew_xorb, request.path_params["hash"])
    await receive(request, store.xorbs.receive(request.path_params["hash"]))
    return JSONResponse({"was_inserted": True})


def add_shard(call: Call) -> Response:
    """`POST {address}/v1/shards`: when this answers, every file of the shard can be committed."""
    fields = _read_token(call.request, "xet-write")
    for _ in call.store.xet.add_files(fields["repo"], _read_shard(call)):
        pass
    return JSONResponse({"result": 1})


def add_shard_with_progress(call: Call) -> Response:
    """`POST {address}/v2/shards`: the same, with a line of JSON now and then; the last one is `result` or `error`."""
    fields = _read_token(call.request, "xet-write")
    events = _report(call.store, fields["repo"], _read_shard(call))
    lines = (json.dumps(event) + "\n" for event in events)
    return StreamingResponse(lines, media_type="application/x-ndjson")


def _report(store: Store, repo_uid: str, files: list[ShardFile]) -> Iterator[dict[str, Any]]:
    total, verified = sum(len(file.terms) for file in files), 0
    try:
        for _ in store.xet.add_files(repo_uid, files):
            verified += 1
            yield {"type": "validating", "verified": verified, "total": total}
        yield {"type": "result"}
    except StoreError as error:
        yield {"type": "error", "message": str(error), "retryable": False}


def _read_shard(call: Call) -> list[ShardFile]:
    shard = call.body.read(MAX_SHARD_BYTES + 1)
    if len(shard) > MAX_SHARD_BYTES:
        raise TooLargeError(f"A shard has at most {MAX_SHARD_BYTES} bytes.")
    return parse_shard(shard)


def reconstruct(call: Call) -> Response:
    """`GET {address}/v1/reconstructions/{name}`: which parts of which xorbs make up a file, or a range of it."""

    def describe(link: str, chunks: dict[str, int], place: dict[str, int]) -> dict[str, Any]:
        return {"range": chunks, "url": link, "url_range": place}

    return _reconstruct(call, "fetch_info", describe)


def reconstruct_by_url(call: Call) -> Response:
    """`GET {address}/v2/reconstructions/{name}`: the same, said another way."""

    def describe(link: str, chunks: dict[str, int], place: dict[str, int]) -> dict[str, Any]:
        return {"url": link, "ranges": [{"chunks": chunks, "bytes": place}]}

    return _reconstruct(call, "xorbs", describe)


def give_xorb(call: Call) -> Response:
    """`GET /xet/xorb/{link}`: the bytes that the link was signed for, or a part of them; never more."""
    fields = read_signed(call.store.secret, "xorb", call.param("link"))
    call.store.xet.find_file(repo_to_read(call.store, fields).uid, fields["file"])
    match = _RANGE.fullmatch(call.request.headers.get("range", ""))
    if not match or not fields["first"] <= int(match[1]) <= int(match[2]) <= fields["last"]:
        raise ForbiddenError(f"This link is good for the range bytes={fields['first']}-{fields['last']} only.")
    return answer_part(call.store.xorbs.open(fields["xorb"]), int(match[1]), int(match[2]))


def _reconstruct(call: Call, key: str, describe: Callable[[str, dict[str, int], dict[str, int]], Any]) -> Response:
    fields = _read_token(call.request, "xet-read")
    recipe = call.store.xet.find_file(fields["repo"], call.param("file"))
    match = _RANGE.fullmatch(call.request.headers.get("range", ""))
    start, end = (int(match[1]), int(match[2]) + 1) if match else (0, recipe.size_bytes)
    if match and not start < min(end, recipe.size_bytes):
        return Response(status_code=416, headers={"Content-Range": f"bytes */{recipe.size_bytes}"})
    terms, offset = _select(call, recipe, start, min(end, recipe.size_bytes))
    shown = [{"hash": t.xorb, "unpacked_length": t.size_bytes, "range": _range(t.first, t.end)} for t in terms]
    parts: dict[str, list[Any]] = {}
    whose = {key: fields.get(key, "") for key in ("repo", "by")}
    for xorb in dict.fromkeys(term.xorb for term in terms):
        parts[xorb] = []
        for first, last in _join(terms, xorb):
            place = call.store.xet.locate(xorb, first, last)
            says = {**whose, "file": recipe.name, "xorb": xorb, "first": place[0], "last": place[1]}
            link = sign(call.store.secret, "xorb", says, life_s=_LIFE_S)
            parts[xorb].append(describe(f"{call.base_url}/xet/xorb/{link}", _range(first, last), _range(*place)))
    return JSONResponse({"offset_into_first_range": offset, "terms": shown, key: parts})


def _select(call: Call, recipe: Recipe, start: int, end: int) -> tuple[list[Term], int]:
    """The terms that hold the bytes `start` to `end`, and where in them the bytes begin."""
    placed = list(call.store.contents.recipes.terms(recipe, start, end))
    return [term for _, term in placed], start - placed[0][0] if placed else 0


def _join(terms: list[Term], xorb: str) -> list[tuple[int, int]]:
    """The runs of chunks that terms need of a xorb, without overlap: hf_xet panics on overlapping ones."""
    runs: list[tuple[int, int]] = []
    for first, end in sorted((term.first, term.end) for term in terms if term.xorb == xorb):
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(runs[-1][1], end))
        else:
            runs.append((first, end))
    return runs


def _range(start: int, end: int) -> dict[str, int]:
    return {"start": start, "end": end}


def _check_write_token(request: Request) -> None:
    _read_token(request, "xet-write")


def _check_read_token(request: Request) -> None:
    _read_token(request, "xet-read")


def _check_nothing(_: Request) -> None:
    """The link says who may use it."""


def _read_token(request: Request, purpose: str) -> dict[str, Any]:
    """What a token says, if who asked for it still may do what it is for.

    401 makes the client fetch a new one, 403 means that a new one would not help.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise UnauthenticatedError(f"This needs a token from {purpose}-token.")
    store: Store = request.app.state.store
    try:
        fields = read_signed(store.secret, purpose, token.strip())
    except LinkExpiredError as error:
        raise UnauthenticatedError(str(error)) from None
    (repo_to_contribute if purpose == "xet-write" else repo_to_read)(store, fields)
    return fields


_CAS = "/xet/{generation}"
ROUTES = [
    route("/api/{kinds:kinds}/{owner}/{name}/xet-write-token/{rev}", give_write_token),
    route("/api/{kinds:kinds}/{owner}/{name}/xet-read-token/{rev}", give_read_token),
    route(f"{_CAS}/v1/reconstructions/{{file}}", reconstruct, identify=_check_read_token),
    route(f"{_CAS}/v2/reconstructions/{{file}}", reconstruct_by_url, identify=_check_read_token),
    route("/xet/xorb/{link}", give_xorb, identify=_check_nothing),
    route(f"{_CAS}/v1/chunks/{{prefix}}/{{hash}}", find_chunk, identify=_check_write_token),
    route(f"{_CAS}/v1/xorb-grants/{{prefix}}/{{hash}}", grant_xorb, "POST", identify=_check_write_token),
    Route(f"{_CAS}/v1/xorbs/{{prefix}}/{{hash}}", add_xorb, methods=["POST"]),
    route(f"{_CAS}/v1/shards", add_shard, "POST", identify=_check_write_token, most_bytes=MAX_SHARD_BYTES + 1),
    route(
        f"{_CAS}/v2/shards",
        add_shard_with_progress,
        "POST",
        identify=_check_write_token,
        most_bytes=MAX_SHARD_BYTES + 1,
    ),
]
