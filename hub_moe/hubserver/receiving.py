"""Request bodies that go straight to disk, in memory never more than a piece of them."""

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

    def write(self, chunk: bytes) -> None: ...

    def finish(self) -> None: ...


async def receive(request: Request, incoming: Incoming) -> None:
    """Write the body of a request into `incoming` and finish it; InvalidInputError if the client goes away."""
    waiting = bytearray()
    with incoming:
        try:
            async for chunk in request.stream():
                waiting += chunk
                if len(waiting) >= _WRITE_BYTES:
                    await run_in_threadpool(incoming.write, bytes(waiting))
                    waiting.clear()
        except ClientDisconnect:
            raise InvalidInputError("The upload was cut short.") from None
        await run_in_threadpool(incoming.write, bytes(waiting))
        await run_in_threadpool(incoming.finish)


async def discard(request: Request) -> None:
    """Read the body of a request to its end and forget it."""
    try:
        async for _ in request.stream():
            pass
    except ClientDisconnect:
        raise InvalidInputError("The upload was cut short.") from None
