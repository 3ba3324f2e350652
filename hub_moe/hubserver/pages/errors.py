"""Refusals for people: the status and headers that a client gets, and a page instead of JSON."""

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from ..calls import answer_http_error as answer_http_error_in_json
from ..calls import answer_refusal as answer_refusal_in_json
from ..sessions import identify_person
from ..store import Identity
from ..store.errors import StoreError, UnauthenticatedError
from .rendering import show_page
from .urls import is_local

_TITLES = {
    400: "That cannot be done",
    401: "Log in first",
    403: "Not allowed",
    404: "Nothing here",
    405: "Not a page",
    409: "Both cannot be",
    412: "Something changed meanwhile",
    413: "Too large",
    422: "That cannot be done",
}


async def answer_refusal(request: Request, error: Exception) -> Response:
    """What a route that raised a StoreError answers: a page to browsers, else what clients of the Hub expect."""
    assert isinstance(error, StoreError)
    response = await answer_refusal_in_json(request, error)
    is_refused = response.status_code >= 400
    return await _show(request, response, str(error)) if is_refused and _wants_page(request) else response


async def answer_http_error(request: Request, error: Exception) -> Response:
    """A path or method that no route has; a page with a slash too many is sent to where it is."""
    assert isinstance(error, HTTPException)
    response = await answer_http_error_in_json(request, error)
    if not _wants_page(request):
        return response
    path = request.url.path
    if error.status_code == 404 and path.endswith("/") and is_local(path) and request.method in {"GET", "HEAD"}:
        return RedirectResponse("/" + path.strip("/"), status_code=308)
    message = "There is no such page on this Hub." if error.status_code == 404 else error.detail
    return await _show(request, response, message)


async def _show(request: Request, response: Response, message: str) -> Response:
    who = await run_in_threadpool(_identify, request)
    status, is_hidden = response.status_code, response.status_code == 404
    values = {"error_title": _TITLES.get(status, "That did not work"), "message": message, "is_hidden": is_hidden}
    page = show_page(request, "error.html", who, status_code=status, **values)
    kept = {name: value for name, value in response.headers.items() if name.startswith("x-") or name == "allow"}
    page.headers.update(kept)
    return page


def _identify(request: Request) -> Identity | None:
    try:
        return identify_person(request)
    except UnauthenticatedError:
        return None


def _wants_page(request: Request) -> bool:
    is_for_clients = request.url.path.startswith("/api/") or ".git/" in request.url.path
    return "text/html" in request.headers.get("accept", "") and not is_for_clients
