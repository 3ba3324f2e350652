"""Request bodies that go straight to disk, in memory never more than a piece of them."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from types import TracebackType
from typing import Protocol

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from .bodies import DirectBody, Pieces, take_body
from .store.errors import InvalidInputError


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

    The next piece arrives while the last one is written.
    """
    with incoming:
        writing: asyncio.Task[None] | None = None
        try:
            async with aclosing(_read_pieces(request)) as pieces:
                async for piece in pieces:
                    if writing:
                        await writing
                    writing = asyncio.create_task(run_in_threadpool(incoming.write, piece))
        except ClientDisconnect:
            raise InvalidInputError("The upload was cut short.") from None
        finally:
            if writing:
                await writing
        await run_in_threadpool(incoming.finish)


async def _read_pieces(request: Request) -> AsyncGenerator[memoryview, None]:
    """Each piece is good until the one after the next is asked for."""
    pieces, more_body = Pieces(), True
    body: DirectBody | None = None
    try:
        while more_body and not body:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            more_body = message.get("more_body", False)
            body = take_body(request.scope, pieces) if more_body else None
            for piece in _copy(message.get("body", b""), pieces):
                yield piece
        while body and body.left:
            await body.fill()
            yield pieces.take()
        yield pieces.take()
    finally:
        if body:
            body.ignore()


def _copy(chunk: bytes, pieces: Pieces) -> Iterator[memoryview]:
    """Each piece that a chunk makes full."""
    rest = memoryview(chunk)
    while rest:
        taken = rest[: len(pieces.room())]
        pieces.room()[: len(taken)] = taken
        rest = rest[len(taken) :]
        if pieces.add(len(taken)):
            yield pieces.take()
