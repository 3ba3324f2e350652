"""Bodies of uploads past the HTTP parser: every byte, however it comes, and never one of another request."""

import asyncio
import hashlib
import random
import socket
import time
from contextlib import ExitStack, asynccontextmanager
from urllib.parse import urlsplit

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from uvicorn.server import ServerState

from hub_moe.hubserver import connections
from hub_moe.hubserver.bodies import PIECE_BYTES
from hub_moe.hubserver.connections import BoundedConnection
from hub_moe.hubserver.receiving import receive
from hub_moe.hubserver.store.errors import InvalidInputError, TooLargeError

from .client_over_http import Client
from .test_bounds import read_peak_kb

CONTENT = random.Random(0).randbytes(5 * PIECE_BYTES)
sizes = st.sampled_from([0, 1, 1000, 65_536, 70_000, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, len(CONTENT)])
steps = st.sampled_from([1 << 30, 1_000_000, 77_777, 40_000])
kinds = st.sampled_from(["length", "length", "chunked", "expect"])


class Hashing:
    """Takes at most `most_bytes` and keeps their sha256."""

    def __init__(self, most_bytes):
        self.left, self.digest, self.is_finished = most_bytes, hashlib.sha256(), False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, chunk):
        self.left -= len(chunk)
        if self.left < 0:
            raise TooLargeError("That is too much.")
        self.digest.update(chunk)

    def finish(self):
        self.is_finished = True


class App:
    """Answers with the sha256 of a body of at most `most_bytes`; remembers what it was told."""

    def __init__(self, most_bytes=1 << 30):
        self.most_bytes, self.refusals = most_bytes, []

    async def __call__(self, scope, receive_event, send):
        incoming, status = Hashing(self.most_bytes), 200
        try:
            await receive(Request(scope, receive_event), incoming)
        except InvalidInputError as error:
            status = 400
            self.refusals.append(str(error))
        assert incoming.is_finished == (status == 200)
        answer = incoming.digest.hexdigest().encode() if status == 200 else b""
        headers = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


@asynccontextmanager
async def serving(app):
    """The address of a server of connections as the Hub has them."""
    config, state = uvicorn.Config(app, lifespan="off", log_level="critical"), ServerState()
    config.load()

    def connect():
        return BoundedConnection(config=config, server_state=state, app_state={})

    server = await asyncio.get_running_loop().create_server(connect, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()


def head_of(size, kind="length", more=""):
    length = "Transfer-Encoding: chunked" if kind == "chunked" else f"Content-Length: {size}"
    expect = "Expect: 100-continue\r\n" if kind == "expect" else ""
    return f"PUT /x HTTP/1.1\r\nHost: h\r\n{expect}{more}{length}\r\n\r\n".encode()


def request_of(size, kind, step=1 << 30):
    content = CONTENT[:size]
    if kind == "chunked":
        pieces = [content[start : start + step] for start in range(0, size, step)]
        content = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    return head_of(size, kind) + content


async def read_answer(reader):
    """The status and the body of the next answer."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
    status = int(head.split()[1])
    if status == 100:
        return await read_answer(reader)
    length = int(head.lower().partition(b"content-length: ")[2].split()[0])
    return status, await reader.readexactly(length)


def measure_folder(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


async def send_in_steps(writer, content, step):
    for start in range(0, len(content), step):
        writer.write(content[start : start + step])
        await writer.drain()
        await asyncio.sleep(0)


@settings(deadline=None, max_examples=25)
@given(requests=st.lists(st.tuples(sizes, kinds), min_size=1, max_size=4), step=steps)
def test_requests_that_follow_each_other_at_once_get_each_their_own_bytes(requests, step):
    async def talk():
        async with serving(App()) as address:
            reader, writer = await asyncio.open_connection(*address)
            content = b"".join(request_of(size, kind, step) for size, kind in requests)
            sending = asyncio.create_task(send_in_steps(writer, content, step))
            for size, _ in requests:
                expected = hashlib.sha256(CONTENT[:size]).hexdigest().encode()
                assert await read_answer(reader) == (200, expected)
            await sending
            writer.close()

    asyncio.run(talk())


def test_a_client_that_waits_to_be_asked_is_asked():
    async def talk():
        async with serving(App()) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(head_of(len(CONTENT), "expect"))
            assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30) == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(CONTENT)
            assert (await read_answer(reader))[0] == 200
            writer.close()

    asyncio.run(talk())


@pytest.mark.parametrize("kind", ["length", "chunked"])
@pytest.mark.parametrize("most_bytes", [0, PIECE_BYTES])
def test_who_is_refused_may_send_the_rest_and_then_another_request(kind, most_bytes):
    async def talk():
        async with serving(App(most_bytes)) as address:
            reader, writer = await asyncio.open_connection(*address)
            for _ in range(2):
                await send_in_steps(writer, request_of(len(CONTENT), kind, 100_000), 100_000)
                assert await read_answer(reader) == (400, b"")
            writer.write(head_of(0))
            assert (await read_answer(reader))[0] == 200
            writer.close()

    asyncio.run(talk())


@pytest.mark.parametrize("sent", [0, 10, PIECE_BYTES, PIECE_BYTES + 10])
def test_an_upload_that_is_cut_short_is_never_finished(sent):
    async def talk():
        app = App()
        async with serving(app) as address:
            _, writer = await asyncio.open_connection(*address)
            writer.write(head_of(len(CONTENT)) + CONTENT[:sent])
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            while not app.refusals:
                await asyncio.sleep(0.01)
        assert app.refusals == ["The upload was cut short."]

    asyncio.run(asyncio.wait_for(talk(), 30))


@pytest.mark.parametrize("pause_s", [0.0, 0.35])
def test_a_body_that_stops_coming_ends_the_connection_and_a_slow_one_does_not(monkeypatch, pause_s):
    monkeypatch.setattr(connections, "_BODY_PAUSE_S", 1.5)
    monkeypatch.setattr(connections, "_WATCH_S", 0.05)

    async def talk():
        app = App()
        async with serving(app) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(head_of(70_000) + CONTENT[:20_000])
            for start in range(20_000, 70_000, 10_000) if pause_s else ():
                await asyncio.sleep(pause_s)
                writer.write(CONTENT[start : start + 10_000])
            if pause_s:
                assert (await read_answer(reader))[0] == 200
            else:
                assert await asyncio.wait_for(reader.read(), 30) == b""
                assert app.refusals == ["The upload was cut short."]
            writer.close()

    asyncio.run(talk())


@pytest.mark.parametrize(
    "head",
    [
        head_of(5, more="Content-Length: 5\r\n"),
        head_of(5, more="Content-Length: 6\r\n"),
        head_of("5x"),
        head_of("-5"),
        head_of("+5"),
        head_of("5, 5"),
        head_of("9" * 5000),
        head_of(5, more="Transfer-Encoding: chunked\r\n"),
    ],
)
def test_a_body_whose_length_is_in_doubt_is_refused(head):
    async def talk():
        async with serving(App()) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(head + b"12345")
            answer = await asyncio.wait_for(reader.read(), 30)
            assert answer.startswith(b"HTTP/1.1 400"), answer
            assert answer.count(b"HTTP/1.1") == 1
            writer.close()

    asyncio.run(talk())


def test_a_length_behind_a_chunked_body_is_refused():
    async def talk():
        async with serving(App()) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(head_of(0, "chunked") + b"5\r\n12345\r\n0\r\nContent-Length: 9\r\n")
            await asyncio.sleep(0.1)
            writer.write(b"\r\n" + head_of(0))
            assert (await asyncio.wait_for(reader.read(), 30)).startswith(b"HTTP/1.1 400")
            writer.close()

    asyncio.run(talk())


def test_many_uploads_at_once_hold_little_memory(hub):
    """Each has sent more than it may take of the memory, and waits."""
    uploads, sent_bytes = 20, 8 << 20
    incoming = hub.root / "incoming"
    before_bytes = measure_folder(incoming)
    with Client(hub) as client, ExitStack() as held:
        client.create("many")
        peak_kb = read_peak_kb(hub)
        for number in range(uploads):
            link = urlsplit(client.batch("many", f"{number:064x}", 200_000_000)["actions"]["upload"]["href"])
            connection = held.enter_context(socket.create_connection((link.hostname, link.port), timeout=60))
            connection.sendall(f"PUT {link.path} HTTP/1.1\r\nHost: h\r\nContent-Length: 200000000\r\n\r\n".encode())
            connection.sendall(bytes(sent_bytes))
        while measure_folder(incoming) - before_bytes < uploads * (sent_bytes - PIECE_BYTES):
            time.sleep(0.05)
        assert read_peak_kb(hub) - peak_kb < 60_000
