"""The body of a request from the socket into memory with nothing between: no parser, no copies, few events.

A large upload then costs a server little more than its hash and the disk.
"""

import asyncio
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

PIECE_BYTES = 1 << 20
EXTENSION = "hub_moe.body"
"""The ASGI extension by which a connection offers to `take` a body: `Callable[[Pieces], DirectBody | None]`."""


class Pieces:
    """Two buffers that take turns: while one is written to the disk, the other fills."""

    def __init__(self) -> None:
        self._filling = memoryview(bytearray(PIECE_BYTES))
        self._other = memoryview(bytearray(PIECE_BYTES))
        self._filled = 0

    def room(self) -> memoryview:
        """Where the next bytes go, until the piece is full."""
        return self._filling[self._filled :]

    def add(self, count: int) -> bool:
        """Note that the first `count` bytes of the room are taken; whether the piece is full."""
        self._filled += count
        return self._filled == PIECE_BYTES

    def take(self) -> memoryview:
        """What has been filled; good until the one after it is taken."""
        piece = self._filling[: self._filled]
        self._filling, self._other, self._filled = self._other, self._filling, 0
        return piece


class DirectBody(asyncio.BufferedProtocol):
    """The last `left` bytes of a request's body, in place of the connection's own protocol while they arrive."""

    def __init__(
        self,
        connection: HttpToolsProtocol,
        pieces: Pieces,
        left: int,
        *,
        on_data: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        self.left = left
        self._connection = connection
        self._pieces: Pieces | None = pieces
        self._on_data = on_data
        self._on_end = on_end
        self._is_lost = False
        self._ready = asyncio.Event()
        connection.flow.pause_reading()  # until `fill`
        connection.transport.set_protocol(self)

    async def fill(self) -> None:
        """Wait until the piece is full or the body is there; ClientDisconnect if the client goes away before."""
        if self.left and not self._is_lost:
            self._ready.clear()
            self._connection.flow.resume_reading()
            await self._ready.wait()
        if self._is_lost:
            raise ClientDisconnect

    def ignore(self) -> None:
        """Let the rest come for nobody, so that the client, which reads only after it has sent, gets its answer."""
        self._pieces = None

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go: never more than there are of this body."""
        room = self._pieces.room() if self._pieces else _NOWHERE
        return room[: self.left]

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes came; a full piece has to be taken before more do."""
        self._on_data()
        self.left -= nbytes
        is_full = self._pieces is not None and self._pieces.add(nbytes)
        if not self.left:
            self._on_end()
        elif is_full:
            self._connection.flow.pause_reading()
        if is_full or not self.left:
            self._ready.set()

    def eof_received(self) -> None:
        """The client sends no more."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or was sent away."""
        self._is_lost = True
        self._ready.set()
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        """The client is slow to read an answer that came early."""
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        """It caught up."""
        self._connection.resume_writing()


_NOWHERE = memoryview(bytearray(64 << 10))
"""Where bytes go that nobody wants: of all connections, for nobody reads it."""


def take_body(scope: MutableMapping[str, Any], pieces: Pieces) -> DirectBody | None:
    """What a request's body still lacks, to be filled into `pieces`; None if it can come only piece by piece.

    To be called right after an event of the body was received.
    """
    offer = scope.get("extensions", {}).get(EXTENSION)
    body: DirectBody | None = offer["take"](pieces) if offer else None
    return body
