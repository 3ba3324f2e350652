"""Who sits at the browser: a signed cookie that names a session, and proof that a form came from our own page."""

import hashlib
import hmac
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import Response

from .calls import Call, identify
from .signing import read_signed, sign
from .store import Identity, Store
from .store.errors import ForbiddenError, InvalidInputError, UnauthenticatedError
from .store.sessions import LIFE_S

_MAX_FORM_BYTES = 1 << 20
_MAX_FIELDS = 20
_FORM = "application/x-www-form-urlencoded"


def identify_person(request: Request) -> Identity | None:
    """Who asks for a page: by a bearer token as clients do, else by the cookie. Never used for the API."""
    if "authorization" in request.headers:
        return identify(request)
    session = read_session(request)
    store: Store = request.app.state.store
    return store.sessions.identify(session) if session else None


def read_session(request: Request) -> str | None:
    """The session that the request's cookie names, None without a cookie of ours that is still good."""
    store: Store = request.app.state.store
    cookie = request.cookies.get(_cookie_name(store))
    if not cookie:
        return None
    try:
        return str(read_signed(store.secret, "session", cookie)["id"])
    except ForbiddenError:
        return None


def set_cookie(response: Response, request: Request, session: str) -> None:
    """Log the browser in; the cookie is not shown to scripts nor sent from other sites."""
    store: Store = request.app.state.store
    value = sign(store.secret, "session", {"id": session}, life_s=LIFE_S)
    is_secure = request.url.scheme == "https"
    response.set_cookie(
        _cookie_name(store), value, max_age=LIFE_S, path="/", secure=is_secure, httponly=True, samesite="strict"
    )


def clear_cookie(response: Response, request: Request) -> None:
    """Log the browser out."""
    response.delete_cookie(_cookie_name(request.app.state.store), path="/", httponly=True, samesite="strict")


def form_token(request: Request) -> str:
    """What every form of a logged-in person carries; other sites cannot know it. Empty without a session."""
    session = read_session(request)
    store: Store = request.app.state.store
    return hmac.new(store.secret, f"form {session}".encode(), hashlib.sha256).hexdigest() if session else ""


def read_own_form(call: Call) -> dict[str, str]:
    """The fields of a form that a logged-in person sent from one of our pages; ForbiddenError from anywhere else."""
    require_same_site(call.request)
    fields = read_form(call)
    expected = form_token(call.request)
    if not expected:
        raise UnauthenticatedError("Log in first; your session may have ended.")
    if not hmac.compare_digest(fields.get("form_token", "").encode(), expected.encode()):
        raise ForbiddenError("This form is out of date; reload the page and send it again.")
    return fields


def require_same_site(request: Request) -> None:
    """Refuse a form that a browser sent from another site, by what browsers say of where a request comes from."""
    fetch_site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin", "")
    host = request.headers.get("host", "")
    is_own = fetch_site == "same-origin" if fetch_site else origin in {f"http://{host}", f"https://{host}"}
    if not is_own:
        raise ForbiddenError("This form did not come from a page of this Hub.")


def read_form(call: Call) -> dict[str, str]:
    """The fields of a form, the last of those with the same name."""
    if call.request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
        raise InvalidInputError(f"A form is sent as {_FORM}.")
    content = call.body.read(_MAX_FORM_BYTES + 1)
    if len(content) > _MAX_FORM_BYTES:
        raise InvalidInputError(f"A form has at most {_MAX_FORM_BYTES} bytes.")
    try:
        found = parse_qs(content.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_MAX_FIELDS)
    except ValueError:
        raise InvalidInputError("The body is not a valid form.") from None
    return {name: values[-1].replace("\r\n", "\n") for name, values in found.items()}


def _cookie_name(store: Store) -> str:
    """Cookies do not tell ports apart, so that each Hub of a machine needs a name of its own."""
    return f"hub_session_{hashlib.sha256(store.secret).hexdigest()[:8]}"
