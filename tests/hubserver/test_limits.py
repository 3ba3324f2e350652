"""What strangers may take of a Hub's memory, disk and time."""

import socket

import pytest

from hub_moe.errors import ConfigError
from hub_moe.hubserver.store import Store

from .client_over_http import Client


def send_raw(hub, content):
    host, _, port = hub.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(content)
        return connection.recv(1000)


def test_a_long_head_is_refused_and_ordinary_long_ones_are_not(hub):
    assert b" 200 " in send_raw(hub, b"GET /api/models HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 20_000 + b"\r\n\r\n")
    assert b" 431 " in send_raw(hub, b"GET /api/models HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 100_000)


def test_many_requests_on_one_connection_are_not_taken_for_one_long_head(hub):
    with Client(hub) as client:
        for _ in range(20):
            assert client.send("GET", "/api/agent-harnesses", headers={"x": "a" * 9_000}).status_code == 200


def test_an_authorization_header_that_nobody_checks_allows_no_large_body(hub):
    with Client(hub) as client:
        answer = client.send("GET", "/static/style.css", content=b"0" * 3_000_000)
        assert answer.status_code == 413
        signed_by_nobody = client.send("GET", "/xet/xorb/none", content=b"0" * 3_000_000)
        assert signed_by_nobody.status_code == 413


def test_a_key_that_was_cut_short_is_refused_and_a_new_one_is_whole(tmp_path):
    with Store(tmp_path) as store:
        assert len(store.secret) == 32
    (tmp_path / "secret").write_bytes(b"")
    with pytest.raises(ConfigError, match="secret is damaged"):
        Store(tmp_path)


def test_a_fetch_that_asks_again_and_again_is_cut_short(hub):
    with Client(hub) as client:
        client.create("asks")
        head = client.commit("asks", {"a": b"1"}).json()["commitOid"]
        lines = [b"want %s multi_ack_detailed\n" % head.encode(), b""]
        lines += [b"have %s\n" % head.encode(), b""] + [b""] * 5000
        body = b"".join(b"%04x" % (len(line) + 4) + line if line else b"0000" for line in lines)
        kind = "application/x-git-upload-pack-request"
        answer = client.send("POST", "/alice/asks.git/git-upload-pack", content=body, headers={"content-type": kind})
        assert answer.content.count(b"NAK") <= 1001


def test_a_long_name_of_a_branch_is_refused(hub):
    with Client(hub) as client:
        client.create("branches")
        answer = client.send("POST", "/api/models/alice/branches/branch/" + "%C3%A9" * 150, json={})
        assert answer.status_code == 400
