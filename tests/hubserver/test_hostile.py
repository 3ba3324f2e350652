"""Requests that no honest client sends: each is a 4xx with a sentence, and nothing changes."""

import hashlib
import io
import json
from contextlib import suppress

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_moe.hubserver.cards import count_parameters, find_tags, parse_object, read_card
from hub_moe.hubserver.downloads import find_range
from hub_moe.hubserver.ndjson import read_header, read_operations
from hub_moe.hubserver.signing import read_signed, sign
from hub_moe.hubserver.store.errors import ForbiddenError, InvalidInputError
from hub_moe.hubserver.store.shards import parse_shard
from hub_moe.hubserver.store.xorb_format import XorbReader

from .client_over_http import Client

HEADER = '{"key": "header", "value": {"summary": "m"}}\n'
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
lines = st.builds(
    lambda key, value, raw: raw if raw is not None else json.dumps({"key": key, "value": value}),
    st.sampled_from(["file", "lfsFile", "deletedFile", "deletedFolder", "header", "copy"]),
    st.fixed_dictionaries(
        {}, optional={"path": json_values, "content": json_values, "encoding": json_values, "oid": json_values}
    )
    | json_values,
    st.none() | st.text(),
)


@pytest.fixture(scope="module")
def client(hub):
    with Client(hub) as client:
        client.create("hostile")
        client.send("POST", "/api/models/alice/hostile/discussions", json={"title": "Talk"}).raise_for_status()
        yield client


@given(st.lists(lines, max_size=4))
def test_any_commit_body_is_read_or_refused(body):
    stream = io.BytesIO("\n".join(body).encode("utf-8", "surrogatepass"))
    with suppress(InvalidInputError):
        read_header(stream)
        list(read_operations(stream))


@given(st.binary(max_size=300))
def test_any_bytes_are_a_commit_body_or_refused(body):
    with suppress(InvalidInputError):
        read_header(io.BytesIO(body))


@given(st.text() | st.builds("---\n{}\n---\n".format, st.text()))
def test_any_readme_is_a_card_that_json_can_carry(text):
    card = read_card(text)
    json.dumps(card.data, allow_nan=False).encode()
    find_tags("model", card, [], {})
    find_tags("dataset", card, [], {})


@pytest.mark.parametrize("text", ["a: !!int ''", "a: !!bool x", "a: !!timestamp x", "a: 0001-01-01T00:00:00-99:00"])
def test_a_value_that_is_not_what_its_tag_says_is_an_error(text):
    assert read_card(f"---\n{text}\n---\n").errors


@given(json_values)
def test_any_yaml_value_can_be_a_card(value):
    try:
        text = json.dumps({"tags": value, "license": value, "base_model": value, "model-index": value})
    except ValueError:
        return
    json.dumps(read_card(f"---\n{text}\n---\n").data, allow_nan=False)


@given(st.binary() | json_values.map(lambda value: json.dumps({"t": value}).encode()))
def test_any_header_of_weights_is_counted_or_left_out(header):
    count_parameters([header])
    json.dumps(parse_object(header), allow_nan=False)


@given(st.binary(max_size=200))
def test_any_shard_and_xorb_is_read_or_refused(content):
    tag = b"HFRepoMetaData\0\x55\x69\x67\x45\x6a\x7b\x81\x57\x83\xa5\xbd\xd9\x5c\xcd\xd1\x4a\xa9" + bytes(16)
    for shard in (content, tag + content):
        with suppress(InvalidInputError):
            parse_shard(shard)
    with suppress(InvalidInputError):
        XorbReader().feed(content)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 50))
def test_a_range_never_leaves_the_file(first, last, size):
    start, end = find_range(str(first), str(last), size_bytes=size)
    assert start > end or 0 <= start <= end < size
    start, end = find_range("", str(last), size_bytes=size)
    assert start > end or 0 <= start <= end < size


@given(st.text(max_size=60))
def test_a_link_is_good_only_as_it_was_signed(change):
    link = sign(b"secret", "upload", {"oid": "x"})
    for forged in (change, link + change, change + link):
        if forged != link:
            with pytest.raises(ForbiddenError):
                read_signed(b"secret", "upload", forged)
    with pytest.raises(ForbiddenError, match="not for"):
        read_signed(b"secret", "download", link)
    with pytest.raises(ForbiddenError, match="expired"):
        read_signed(b"secret", "upload", sign(b"secret", "upload", {}, life_s=-1))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b'{"key": "file", "value": {}}',
        HEADER.encode() + b"{",
        HEADER.encode() + b'{"key": "file", "value": {"path": "../x", "content": "", "encoding": "base64"}}',
        HEADER.encode() + b'{"key": "file", "value": {"path": "/x", "content": "", "encoding": "base64"}}',
        HEADER.encode() + b'{"key": "file", "value": {"path": "x", "content": "%", "encoding": "base64"}}',
        HEADER.encode() + b'{"key": "file", "value": {"path": "x\\ud800", "content": "", "encoding": "base64"}}',
        HEADER.encode() + b'{"key": "lfsFile", "value": {"path": "x", "algo": "sha256", "oid": "../../secret"}}',
        HEADER.encode() + b'{"key": "lfsFile", "value": {"path": "x", "algo": "sha256", "oid": "' + b"0" * 64 + b'"}}',
        HEADER.encode() + b"[" * 50_000,
        b'{"key": "header", "value": {"summary": ""}}\n',
    ],
)
def test_a_malformed_commit_is_refused_with_a_sentence(client, body):
    answer = client.commit_body("hostile", body)
    assert answer.status_code in {400, 422}
    assert answer.json()["error"]


@pytest.mark.parametrize(
    "path",
    [
        *["/alice/hostile/resolve/main/../../../hub.sqlite3", "/alice/hostile/resolve/main/%2e%2e%2f%2e%2e%2fsecret"],
        *["/alice/hostile/resolve/main//etc/passwd", "/alice/hostile/resolve/..%2f..%2fsecret/x"],
        *["/alice/hostile/resolve/main/%ff", "/alice/hostile/resolve/main/%00", "/alice%2f..%2fx/y/resolve/main/z"],
        *["/api/models/alice/hostile/tree/main/..%2f..", "/api/models/alice/hostile/tree/refs%2f..%2fx"],
        *["/api/models/alice/hostile/revision/HEAD%5e", "/api/models/../x/revision/main", "/api/models?sort=x"],
        *["/api/models/alice/hostile?expand=nothing", "/api/models/alice/hostile/commits/main?p=-1", "/api/nothing"],
        *["/lfs/download/x.y", "/xet/v1/chunks/default/x", "/api/models/alice/hostile/xet-write-token%00/x"],
    ],
)
def test_a_hostile_address_finds_nothing(client, path):
    answer = client.send("GET", path)
    assert 400 <= answer.status_code < 500
    assert "Traceback" not in answer.text


def test_a_false_sha256_or_size_is_refused_and_leaves_nothing(client):
    oid = hashlib.sha256(b"right").hexdigest()
    action = client.batch("hostile", oid, 5)["actions"]["upload"]
    for content in (b"wrong", b"right but longer", b"cut"):
        assert 400 <= httpx2.put(action["href"], content=content).status_code < 500
    assert "actions" in client.batch("hostile", oid, 5)
    assert httpx2.put(action["href"], content=b"right").status_code == 200
    assert "actions" not in client.batch("hostile", oid, 5)


def test_a_request_that_announces_terabytes_is_refused_before_links_are_made(client):
    objects = [{"oid": f"{number:064x}", "size": 1 << 40} for number in range(1000)]
    body = {"operation": "upload", "transfers": ["multipart"], "objects": objects}
    answer = client.send("POST", "/alice/hostile.git/info/lfs/objects/batch", json=body)
    assert (answer.status_code, len(answer.content) < 500) == (413, True)


def test_a_link_for_one_purpose_or_file_is_no_good_for_another(client):
    oid = hashlib.sha256(b"other").hexdigest()
    href = client.batch("hostile", oid, 5)["actions"]["upload"]["href"]
    assert httpx2.get(href.replace("/upload/", "/download/")).status_code == 403
    assert httpx2.put(href[:-2] + "xx", content=b"other").status_code == 403


def test_the_content_of_anothers_private_repo_cannot_be_claimed(hub, client):
    with Client(hub, "bob") as bob:
        bob.create("secret", visibility="private")
        oid = bob.upload("secret", b"bob's weights")
    assert "actions" in client.batch("hostile", oid, 13)
    body = {"operation": "download", "objects": [{"oid": oid, "size": 13}]}
    answer = client.send("POST", "/alice/hostile.git/info/lfs/objects/batch", json=body)
    assert answer.json()["objects"][0]["error"]["code"] == 404
    assert client.send("POST", "/bob/secret.git/info/lfs/objects/batch", json=body).status_code == 404


def test_a_large_body_without_a_token_is_refused(hub, client):
    with Client(hub, None) as nobody:
        assert nobody.send("POST", "/api/validate-yaml", content=b"x" * 2_000_000).status_code == 413


def test_a_pattern_of_many_stars_holds_up_nobody(client):
    body = {"files": [{"path": "a" * 60, "size": 1, "sample": ""}], "gitIgnore": "*a" * 40 + "b"}
    answer = client.send("POST", "/api/models/alice/hostile/preupload/main", json=body, timeout=10)
    assert answer.json()["files"][0]["shouldIgnore"] is False
    answer = client.send("POST", "/api/models/alice/hostile/preupload/main", json=body | {"gitIgnore": "a" * 70_000})
    assert (answer.status_code, "gitIgnore" in answer.json()["error"]) == (400, True)


def test_what_is_refused_is_not_done(client):
    client.create("refused").raise_for_status()
    talk = "/api/models/alice/refused/discussions"
    long = "x" * 70_000
    assert client.commit("refused", {"a": b"1"}, header={"description": long}, create_pr="1").status_code == 400
    assert client.send("POST", talk, json={"title": "Talk", "description": long}).status_code == 400
    assert (
        client.send("POST", talk, json={"title": "Talk", "pullRequest": True, "description": long}).status_code == 400
    )
    assert client.send("GET", talk).json()["count"] == 0
    assert client.send("GET", "/api/models/alice/refused/refs?include_prs=1").json()["pullRequests"] == []
    assert client.send("POST", talk, json={"title": "Talk", "description": "  "}).status_code == 200
    client.commit("refused", {"a": b"1"}, header={"description": " "}, create_pr="1").raise_for_status()
    number = client.send("GET", talk).json()["discussions"][0]["num"]
    for body in (b'{"comment": 5}', json.dumps({"comment": long}), b"[]", b"{"):
        assert client.send("POST", f"{talk}/{number}/merge", content=body).status_code == 400
    for comment in (5, long):
        body = {"status": "closed", "comment": comment}
        assert client.send("POST", f"{talk}/{number}/status", json=body).status_code == 400
    shown = client.send("GET", f"{talk}/{number}").json()
    assert (shown["status"], [event["type"] for event in shown["events"]]) == ("open", ["comment", "commit"])
    assert client.send("POST", f"{talk}/{number}/merge", json={"comment": "thanks"}).status_code == 200
    assert client.send("GET", f"{talk}/{number}").json()["events"][-1]["data"]["latest"]["raw"] == "thanks"


def test_a_pull_request_for_a_branch_that_is_gone_is_still_shown(client):
    client.create("gone").raise_for_status()
    client.send("POST", "/api/models/alice/gone/branch/side", json={}).raise_for_status()
    line = b'{"key": "file", "value": {"path": "a", "content": "1"}}'
    path = "/api/models/alice/gone/commit/side?create_pr=1"
    client.send("POST", path, content=HEADER.encode() + line).raise_for_status()
    client.send("DELETE", "/api/models/alice/gone/branch/side").raise_for_status()
    shown = client.send("GET", "/api/models/alice/gone/discussions/1?diff=1").json()
    assert (shown["status"], shown["diff"], shown["filesWithConflicts"]) == ("open", None, [])
    assert client.send("GET", "/alice/gone/discussions/1").status_code == 200


def test_a_file_is_never_a_page_of_this_site(client):
    client.commit("hostile", {"x.html": b"<script>alert(1)</script>"})
    answer = client.send("GET", "/alice/hostile/resolve/main/x.html")
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("asked", "status", "length"),
    [("bytes=0-3", 206, 4), ("bytes=4-", 206, 6), ("bytes=-2", 206, 2), ("bytes=20-", 416, None), ("lines=1", 200, 10)],
)
@pytest.mark.parametrize("as_large", [False, True])
def test_ranges(client, asked, status, length, as_large):
    client.commit("hostile", {"r.txt": b"0123456789"}, as_large=as_large)
    answer = client.send("GET", "/alice/hostile/resolve/main/r.txt", headers={"range": asked})
    assert answer.status_code == status or (asked == "lines=1" and answer.status_code == 400)
    if length and answer.status_code < 300:
        assert len(answer.content) == length
    head = client.send("HEAD", "/alice/hostile/resolve/main/r.txt")
    assert (head.headers["content-length"], head.content) == ("10", b"")


def test_an_upload_in_parts_arrives_whole_and_needs_every_part(tmp_path):
    from hub_moe.hubserver.pytest_plugin import create_hub

    hub = create_hub(tmp_path / "hub", options=("--part-bytes", "1000"))
    hub.start()
    with Client(hub) as client:
        client.create("m")
        content = b"0123456789" * 250
        assert client.commit("m", {"w.bin": content}, as_large=True).status_code == 200
        assert client.send("GET", "/alice/m/resolve/main/w.bin").content == content
        action = client.batch("m", "0" * 64, 2500)["actions"]["upload"]
        assert httpx2.put(action["href"], content=b"").status_code == 400
        assert httpx2.put(action["header"]["1"], content=b"x" * 1001).status_code == 413
        complete = {"oid": "0" * 64, "parts": [{}, {}, {}]}
        assert httpx2.post(action["href"], json=complete).status_code == 404
    hub.stop()
