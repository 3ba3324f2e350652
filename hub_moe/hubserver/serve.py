"""Run the embedded Hub: one process, one folder, this machine only unless told otherwise."""

import errno
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from ..errors import ConfigError
from .app import DEFAULT_PART_BYTES, build_app
from .connections import BoundedConnection
from .store import Store

_MAX_CONNECTIONS = 1000
"""More are told to come back later (503)."""


def serve(
    root: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    part_bytes: int = DEFAULT_PART_BYTES,
    on_ready: Callable[[str], None] | None = None,
    on_first_start: Callable[[str], None] | None = None,
) -> None:
    """Serve `root` until interrupted; `on_ready` gets the address once the port is bound (port 0: any free one).

    With `on_first_start`, a Hub without users gets a user `admin`, and that function the token to log in with.

    Raises:
        ConfigError: If the port is taken, or another server serves this folder.
    """
    with _bind(host, port) as listener, Store(root, serve=True) as store:
        address = f"http://{_name_for_others(host)}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            build_app(store, part_bytes=part_bytes),
            http=BoundedConnection,
            log_level="warning",
            access_log=False,
            lifespan="off",
            limit_concurrency=_MAX_CONNECTIONS,
        )
        _allow_open_files()
        if on_first_start and not store.accounts.count():
            store.accounts.add_user("admin")
            on_first_start(store.accounts.create_token("admin"))
        if on_ready:
            on_ready(address)
        uvicorn.Server(config).run(sockets=[listener])


def _name_for_others(host: str) -> str:
    """What clients call this machine; an address that means "every interface" is nobody's address."""
    if host in {"0.0.0.0", "::"}:
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _allow_open_files() -> None:
    """As many as the system lets this process have: each connection needs some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
    except OSError as error:
        listener.close()
        advice = "choose another --port" if error.errno == errno.EADDRINUSE else "--host is an address of this machine"
        raise ConfigError(f"Cannot listen on {host} port {port}: {error.strerror}; {advice}.") from None
    return listener
