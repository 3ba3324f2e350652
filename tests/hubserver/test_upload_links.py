"""Links for large files in wrong hands, used again or too late: only who sent the bytes has them."""

import hashlib
import socket
import time
from urllib.parse import urlsplit

import httpx2
import pytest

from hub_moe.hubserver.pytest_plugin import create_hub

from .client_over_http import Client

CONTENT = b"0123456789" * 250
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PARTS = {"oid": SHA256, "parts": [{}, {}, {}]}


@pytest.fixture(scope="module")
def small_parts(tmp_path_factory):
    with create_hub(tmp_path_factory.mktemp("parts") / "hub", options=("--part-bytes", "1000")).running() as hub:
        yield hub


@pytest.fixture
def alice(small_parts):
    with Client(small_parts) as client:
        client.create("open").raise_for_status() if client.send("GET", "/api/models/alice/open").is_error else None
        yield client


@pytest.fixture
def bob(small_parts):
    with Client(small_parts, "bob") as client:
        client.create("thief").raise_for_status() if client.send("GET", "/api/models/bob/thief").is_error else None
        yield client


def test_knowing_the_sha256_of_anothers_file_gives_nobody_its_bytes(alice, bob):
    alice.commit("open", {"w.bin": CONTENT}, as_large=True).raise_for_status()
    actions = bob.batch("thief", SHA256, len(CONTENT))["actions"]
    assert httpx2.post(actions["verify"]["href"]).status_code == 404
    assert httpx2.post(actions["upload"]["href"], json=PARTS).status_code == 404
    with pytest.raises(httpx2.HTTPStatusError, match="400"):
        bob.put(actions["upload"], bytes(len(CONTENT)), SHA256)
    assert "actions" in bob.batch("thief", SHA256, len(CONTENT))
    bob.put(actions["upload"], CONTENT, SHA256)
    assert httpx2.post(actions["verify"]["href"]).status_code == 200
    assert httpx2.post(actions["upload"]["href"], json=PARTS).status_code == 200  # again, as after a lost answer
    assert bob.batch("thief", SHA256, len(CONTENT)).get("actions") is None


def test_a_part_that_is_held_open_cannot_be_written_into_the_stored_file(alice):
    content = b"abcdefghij" * 250
    sha256 = hashlib.sha256(content).hexdigest()
    action = alice.batch("open", sha256, len(content))["actions"]["upload"]
    link = urlsplit(action["header"]["1"])
    with socket.create_connection((link.hostname, link.port)) as held:
        held.sendall(f"PUT {link.path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode())
        time.sleep(0.3)
        for number in (1, 2, 3):
            part = content[(number - 1) * 1000 : number * 1000]
            httpx2.put(action["header"][str(number)], content=part).raise_for_status()
        answer = httpx2.post(action["href"], json=PARTS)
        assert (answer.status_code, "still being sent" in answer.json()["error"]) == (409, True)
        held.sendall(b"E" * 1000)
        assert held.recv(20).startswith(b"HTTP/1.1 200")
    assert httpx2.post(action["href"], json=PARTS).status_code == 400
    alice.put(action, content, sha256)
    assert httpx2.put(action["header"]["1"], content=b"E" * 1000).status_code == 409
    alice.commit("open", {"x.bin": content}, as_large=True).raise_for_status()
    assert alice.send("GET", "/alice/open/resolve/main/x.bin").content == content
