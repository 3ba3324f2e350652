"""Log in with a token, log out; the files that belong to the pages."""

from starlette.responses import RedirectResponse, Response

from ..calls import Call, route
from ..sessions import (
    clear_cookie,
    identify_person,
    read_form,
    read_own_form,
    read_session,
    require_same_site,
    set_cookie,
)
from ..store.errors import NotFoundError, UnauthenticatedError
from .rendering import STATIC_FILES, answer_static, show_page
from .urls import is_local


def show_login(call: Call) -> Response:
    """`GET /login`."""
    return show_page(
        call.request, "login.html", call.who, next=call.request.query_params.get("next", "/"), failed=False
    )


def log_in(call: Call) -> Response:
    """`POST /login`: a token for a session; the token itself is kept nowhere."""
    require_same_site(call.request)
    fields = read_form(call)
    goal = fields.get("next", "/")
    try:
        session = call.store.sessions.start(fields.get("token", "").strip())
    except UnauthenticatedError:
        return show_page(call.request, "login.html", call.who, status_code=401, next=goal, failed=True)
    call.store.sessions.end(read_session(call.request) or "")
    response = RedirectResponse(goal if is_local(goal) else "/", status_code=303)
    set_cookie(response, call.request, session)
    return response


def log_out(call: Call) -> Response:
    """`POST /logout`: the session ends on the server too."""
    read_own_form(call)
    call.store.sessions.end(read_session(call.request) or "")
    response = RedirectResponse("/", status_code=303)
    clear_cookie(response, call.request)
    return response


def show_static(call: Call) -> Response:
    """`GET /static/{file}`."""
    name = call.param("file")
    if name not in STATIC_FILES:
        raise NotFoundError("page", "There is no such file.")
    return answer_static(name)


ROUTES = [
    route("/login", show_login, identify=identify_person),
    route("/login", log_in, "POST", identify=identify_person),
    route("/logout", log_out, "POST", identify=identify_person),
    route("/static/{file}", show_static, identify=lambda _: None),
]
