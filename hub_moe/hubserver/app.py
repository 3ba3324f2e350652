"""The embedded Hub as an ASGI application."""

import re
import secrets
import sqlite3
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import (
    account,
    commits,
    discussions,
    files,
    git_http,
    leaderboards,
    lfs,
    listing,
    refs,
    repos,
    spaces,
    weights,
    xet,
)
from .calls import Call, answer_no_room, route
from .pages import PAGES
from .pages.errors import answer_http_error, answer_refusal
from .store import Store
from .store.errors import NotFoundError, StoreError

DEFAULT_PART_BYTES = 256 << 20
# Addresses in answers begin with the host that the client named.
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{0,253})(?::[0-9]{1,5})?")
_NO_HOST = JSONResponse({"error": "The Host header is not the name or address of a host."}, status_code=400)


def build_app(store: Store, *, part_bytes: int = DEFAULT_PART_BYTES) -> ASGIApp:
    """The Hub over a store. Large files over `part_bytes` are uploaded in parts of that size."""
    modules = (
        account,
        repos,
        spaces,
        commits,
        discussions,
        git_http,
        lfs,
        refs,
        listing,
        leaderboards,
        weights,
        files,
        xet,
    )
    routes = [one for module in modules for one in module.ROUTES]
    routes += [route("/api/{kinds:kinds}/{rest:path}", _no_repo, "GET", "POST", "PUT", "DELETE", "HEAD")]
    routes += [route("/{name}/resolve/{rev}/{path:path}", _no_repo, "GET", "HEAD")]
    routes += PAGES
    handlers: dict[Any, Any] = {StoreError: answer_refusal, HTTPException: answer_http_error}
    handlers |= {OSError: answer_no_room, sqlite3.Error: answer_no_room}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.store = store
    app.state.part_bytes = part_bytes
    return _Front(app)


def _no_repo(call: Call) -> Any:
    raise NotFoundError("repo", f"Repository not found: there is nothing at {call.request.url.path}.")


class _Front:
    """What every request passes first.

    Routes see the path as it was sent, so that a quoted slash in a branch or folder stays inside its part. A malformed
    Host header is refused. Every answer has an `X-Request-Id`, which clients put into their messages.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            scope = dict(scope, path=scope["raw_path"].decode("latin-1"))
            app = (
                app if all(_HOST.fullmatch(value) for name, value in scope["headers"] if name == b"host") else _NO_HOST
            )
        request_id = secrets.token_hex(12).encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        await app(scope, receive, send_with_id)
