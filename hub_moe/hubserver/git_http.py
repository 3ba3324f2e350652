"""git clone, fetch and push over smart HTTP (gitprotocol-http)."""

import base64
import binascii
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import IO, Any

from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from .calls import ANONYMOUS_BYTES, SPOOL_BYTES, Call, identify, read_body, refuse
from .pktlines import FLUSH, decode, in_band, pkt, read_pkt
from .store import Identity, Repo
from .store.errors import (
    GatedError,
    InvalidInputError,
    NotFoundError,
    StoreError,
    TooLargeError,
    UnauthenticatedError,
)
from .store.pushes import MAX_REFS, PushResult, RefUpdate, parse_update
from .upload_pack import AGENT, advertise, answer, list_refs

MAX_PUSH_BYTES = 2 << 30
MAX_FETCH_REQUEST_BYTES = 16 << 20
_PUSH_CAPABILITIES = f"report-status delete-refs side-band-64k quiet atomic ofs-delta object-format=sha1 {AGENT}"
_NO_CACHE = {"Cache-Control": "no-cache, max-age=0, must-revalidate"}
_CHALLENGE = 'Basic realm="Hub: any user name, and a token as password"'


class _NameConvertor(Convertor[str]):
    """`{name:gitname}` in a route: with or without `.git` at its end."""

    regex = "[^/]+"

    def convert(self, value: str) -> str:
        return value.removesuffix(".git")

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("gitname", _NameConvertor())


def identify_git(request: Request) -> Identity | None:
    """Who asks, by a bearer token or by HTTP Basic with a token as password; the user name may be anything."""
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return identify(request)
    try:
        _, _, token = base64.b64decode(credentials.strip(), validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        raise UnauthenticatedError("Invalid credentials in Authorization header") from None
    found: Identity = request.app.state.store.accounts.identify(token)
    return found


def git_route(
    path: str, handler: Callable[[Call], Response], method: str, *, most_bytes: int, answer_error: Any = None
) -> Route:
    """A route for git and git-lfs: who has no token is asked for one, whether a repo is private or not there."""

    async def endpoint(request: Request) -> Response:
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as body:
            who: Identity | None = None
            try:
                who = await run_in_threadpool(identify_git, request)
                await read_body(request, body, most=most_bytes if who else min(most_bytes, ANONYMOUS_BYTES))
                return await run_in_threadpool(handler, Call(request, request.app.state.store, who, body))
            except StoreError as error:
                return (answer_error or _answer_in_text)(request, _hide(error, who))

    return Route(path, endpoint, methods=[method])


def challenge(error: StoreError) -> dict[str, str]:
    """The headers that make git and git-lfs ask for a token."""
    is_asked = isinstance(error, UnauthenticatedError)
    return {"WWW-Authenticate": _CHALLENGE, "LFS-Authenticate": _CHALLENGE} if is_asked else {}


def _hide(error: StoreError, who: Identity | None) -> StoreError:
    if who is None and isinstance(error, GatedError | NotFoundError):
        return UnauthenticatedError("Repository not found, or it needs a token: give a token as the password.")
    return error


def _answer_in_text(_: Request, error: StoreError) -> Response:
    """git shows plain text to its user."""
    return PlainTextResponse(f"{error}\n", status_code=refuse(error).status_code, headers=challenge(error))


def show_refs(call: Call) -> Response:
    """`GET {repo}/info/refs?service=...`: what is here, before a fetch or push."""
    service = call.request.query_params.get("service")
    if service == "git-upload-pack":
        repo = call.repo_to_read()
        with call.store.repos.open(repo) as git:
            content = b"".join(advertise(git, _protocol(call)))
    elif service == "git-receive-pack":
        repo = call.repo_to_contribute()
        with call.store.repos.open(repo) as git:
            content = pkt("# service=git-receive-pack") + FLUSH
            content += b"".join(list_refs(git, _PUSH_CAPABILITIES, with_head=False))
    else:
        raise InvalidInputError("This server speaks git's smart HTTP protocol only; use git 1.6.6 or newer.")
    return Response(content, headers=_NO_CACHE, media_type=f"application/x-{service}-advertisement")


def upload_pack(call: Call) -> Response:
    """`POST {repo}/git-upload-pack`: a pack of what the client has not."""
    repo = call.repo_to_read()
    body = _inflated(call, most=MAX_FETCH_REQUEST_BYTES)
    pieces = answer(lambda: call.store.repos.open(repo), body, _protocol(call))
    return StreamingResponse(pieces, headers=_NO_CACHE, media_type="application/x-git-upload-pack-result")


def receive_pack(call: Call) -> Response:
    """`POST {repo}/git-receive-pack`: a push, of which all refs are moved or none."""
    if call.request.headers.get("content-type") != "application/x-git-receive-pack-request":
        # what a page of another site can make a browser send, with the password it remembers, has another type
        raise InvalidInputError("A push has the content type application/x-git-receive-pack-request.")
    repo = call.repo_to_contribute()
    is_folded = call.request.headers.get("content-encoding", "identity") != "identity"
    with _inflated(call, most=MAX_PUSH_BYTES) if is_folded else nullcontext(call.body) as body:
        updates, words = _read_updates(body)
        content = b""
        if updates:
            content = _report(call, repo, updates, body)
            content = b"".join(in_band(1, [content])) + FLUSH if "side-band-64k" in words else content
    return Response(content, headers=_NO_CACHE, media_type="application/x-git-receive-pack-result")


def _report(call: Call, repo: Repo, updates: list[RefUpdate], body: IO[bytes]) -> bytes:
    result: PushResult = call.store.pushes.receive(repo, call.identity, updates, body)
    lines = [f"unpack {result.unpack}"]
    lines += [f"ng {one.ref} {one.refusal}" if one.refusal else f"ok {one.ref}" for one in result.updates]
    return b"".join(pkt(line) for line in lines) + FLUSH


def _read_updates(body: IO[bytes]) -> tuple[list[RefUpdate], set[str]]:
    updates: list[RefUpdate] = []
    words: set[str] = set()
    while (line := read_pkt(body)) not in {None, FLUSH}:
        assert line is not None
        command, _, capabilities = decode(line).partition("\0")
        words |= set(capabilities.split())
        parts = command.split(" ")
        if parts[0] == "shallow":
            continue
        if len(parts) != 3 or len(updates) >= MAX_REFS:
            raise InvalidInputError(f"A push has at most {MAX_REFS} lines of 'OLD NEW REF'.")
        updates.append(parse_update(*parts))
    if len({update.ref for update in updates}) != len(updates):
        raise InvalidInputError("A push names each ref once.")
    return updates, words


def _protocol(call: Call) -> int:
    words = call.request.headers.get("git-protocol", "").split(":")
    return 2 if "version=2" in words else 1 if "version=1" in words else 0


def _inflated(call: Call, *, most: int) -> IO[bytes]:
    """The body, unfolded if the client compressed it, and kept until it is closed."""
    encoding = call.request.headers.get("content-encoding", "identity")
    if encoding not in {"identity", "gzip", "x-gzip"}:
        raise InvalidInputError(f"The body's encoding {encoding[:40]!r} is not known here.")
    target = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 (its reader closes it)
    size_bytes = 0
    for chunk in _unfold(call.body) if encoding != "identity" else _chunks(call.body):
        size_bytes += len(chunk)
        if size_bytes > most:
            target.close()
            raise TooLargeError(f"The body of this request unfolds to more than {most} bytes.")
        target.write(chunk)
    target.seek(0)
    return target


def _unfold(body: IO[bytes]) -> Iterator[bytes]:
    engine = zlib.decompressobj(wbits=31)
    try:
        for chunk in _chunks(body):
            while chunk and not engine.eof:
                yield engine.decompress(chunk, SPOOL_BYTES)
                chunk = engine.unconsumed_tail
    except zlib.error:
        raise InvalidInputError("The body is not valid gzip.") from None
    if not engine.eof:
        raise InvalidInputError("The body is cut short.")


def _chunks(body: IO[bytes]) -> Iterator[bytes]:
    while chunk := body.read(1 << 20):
        yield chunk


def _repo_routes() -> Iterator[Route]:
    for repo in ("/{owner}/{name:gitname}", "/{kinds:kinds}/{owner}/{name:gitname}"):
        yield git_route(f"{repo}/info/refs", show_refs, "GET", most_bytes=0)
        yield git_route(f"{repo}/git-upload-pack", upload_pack, "POST", most_bytes=MAX_FETCH_REQUEST_BYTES)
        yield git_route(f"{repo}/git-receive-pack", receive_pack, "POST", most_bytes=MAX_PUSH_BYTES)


ROUTES = list(_repo_routes())
