"""Request bodies that go straight to disk, in memory never more than a piece of them."""

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Protocol

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from .store.errors import InvalidInputError

_WRITE_BYTES = 1 << 20


class Incoming(Protocol):
    """Something that takes bytes and, when all are there, keeps them."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

    def write(self, chunk: memoryview, /) -> None: ...

    def finish(self) -> None: ...


async def receive(request: Request, incoming: Incoming) -> None:
    """Write the body of a request into `incoming` and finish it; InvalidInputError if the client goes away.

    The next piece arrives while the last one is written: two buffers take turns.
    """
    with incoming:
        writing: asyncio.Task[None] | None = None
        try:
            async for piece in _read_pieces(request):
                if writing:
                    await writing
                writing = asyncio.create_task(run_in_threadpool(incoming.write, piece))
        finally:
            if writing:
                await writing
        await run_in_threadpool(incoming.finish)


async def _read_pieces(request: Request) -> AsyncIterator[memoryview]:
    """Each piece is good until the one after the next is asked for."""
    filling, other, filled = memoryview(bytearray(_WRITE_BYTES)), memoryview(bytearray(_WRITE_BYTES)), 0
    try:
        async for chunk in request.stream():
            rest = memoryview(chunk)
            while rest:
                taken = rest[: _WRITE_BYTES - filled]
                filling[filled : filled + len(taken)] = taken
                filled, rest = filled + len(taken), rest[len(taken) :]
                if filled == _WRITE_BYTES:
                    yield filling
                    filling, other, filled = other, filling, 0
    except ClientDisconnect:
        raise InvalidInputError("The upload was cut short.") from None
    yield filling[:filled]
