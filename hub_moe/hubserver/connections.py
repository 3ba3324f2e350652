"""One connection to the server: how much and how long it may take before a request is there."""

import asyncio
from typing import Any

from httptools import HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .bodies import EXTENSION, DirectBody, Pieces

MAX_HEAD_BYTES = 64 << 10
_HEAD_S = 30.0
_BODY_PAUSE_S = 120.0
_WATCH_S = 5.0
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class BoundedConnection(HttpToolsProtocol):
    """Ends a connection whose request line and headers are too long or too slow, or whose body stops coming."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_bytes = 0
        self._is_head_complete = False
        self._waits_for_data = True
        self._last_data_s = self.loop.time()
        self._watch: asyncio.TimerHandle | None = None
        self._body_left = 0  # as far as the parser knows; 0 or less for a body that does not say its length

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there; from now on it is watched."""
        super().connection_made(transport)
        self._watch = self.loop.call_later(_WATCH_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """More of a request; what comes before its headers are complete counts."""
        if not self._is_head_complete:
            self._head_bytes += len(data)
        if self._is_head_complete or self._head_bytes == len(data):
            self._last_data_s = self.loop.time()  # a head that drips in does not start its time anew
        super().data_received(data)
        if not self._is_head_complete and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._waits_for_data = True
        self._body_left = 0
        super().on_message_begin()
        self.scope["extensions"] = {EXTENSION: {"take": self._give_body}}

    def on_headers_complete(self) -> None:
        """Its headers are complete."""
        self._is_head_complete = True
        fields = dict(self.headers)
        if b"transfer-encoding" not in fields:
            self._body_left = int(fields.get(b"content-length", 0))  # the parser allows one, and digits only
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Some of its body is there."""
        self._body_left -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """It is complete; the next one may be long in coming, which is uvicorn's `timeout_keep_alive`."""
        self._is_head_complete = self._waits_for_data = False
        self._head_bytes = 0
        super().on_message_complete()

    def _give_body(self, pieces: Pieces) -> DirectBody | None:
        """What the request that is being read still lacks, past the parser."""
        if self._body_left <= 0 or self.transport.is_closing():
            return None
        return DirectBody(self, pieces, self._body_left, on_data=self._note_data, on_end=self._end_body)

    def _note_data(self) -> None:
        self._last_data_s = self.loop.time()
        self._unset_keepalive_if_required()

    def _end_body(self) -> None:
        """The parser knows nothing of a body that went past it: a new one reads the next request."""
        self.transport.set_protocol(self)
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.on_message_complete()

    def _look(self) -> None:
        allowed_s = _BODY_PAUSE_S if self._is_head_complete else _HEAD_S
        is_paused_by_us = self._is_head_complete and self.flow.read_paused
        if self._waits_for_data and not is_paused_by_us and self.loop.time() - self._last_data_s > allowed_s:
            self.transport.close()
            return
        self._watch = self.loop.call_later(_WATCH_S, self._look)
