"""One request on its way to a route: who asks, for which repo, with what body; and how refusals become answers."""

import errno
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any
from urllib.parse import unquote

from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .store import Identity, Repo, RepoId, Store
from .store.errors import (
    ConflictError,
    ForbiddenError,
    GatedError,
    InvalidInputError,
    InvalidPathError,
    MovedError,
    NotFoundError,
    StaleParentError,
    StoreError,
    TooLargeError,
    UnauthenticatedError,
)
from .store.names import RESERVED_OWNERS

MAX_BODY_BYTES = 512 << 20
MAX_JSON_BYTES = 64 << 20
ANONYMOUS_BYTES = 1 << 20
SPOOL_BYTES = 4 << 20
_STATUSES = (
    (GatedError, 403),
    (ForbiddenError, 403),
    (UnauthenticatedError, 401),
    (NotFoundError, 404),
    (TooLargeError, 413),
    (InvalidPathError, 422),
    (InvalidInputError, 400),
    (ConflictError, 409),
    (StaleParentError, 412),
)
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CODES = {"repo": "RepoNotFound", "revision": "RevisionNotFound", "entry": "EntryNotFound"}


class _KindConvertor(Convertor[str]):
    """`{kinds:kinds}` in a route: the plural in the URL, the singular in the handler."""

    regex = "models|datasets|spaces"

    def convert(self, value: str) -> str:
        return value.removesuffix("s")

    def to_string(self, value: str) -> str:
        return f"{value}s"


class _OwnerConvertor(Convertor[str]):
    """`{owner:owner}` in a page's route: not the first segment of an API, whose clients need their 404."""

    regex = f"(?!(?:{'|'.join(sorted(RESERVED_OWNERS))})(?:/|$))[^/]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


class _DatasetConvertor(_KindConvertor):
    regex = "datasets"


class _SpaceConvertor(_KindConvertor):
    regex = "spaces"


class _ModelConvertor(_KindConvertor):
    regex = "models"


register_url_convertor("kinds", _KindConvertor())
register_url_convertor("model_kind", _ModelConvertor())
register_url_convertor("dataset_kind", _DatasetConvertor())
register_url_convertor("space_kind", _SpaceConvertor())
register_url_convertor("owner", _OwnerConvertor())


@dataclass
class Call:
    """A request with its body read, and shorthands for what routes ask of it."""

    request: Request
    store: Store
    who: Identity | None
    body: IO[bytes]

    def param(self, name: str) -> str:
        """A part of the path, unquoted: routes match the path as it was sent, so `%2F` is inside a part."""
        try:
            return unquote(self.request.path_params[name], errors="strict")
        except UnicodeDecodeError:
            raise InvalidInputError("The URL is not valid UTF-8.") from None

    @cached_property
    def repo_id(self) -> RepoId:
        """The repo that the path names; a name that no repo can have is a repo that does not exist."""
        kind = self.request.path_params.get("kinds", "model")
        try:
            return RepoId(kind, self.param("owner"), self.param("name"))
        except InvalidInputError as error:
            raise NotFoundError("repo", f"Repository not found: {error}") from None

    def repo(self) -> Repo:
        """The repo, if the caller may know of it."""
        return self.store.repos.find(self.repo_id, self.who)

    def repo_to_read(self) -> Repo:
        """The repo, if the caller may read its files."""
        return self.store.repos.find_to_read(self.repo_id, self.who)

    def repo_to_write(self) -> Repo:
        """The repo, if the caller may change it."""
        return self.store.repos.find_to_write(self.repo_id, self.who)

    def repo_to_contribute(self) -> Repo:
        """The repo, if the caller may propose changes to it."""
        return self.store.repos.find_to_contribute(self.repo_id, self.who)

    @property
    def identity(self) -> Identity:
        """Who asks; UnauthenticatedError if nobody says."""
        if self.who is None:
            raise UnauthenticatedError("Invalid username or password.")
        return self.who

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; an empty body is an empty object."""
        text = self.body.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise TooLargeError(f"A JSON body has at most {MAX_JSON_BYTES} bytes.")
        try:
            found = json.loads(text or b"{}")
        except (ValueError, RecursionError):
            raise InvalidInputError("The body is not valid JSON.") from None
        if not isinstance(found, dict):
            raise InvalidInputError("The body must be a JSON object.")
        return found

    def json_or_null(self) -> dict[str, Any]:
        """Like `json`, for routes to which the client may send `null`."""
        text = self.body.read(5).strip()
        self.body.seek(0)
        return {} if text == b"null" else self.json()

    def text(self, fields: dict[str, Any], name: str, default: str | None = None) -> str:
        """A string from a JSON object; InvalidInputError if it is missing or something else."""
        value = fields.get(name, default)
        if not isinstance(value, str) or not _is_encodable(value):
            raise InvalidInputError(f"{name!r} must be a string.")
        return value

    def flag(self, name: str) -> bool:
        """Whether a query parameter says yes."""
        return self.request.query_params.get(name, "").lower() in {"1", "true"}

    def number(self, name: str, default: int, *, most: int) -> int:
        """A non-negative whole number from the query."""
        text = self.request.query_params.get(name)
        if text is None:
            return default
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise InvalidInputError(f"{name} must be a whole number; got {text[:40]!r}.")
        return min(int(text), most)

    def words(self, name: str) -> list[str]:
        """Every value of a query parameter that may be repeated, by `name` or `name[]`, or hold commas."""
        query = self.request.query_params
        return [word for text in query.getlist(name) + query.getlist(f"{name}[]") for word in text.split(",") if word]

    @property
    def client_name(self) -> str:
        """Who asks, as far as it is known: the user, or the address."""
        return self.who.user if self.who else self.request.client.host if self.request.client else ""

    @property
    def base_url(self) -> str:
        """The address that the client used, without a slash at its end."""
        return str(self.request.base_url).rstrip("/")

    def repo_url(self, repo_id: RepoId) -> str:
        """The web address of a repo."""
        prefix = "" if repo_id.kind == "model" else f"{repo_id.kind}s/"
        return f"{self.base_url}/{prefix}{repo_id}"


Handler = Callable[[Call], Response]


def identify(request: Request) -> Identity | None:
    """Who a request's bearer token belongs to, None without one; UnauthenticatedError for a token nobody has."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if not scheme:
        return None
    if scheme.lower() != "bearer":
        raise UnauthenticatedError("Invalid credentials in Authorization header")
    store: Store = request.app.state.store
    return store.accounts.identify(token.strip())


def route(
    path: str,
    handler: Handler,
    *methods: str,
    identify: Callable[[Request], Identity | None] = identify,
    most_bytes: int | None = None,
) -> Route:
    """A route whose handler runs in a thread, after `identify` let the caller in and the body was read to a file.

    The body has at most `most_bytes`, by default little for a caller whom `identify` does not know.
    """

    async def endpoint(request: Request) -> Response:
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as body:
            who = await run_in_threadpool(identify, request)
            await read_body(request, body, most=most_bytes or (MAX_BODY_BYTES if who else ANONYMOUS_BYTES))
            return await run_in_threadpool(handler, Call(request, request.app.state.store, who, body))

    return Route(path, endpoint, methods=list(methods or ("GET",)))


async def read_body(request: Request, body: IO[bytes], *, most: int) -> None:
    """Copy the body of a request to a file; TooLargeError as soon as it has more than `most` bytes."""
    size_bytes = 0
    try:
        async for chunk in request.stream():
            size_bytes += len(chunk)
            if size_bytes > most:
                raise TooLargeError(f"The body of this request has at most {most} bytes.")
            body.write(chunk)
    except ClientDisconnect:
        raise InvalidInputError("The request was cut short.") from None
    body.seek(0)


async def answer_refusal(request: Request, error: Exception) -> Response:
    """What the server answers when a route raises a StoreError."""
    assert isinstance(error, StoreError)
    if isinstance(error, MovedError) and {"owner", "name"} <= {*request.path_params}:
        return _redirect(request, str(error.target))
    return refuse(error)


def _redirect(request: Request, target: str) -> Response:
    """The same request to a repo's new name. The first place in the path that reads like the old name is its name."""
    old = f"/{request.path_params['owner']}/{request.path_params['name']}"
    path = request.url.path.replace(old, f"/{target}", 1)
    query = f"?{request.url.query}" if request.url.query else ""
    return Response(status_code=307, headers={"Location": path + query})


def refuse(error: StoreError, more_headers: Mapping[str, str] | None = None) -> Response:
    """The status, body and headers by which the client of the Hub recognises a refusal."""
    status = next((number for kind, number in _STATUSES if isinstance(error, kind)), 400)
    message = str(error)
    line = "".join(letter if " " <= letter <= "~" else "?" for letter in " ".join(message.split()))
    headers = {"X-Error-Message": line[:1000]}
    headers |= more_headers or {}
    if isinstance(error, NotFoundError) and error.what in _CODES:
        headers["X-Error-Code"] = _CODES[error.what]
    if isinstance(error, GatedError):
        headers["X-Error-Code"] = "GatedRepo"
    return JSONResponse({"error": message.encode("utf-8", "replace").decode()}, status_code=status, headers=headers)


async def answer_no_room(_: Request, error: Exception) -> Response:
    """A disk without room is nobody's mistake: nothing has changed, and the client may try again later."""
    number = error.errno if isinstance(error, OSError) else None
    of_database = getattr(error, "sqlite_errorname", None) or ""
    if number not in _NO_ROOM and not of_database.startswith(("SQLITE_FULL", "SQLITE_IOERR_WRITE")):
        raise error
    return JSONResponse({"error": "This Hub has no room left on its disk; nothing was changed."}, status_code=507)


async def answer_http_error(_: Request, error: Exception) -> Response:
    """A path or method that no route has."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


def _is_encodable(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
