"""The Xet protocol, by which clients with hf_xet send and fetch large files.

What came by Xet can be fetched by Xet; everything can be fetched over plain HTTP. The routes of version 2, the global
search for chunks and xorb grants answer 404; the client then does without.
"""

import re
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .calls import Call, route
from .downloads import BlobResponse
from .signing import read_signed, sign
from .store.errors import TooLargeError, UnauthenticatedError
from .store.repos import Repo
from .store.xet import MAX_SHARD_BYTES, ShardFile, Term

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
    token = sign(call.store.secret, purpose, {"repo": repo.uid}, life_s=_LIFE_S)
    url = f"{call.base_url}/xet"
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(until)}
    return JSONResponse({"casUrl": url, "accessToken": token, "exp": until}, headers=headers)


def add_xorb(call: Call) -> Response:
    """`POST /xet/v1/xorbs/{prefix}/{hash}`."""
    return JSONResponse({"was_inserted": call.store.xet.add_xorb(call.param("hash"), call.body)})


def add_shard(call: Call) -> Response:
    """`POST /xet/v1/shards`: when this answers, every file of the shard is whole and can be committed."""
    fields = _read_token(call.request, "xet-write")
    shard = call.body.read(MAX_SHARD_BYTES + 1)
    if len(shard) > MAX_SHARD_BYTES:
        raise TooLargeError(f"A shard has at most {MAX_SHARD_BYTES} bytes.")
    call.store.xet.add_shard(fields["repo"], shard)
    return JSONResponse({"result": 1})


def reconstruct(call: Call) -> Response:
    """`GET /xet/v1/reconstructions/{name}`: which parts of which xorbs make up a file, or a range of it."""
    fields = _read_token(call.request, "xet-read")
    file = call.store.xet.find_file(fields["repo"], call.param("file"))
    match = _RANGE.fullmatch(call.request.headers.get("range", ""))
    first, last = (int(match[1]), int(match[2])) if match else (0, file.size_bytes - 1)
    if match and first >= file.size_bytes:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{file.size_bytes}"})
    terms, offset = _select(file, first, last)
    shown = [{"hash": t.xorb, "unpacked_length": t.size_bytes, "range": _range(t.first, t.end)} for t in terms]
    fetch = {xorb: [_describe_part(call, xorb, *run) for run in _join(terms, xorb)] for xorb in {t.xorb for t in terms}}
    return JSONResponse({"offset_into_first_range": offset, "terms": shown, "fetch_info": fetch})


def give_xorb(call: Call) -> Response:
    """`GET /xet/xorb/{link}`, always with a Range."""
    fields = read_signed(call.store.secret, "xorb", call.param("link"))
    return BlobResponse(call.store.xet.xorb_path(fields["xorb"]), headers={})


def _select(file: ShardFile, first: int, last: int) -> tuple[list[Term], int]:
    """The terms that hold the bytes `first` to `last`, and where in them the bytes begin."""
    selected: list[Term] = []
    start = offset = 0
    for term in file.terms:
        end = start + term.size_bytes
        if start <= last and end > first:
            offset = offset if selected else first - start
            selected.append(term)
        start = end
    return selected, offset


def _join(terms: list[Term], xorb: str) -> list[tuple[int, int]]:
    """The runs of chunks that terms need of a xorb, without overlap: hf_xet panics on overlapping ones."""
    runs: list[tuple[int, int]] = []
    for first, end in sorted((term.first, term.end) for term in terms if term.xorb == xorb):
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(runs[-1][1], end))
        else:
            runs.append((first, end))
    return runs


def _describe_part(call: Call, xorb: str, first: int, end: int) -> dict[str, Any]:
    link = sign(call.store.secret, "xorb", {"xorb": xorb}, life_s=_LIFE_S)
    url = f"{call.base_url}/xet/xorb/{link}"
    return {"range": _range(first, end), "url": url, "url_range": _range(*call.store.xet.locate(xorb, first, end))}


def _range(start: int, end: int) -> dict[str, int]:
    return {"start": start, "end": end}


def _check_write_token(request: Request) -> None:
    _read_token(request, "xet-write")


def _check_read_token(request: Request) -> None:
    _read_token(request, "xet-read")


def _check_nothing(_: Request) -> None:
    """The link itself is the permission."""


def _read_token(request: Request, purpose: str) -> dict[str, Any]:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise UnauthenticatedError(f"This needs a token from {purpose}-token.")
    return read_signed(request.app.state.store.secret, purpose, token.strip())


ROUTES = [
    route("/api/{kinds:kinds}/{owner}/{name}/xet-write-token/{rev}", give_write_token),
    route("/api/{kinds:kinds}/{owner}/{name}/xet-read-token/{rev}", give_read_token),
    route("/xet/v1/reconstructions/{file}", reconstruct, identify=_check_read_token),
    route("/xet/xorb/{link}", give_xorb, identify=_check_nothing),
    route("/xet/v1/xorbs/{prefix}/{hash}", add_xorb, "POST", identify=_check_write_token),
    route("/xet/v1/shards", add_shard, "POST", identify=_check_write_token),
]
