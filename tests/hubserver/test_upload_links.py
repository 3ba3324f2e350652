"""Links for large files in wrong hands, used again or too late: only who sent the bytes has them."""

import asyncio
import hashlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Timer
from urllib.parse import urlsplit

import httpx2
import pytest

from hub_moe.hubserver.app import build_app
from hub_moe.hubserver.pytest_plugin import create_hub
from hub_moe.hubserver.signing import sign
from hub_moe.hubserver.store import RepoId, Store

from .client_over_http import Client
from .xet_by_hand import File, XetClient, Xorb, pack_shard

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


def test_a_link_that_takes_bytes_completes_nothing(alice):
    whole = alice.batch("open", "2" * 64, 5)["actions"]["upload"]
    part = alice.batch("open", "2" * 64, 2500)["actions"]["upload"]["header"]["1"]
    for link in (whole["href"], part):
        answer = httpx2.post(link, json={"oid": "2" * 64, "parts": [{}, {}, {}]})
        assert (answer.status_code, "by PUT" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize("transfers", [1, "basic", {"basic": 1}, True])
def test_a_batch_whose_transfers_are_no_list_is_refused_with_a_sentence(alice, transfers):
    body = {"operation": "upload", "transfers": transfers, "objects": [{"oid": "2" * 64, "size": 2500}]}
    answer = alice.send("POST", "/alice/open.git/info/lfs/objects/batch", json=body)
    assert (answer.status_code, answer.json()["error"]) == (400, "'transfers' must be a list of names.")


def test_the_hub_answers_others_while_a_part_waits_for_its_upload_to_be_joined(tmp_path):
    async def ask(store, part, upload):
        transport = httpx2.ASGITransport(app=build_app(store))
        async with httpx2.AsyncClient(transport=transport, base_url="http://hub") as client:
            waiting = asyncio.create_task(client.put(f"/lfs/upload/{part}", content=b"x"))
            await asyncio.sleep(0.2)
            answer = await client.get("/api/models/alice/m")
            assert (answer.status_code, upload.lock.locked()) == (200, True)
            return await waiting

    with Store(tmp_path / "hub") as store:
        store.accounts.add_user("alice")
        alice = store.accounts.identify(store.accounts.create_token("alice"))
        repo = store.repos.create(RepoId("model", "alice", "m"), alice)
        fields = {"repo": repo.uid, "by": alice.token_id, "oid": "0" * 64, "upload": "3" * 64}
        part = sign(store.secret, "upload", fields | {"part": 1, "offset": 0, "part_size": 1})
        upload = store.parts._find("3" * 64)
        upload.lock.acquire()  # as `complete` does while it hashes
        Timer(1.5, upload.lock.release).start()
        assert _run_elsewhere(lambda: asyncio.run(ask(store, part, upload))).status_code == 200


def test_a_link_ends_with_the_token_for_which_it_was_made(small_parts, alice):
    basic = alice.batch("open", hashlib.sha256(b"late").hexdigest(), 4)["actions"]
    many = alice.batch("open", "1" * 64, 2500)["actions"]["upload"]
    with _other_token(small_parts) as late:
        links = late.batch("open", hashlib.sha256(b"late").hexdigest(), 4)["actions"]
        parts = late.batch("open", "1" * 64, 2500)["actions"]["upload"]
    answers = [
        httpx2.put(links["upload"]["href"], content=b"late"),
        httpx2.post(links["verify"]["href"]),
        httpx2.put(parts["header"]["1"], content=bytes(1000)),
        httpx2.post(parts["href"], json=PARTS),
    ]
    assert [answer.status_code for answer in answers] == [401] * 4
    assert "revoked" in answers[0].json()["error"]
    assert httpx2.put(many["header"]["1"], content=bytes(1000)).status_code == 200
    assert httpx2.put(basic["upload"]["href"], content=b"late").status_code == 200


def test_a_xet_token_ends_with_the_token_for_which_it_was_made(small_parts, alice):
    file = File([(Xorb([b"some bytes"]), 0, 1)])
    with _other_token(small_parts, XetClient) as late:
        late.add("alice/open", file).raise_for_status()
        write, read = late.token("write", "alice/open"), late.token("read", "alice/open")
        found = late.cas("GET", f"/v1/reconstructions/{file.true_name}", read).json()
    with XetClient(small_parts) as client:
        (part,) = next(iter(found["fetch_info"].values()))
        asked = {"range": f"bytes={part['url_range']['start']}-{part['url_range']['end']}"}
        answers = [
            client.cas("POST", "/v1/shards", write, content=pack_shard(file)),
            client.cas("POST", f"/v1/xorbs/default/{file.runs[0][0].name}", write, content=file.runs[0][0].body),
            client.cas("GET", f"/v1/reconstructions/{file.true_name}", read),
            httpx2.get(part["url"], headers=asked),
        ]
    assert [answer.status_code for answer in answers] == [401] * 4


@pytest.mark.parametrize("user", ["alice", None])
@pytest.mark.parametrize("end", ["delete the repo", "delete the file", "make it private"])
def test_a_link_to_a_file_ends_with_the_file_or_the_right_to_read_it(small_parts, alice, user, end):
    name = f"{end}-{user}".replace(" ", "-")
    alice.create(name).raise_for_status()
    sha256 = alice.upload(name, b"weights")
    body = {"operation": "download", "objects": [{"oid": sha256, "size": 7}]}
    with XetClient(small_parts, user) as reader:
        batch = reader.send("POST", f"/alice/{name}.git/info/lfs/objects/batch", json=body).json()
        link, token = batch["objects"][0]["actions"]["download"]["href"], reader.token("read", f"alice/{name}")
        assert httpx2.get(link).content == b"weights"
        if end == "delete the repo":
            alice.send("DELETE", "/api/repos/delete", json={"name": name}).raise_for_status()
        elif end == "delete the file":
            path = f"/api/models/alice/{name}/lfs-files/batch"
            alice.send("POST", path, json={"deletions": {"sha": [sha256]}}).raise_for_status()
        else:
            alice.send("PUT", f"/api/models/alice/{name}/settings", json={"private": True}).raise_for_status()
        may_read = user and end == "make it private"
        assert httpx2.get(link).status_code == (200 if may_read else 404)
        answer = reader.cas("GET", f"/v1/reconstructions/{'0' * 64}", token)
        reason = "no file with the Xet name" if may_read or end == "delete the file" else "Repository not found"
        assert (answer.status_code, reason in answer.text) == (404, True)


def _other_token(hub, kind=Client):
    """A client of alice's with a token that is revoked at the end of the block."""

    class Revoked(kind):
        def __exit__(self, *_):
            with Store(hub.root) as store:
                store.accounts.revoke_token("alice", "other")
            super().__exit__(*_)

    client = Revoked(hub)
    with Store(hub.root) as store:
        client.headers = {"authorization": f"Bearer {store.accounts.create_token('alice', name='other')}"}
    return client


def _run_elsewhere(work):
    """In a thread of its own: this one may have an event loop already, of the browser tests."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()
