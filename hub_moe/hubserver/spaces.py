"""Spaces are files here and nothing runs: what clients ask about running ones gets an honest answer."""

from starlette.responses import JSONResponse, Response

from .calls import Call, route
from .store.errors import InvalidInputError


def list_templates(_: Call) -> Response:
    """`GET /api/spaces/templates`: there are none."""
    return JSONResponse({"templates": []})


def list_hardware(_: Call) -> Response:
    """`GET /api/spaces/hardware`: there is none."""
    return JSONResponse([])


def show_runtime(call: Call) -> Response:
    """`GET /api/spaces/{id}/runtime`."""
    call.repo()
    return JSONResponse({"stage": "STOPPED", "hardware": {"current": None, "requested": None}, "gcTimeout": None})


def list_variables(call: Call) -> Response:
    """`GET /api/spaces/{id}/variables` and `/secrets`: none are kept."""
    call.repo_to_write()
    return JSONResponse({})


def refuse_to_run(call: Call) -> Response:
    """Anything that would start, stop or configure a running Space."""
    call.repo_to_write()
    raise InvalidInputError("This Hub keeps Spaces as files and does not run them.")


_RUNNING = ("secrets", "variables", "volumes", "hardware", "sleeptime", "pause", "restart", "dev-mode")
_SPACE = "/api/{kinds:space_kind}/{owner}/{name}"
ROUTES = [
    route("/api/spaces/templates", list_templates),
    route("/api/spaces/hardware", list_hardware),
    route(f"{_SPACE}/runtime", show_runtime),
    route(f"{_SPACE}/variables", list_variables),
    route(f"{_SPACE}/secrets", list_variables),
    *(route(f"{_SPACE}/{what}", refuse_to_run, "POST", "PUT", "DELETE") for what in _RUNNING),
]
