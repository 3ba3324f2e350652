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

    def write(self, chunk: bytearray, /) -> None: ...

    def finish(self) -> None: ...


async def receive(request: Request, incoming: Incoming) -> None:
    """Write the body of a request into `incoming` and finish it; InvalidInputError if the client goes away.

    The next piece arrives while the last one is written.
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


async def _read_pieces(request: Request) -> AsyncIterator[bytearray]:
    waiting = bytearray()
    try:
        async for chunk in request.stream():
            waiting += chunk
            if len(waiting) >= _WRITE_BYTES:
                yield waiting
                waiting = bytearray()
    except ClientDisconnect:
        raise InvalidInputError("The upload was cut short.") from None
    yield waiting


async def discard(request: Request) -> None:
    """Read the body of a request to its end and forget it."""
    try:
        async for _ in request.stream():
            pass
    except ClientDisconnect:
        raise InvalidInputError("The upload was cut short.") from None
