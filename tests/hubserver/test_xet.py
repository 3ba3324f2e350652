"""The Xet routes, spoken by hand and by the real hf_xet: who gets which bytes, and what is refused."""

import hashlib
import json
import random
import subprocess
import sys
from dataclasses import replace

import httpx2
import pytest
from blake3 import blake3

from hub_moe.hubserver.pytest_plugin import create_hub
from hub_moe.hubserver.signing import sign
from hub_moe.hubserver.store import RepoId, Store
from hub_moe.hubserver.store.gc import collect
from hub_moe.hubserver.store.xet_hashes import format_hash, hash_chunk, hash_term

from .xet_by_hand import File, XetClient, Xorb, pack_shard

CHANCE = random.Random(1)
SHARED = [CHANCE.randbytes(2000) for _ in range(4)]


@pytest.fixture(scope="module")
def alice(hub):
    with XetClient(hub) as alice:
        alice.create("xet-open").raise_for_status()
        alice.create("xet-other").raise_for_status()
        alice.create("xet-closed", visibility="private").raise_for_status()
        yield alice


@pytest.fixture
def bob(hub, alice):
    with XetClient(hub, "bob") as bob:
        bob.create("xet-bob")
        yield bob


@pytest.fixture(scope="module")
def xorb(alice):
    """A xorb that an open and a private file share: the open one has its chunks 0 and 1, the private one 2 and 3."""
    xorb = Xorb(SHARED)
    alice.add("alice/xet-open", File([(xorb, 0, 2)])).raise_for_status()
    alice.add("alice/xet-closed", File([(xorb, 2, 4)])).raise_for_status()
    alice.commit_large("xet-open", "w.bin", sha256_of(File([(xorb, 0, 2)]))).raise_for_status()
    return xorb


def sha256_of(file):
    return hashlib.sha256(file.content).hexdigest()


def test_a_file_comes_back_by_both_versions_and_over_http(alice, xorb):
    file, token = File([(xorb, 0, 2)]), alice.token("read", "alice/xet-open")
    old = alice.cas("GET", f"/v1/reconstructions/{file.true_name}", token).json()
    new = alice.cas("GET", f"/v2/reconstructions/{file.true_name}", token).json()
    assert old["terms"] == new["terms"]
    part, entry = old["fetch_info"][xorb.name][0], new["xorbs"][xorb.name][0]
    assert (part["range"], part["url_range"]) == (entry["ranges"][0]["chunks"], entry["ranges"][0]["bytes"])
    place = part["url_range"]
    for url in (part["url"], entry["url"]):
        answer = httpx2.get(url, headers={"range": f"bytes={place['start']}-{place['end']}"})
        assert (answer.status_code, answer.content) == (206, xorb.body[place["start"] : place["end"] + 1])
    for headers, status, content in [
        ({}, 200, file.content),
        ({"range": "bytes=1990-2010"}, 206, file.content[1990:2011]),
        ({"range": "bytes=-5"}, 206, file.content[-5:]),
        ({"range": "bytes=9999-"}, 416, b""),
        ({"range": "bytes=0-1", "if-range": '"another"'}, 200, file.content),
    ]:
        answer = alice.send("GET", "/alice/xet-open/resolve/main/w.bin", headers=headers)
        assert (answer.status_code, answer.content) == (status, content)
    head = alice.send("HEAD", "/alice/xet-open/resolve/main/w.bin")
    assert head.headers["content-length"] == str(len(file.content))
    assert head.headers["x-xet-hash"] == file.true_name


@pytest.mark.parametrize("asked", ["bytes=0-1", "bytes=1500-2000"])
def test_a_range_of_a_file_names_only_the_terms_it_needs(alice, asked):
    first, second = Xorb([CHANCE.randbytes(1000)]), Xorb([CHANCE.randbytes(1500)])
    file = File([(first, 0, 1), (second, 0, 1)])
    alice.add("alice/xet-open", file).raise_for_status()
    token = alice.token("read", "alice/xet-open")
    answer = alice.cas("GET", f"/v1/reconstructions/{file.true_name}", token, headers={"range": asked}).json()
    expected = (first.name, 0) if asked == "bytes=0-1" else (second.name, 500)
    assert ([term["hash"] for term in answer["terms"]], answer["offset_into_first_range"]) == (
        [expected[0]],
        expected[1],
    )
    past = alice.cas("GET", f"/v1/reconstructions/{file.true_name}", token, headers={"range": "bytes=2500-2600"})
    assert past.status_code == 416


@pytest.mark.parametrize(
    "asked", [None, "bytes=0-999999", "bytes={start}-{after}", "bytes=0-", "bytes=-5", "bytes=9-3"]
)
def test_a_link_to_a_xorb_gives_no_byte_of_anothers_file(alice, xorb, asked):
    token = alice.token("read", "alice/xet-open")
    answer = alice.cas("GET", f"/v1/reconstructions/{File([(xorb, 0, 2)]).true_name}", token).json()
    (part,) = answer["fetch_info"][xorb.name]
    place = part["url_range"]
    assert place["end"] < len(xorb.body) // 2 + 16
    headers = {"range": asked.format(start=place["start"], after=place["end"] + 1)} if asked else {}
    answer = httpx2.get(part["url"], headers=headers)
    assert answer.status_code == 403
    assert "good for the range" in answer.json()["error"]


def test_the_name_of_a_private_xorb_is_not_enough_to_read_it(bob, xorb):
    secret = File([(xorb, 2, 4)])
    guess = [hash_term(b"".join(map(hash_chunk, SHARED[:2])))]
    token = bob.token("write", "bob/xet-bob")
    answer = bob.cas("POST", "/v1/shards", token, content=pack_shard(secret.but(proofs=guess)))
    assert answer.status_code == 400
    assert "verification entry" in answer.json()["error"]
    read = bob.token("read", "bob/xet-bob")
    assert bob.cas("GET", f"/v1/reconstructions/{secret.true_name}", read).status_code == 404
    assert "actions" in bob.batch("xet-bob", sha256_of(secret), len(secret.content))


def test_nobody_learns_whether_another_has_a_xorb(bob, xorb):
    token = bob.token("write", "bob/xet-bob")
    asked = {"length": len(xorb.body), "checksum": {"algo": "crc64nvme", "value": "1"}}
    assert bob.cas("POST", f"/v1/xorb-grants/default/{xorb.name}", token, json=asked).status_code == 404
    known = bob.cas("POST", f"/v1/xorbs/default/{xorb.name}", token, content=xorb.body)
    fresh = Xorb([CHANCE.randbytes(100)])
    unknown = bob.cas("POST", f"/v1/xorbs/default/{fresh.name}", token, content=fresh.body)
    assert (known.status_code, known.json()) == (unknown.status_code, unknown.json()) == (200, {"was_inserted": True})


@pytest.mark.parametrize("known", [False, True])
def test_a_false_xorb_is_refused_whether_somebody_has_the_true_one_or_not(bob, xorb, known):
    name = xorb.name if known else Xorb([b"nobody has this"]).name
    token = bob.token("write", "bob/xet-bob")
    for body in (b"x", Xorb([b"another"]).body):
        answer = bob.cas("POST", f"/v1/xorbs/default/{name}", token, content=body)
        assert (answer.status_code, "cut short" in answer.text or "have the hash" in answer.text) == (400, True)


def test_a_shard_about_anothers_xorb_is_answered_like_one_about_a_xorb_that_nobody_has(alice, bob, xorb):
    unknown = Xorb([CHANCE.randbytes(2000) for _ in range(4)])

    def ask(client, repo, one, **claim):
        term = replace(one.term(2, 4), **claim)
        shard = pack_shard(File([(one, 2, 4)], terms=[term], proofs=[bytes(32)]))
        answer = client.cas("POST", "/v1/shards", client.token("write", repo), content=shard)
        return answer.status_code, answer.json()["error"].replace(one.name, "X")

    for claim in ({}, {"end": 300}, {"size_bytes": 1}):
        assert ask(bob, "bob/xet-bob", xorb, **claim) == ask(bob, "bob/xet-bob", unknown, **claim)
        assert "is not here, or" not in ask(alice, "alice/xet-closed", xorb, **claim)[1]


def test_who_has_the_xorb_in_this_repo_need_not_send_it_again(alice, xorb):
    token = alice.token("write", "alice/xet-open")
    assert alice.cas("POST", f"/v1/xorb-grants/default/{xorb.name}", token, json={}).status_code == 200


def test_a_token_is_good_for_one_repo_and_one_purpose(alice, bob, xorb):
    file = File([(xorb, 2, 4)])
    path = f"/v1/reconstructions/{file.true_name}"
    read, write = alice.token("read", "alice/xet-closed"), alice.token("write", "alice/xet-closed")
    assert alice.cas("GET", path, read).status_code == 200
    assert alice.cas("GET", path, alice.token("read", "alice/xet-other")).status_code == 404
    assert alice.cas("GET", path, write).status_code == 403
    assert alice.cas("POST", "/v1/shards", read, content=pack_shard(file)).status_code == 403
    assert alice.cas("POST", "/v2/shards", read, content=pack_shard(file)).status_code == 403
    assert alice.cas("POST", f"/v1/xorbs/default/{xorb.name}", read, content=xorb.body).status_code == 403
    assert alice.cas("GET", path, alice.hub.tokens["alice"]).status_code == 403
    assert httpx2.get(f"{alice.hub.url}/xet/0{path}").status_code == 401


def test_an_expired_token_is_401_so_that_the_client_fetches_another(alice, xorb):
    secret = (alice.hub.root / "secret").read_bytes()
    for purpose, method, path in [
        ("xet-read", "GET", f"/v1/reconstructions/{File([(xorb, 0, 2)]).true_name}"),
        ("xet-write", "POST", f"/v1/xorbs/default/{xorb.name}"),
    ]:
        token = sign(secret, purpose, {"repo": "x"}, life_s=-1)
        answer = alice.cas(method, path, token)
        assert (answer.status_code, "expired" in answer.json()["error"]) == (401, True)


def test_who_may_not_write_or_read_gets_no_token(hub, alice, bob, xorb):
    with XetClient(hub, "reader") as reader:
        reader.token("read", "alice/xet-closed")
        reader.token("write", "alice/xet-open", status=403)
    bob.token("read", "alice/xet-closed", status=404)
    bob.token("write", "alice/xet-closed", status=404)
    with XetClient(hub, None) as nobody:
        nobody.token("read", "alice/xet-open")
        nobody.token("write", "alice/xet-open", status=401)


def test_a_shard_by_version_2_reports_progress_and_then_the_result(alice):
    file = File([(Xorb([CHANCE.randbytes(500) for _ in range(3)]), 0, 3)])
    token = alice.token("write", "alice/xet-open")
    (xorb, _, _) = file.runs[0]
    early = alice.cas("POST", "/v2/shards", token, content=pack_shard(file))
    (event,) = map(json.loads, early.text.splitlines())
    assert (early.status_code, event["type"], event["retryable"]) == (200, "error", False)
    assert f"The xorb {xorb.name} is not here" in event["message"]
    alice.cas("POST", f"/v1/xorbs/default/{xorb.name}", token, content=xorb.body)
    answer = alice.cas("POST", "/v2/shards", token, content=pack_shard(file))
    assert answer.headers["content-type"] == "application/x-ndjson"
    events = [json.loads(line) for line in answer.text.splitlines()]
    assert events == [{"type": "validating", "verified": 1, "total": 1}, {"type": "result"}]


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(
    "shard",
    [b"", b"x" * 200, pack_shard(version=3), pack_shard()[:95], pack_shard(File([]).but(count=2**32 - 1))],
    ids=["nothing", "another-thing", "another-version", "cut", "too-many-terms"],
)
def test_a_malformed_shard_is_refused_with_a_sentence(alice, version, shard):
    token = alice.token("write", "alice/xet-open")
    answer = alice.cas("POST", f"/{version}/shards", token, content=shard)
    assert answer.status_code == 400
    assert answer.json()["error"].endswith(".")


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_small_shard_that_asks_for_much_work_is_refused_at_once(alice, version):
    tiny = Xorb([b"x"] * 3000)
    token = alice.token("write", "alice/xet-open")
    alice.cas("POST", f"/v1/xorbs/default/{tiny.name}", token, content=tiny.body).raise_for_status()
    answer = alice.cas("POST", f"/{version}/shards", token, content=pack_shard(File([(tiny, 0, 3000)] * 40)))
    assert (answer.status_code, "too many chunks" in answer.text) == ({"v1": 413, "v2": 200}[version], True)
    assert version == "v1" or json.loads(answer.text)["type"] == "error"


@pytest.mark.parametrize("name", ["x", "0" * 63, "A" * 64, "..%2f" + "0" * 59, "0" * 64])
@pytest.mark.parametrize(
    "body", [b"", b"x", b"XETBLOB", bytes(100), Xorb([b"a"]).body, b"\0\xff\xff\xff\0\xff\xff\xff"]
)
def test_a_malformed_or_falsely_named_xorb_is_refused_with_a_sentence(alice, name, body):
    token = alice.token("write", "alice/xet-open")
    answer = alice.cas("POST", f"/v1/xorbs/default/{name}", token, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"].endswith(".")


def test_checkpoints_that_differ_in_a_few_experts_share_their_storage(hub, tmp_path):
    code = """
import os, random
from huggingface_hub import HfApi
api = HfApi()
chance = random.Random(5)
experts = [chance.randbytes(1_000_000) for _ in range(16)]
repo = api.create_repo("alice/dedup", exist_ok=True).repo_id
api.upload_file(path_or_fileobj=b"".join(experts), path_in_repo="model.safetensors", repo_id=repo) if {first} else None
experts[3], experts[11] = chance.randbytes(1_000_000), chance.randbytes(1_000_000)
if not {first}:
    api.upload_file(path_or_fileobj=b"".join(experts), path_in_repo="model.safetensors", repo_id=repo)
"""

    def stored():
        return sum(path.stat().st_size for path in hub.root.rglob("*") if path.is_file() and "repos" not in path.parts)

    sizes = [stored()]
    for first in (True, False):
        hub.run_python(code.format(first=first), xet=True)
        sizes.append(stored())
    whole, patch = sizes[1] - sizes[0], sizes[2] - sizes[1]
    assert 16_000_000 <= whole < 16_500_000
    assert 2_000_000 <= patch < 3_200_000


@pytest.mark.parametrize("is_cleaned", [False, True])
def test_a_client_that_remembers_xorbs_can_upload_again_after_gc(tmp_path, is_cleaned):
    code = """
import random, sys
from huggingface_hub import HfApi
api, repo = HfApi(), HfApi().create_repo("alice/m", exist_ok=True).repo_id
content = random.Random(9).randbytes(500_000)
api.upload_file(path_or_fileobj=content, path_in_repo="w.bin", repo_id=repo)
with open(api.hf_hub_download(repo, "w.bin", force_download=True), "rb") as file:
    assert file.read() == content
"""
    hub = create_hub(tmp_path / "hub")
    with hub.running():
        hub.run_python(code, xet=True)
        with Store(hub.root) as store:
            alice = store.accounts.identify(hub.tokens["alice"])
            store.repos.delete(RepoId("model", "alice", "m"), alice)
            if is_cleaned:
                assert collect(store, older_than_s=-5).counts == {"recipes": 1, "xorbs": 1}
        hub.run_python(code, xet=True)


def test_another_machine_sends_only_what_no_open_repo_has(hub, tmp_path):
    code = """
import random
from huggingface_hub import HfApi
api, chance = HfApi(), random.Random(77)
experts = [chance.randbytes(1_000_000) for _ in range(8)]
if {patched}:
    experts[3] = random.Random(78).randbytes(1_000_000)
repo = api.create_repo("{name}", exist_ok=True).repo_id
api.upload_file(path_or_fileobj=b"".join(experts), path_in_repo="model.safetensors", repo_id=repo)
"""

    def upload(user, name, *, patched):
        before = sum(path.stat().st_size for path in (hub.root / "xorbs").rglob("*") if path.is_file())
        environment = hub.environment(user, xet=True, home=tmp_path / user)
        step = [sys.executable, "-c", code.format(name=name, patched=patched)]
        subprocess.run(step, env=environment, check=True, capture_output=True)
        return sum(path.stat().st_size for path in (hub.root / "xorbs").rglob("*") if path.is_file()) - before

    assert 8_000_000 <= upload("alice", "alice/base", patched=False) < 8_200_000
    assert upload("bob", "bob/fine-tuned", patched=True) < 1_800_000


def test_a_chunk_is_found_only_by_who_may_read_a_file_that_holds_it(alice, bob, xorb):
    first = [format_hash(hash_chunk(SHARED[place])) for place in (0, 2)]  # of the open file and of the private one

    def ask(client, repo, name):
        return client.cas("GET", f"/v1/chunks/default/{name}", client.token("write", repo))

    assert ask(bob, "bob/xet-bob", first[1]).status_code == 404
    assert ask(alice, "alice/xet-closed", first[1]).status_code == 200
    shard = ask(bob, "bob/xet-bob", first[0]).content
    key = shard[-200:][72:104]
    keyed = [blake3(hash_chunk(chunk), key=key).digest() for chunk in SHARED]
    assert [one in shard for one in keyed] == [True, True, False, False]
    assert not any(hash_chunk(chunk) in shard for chunk in SHARED)
    assert ask(bob, "bob/xet-bob", "x").status_code == 400
