"""Mirroring between two real Hubs: whole, again, interrupted, tampered with."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("dulwich")
pytest.importorskip("starlette")

from hub_moe.errors import ConfigError, HubError
from hub_moe.hub.mirror import RepoMirror, run_each
from hub_moe.hub.mirror_address import Address, RepoAddress, Side, pair_repos
from hub_moe.hub.mirror_content import History
from hub_moe.hubserver.pytest_plugin import create_hub
from hub_moe.hubserver.store import Store
from hub_moe.hubserver.store.check import find_faults

from ..hubserver.client_over_http import Client

# huggingface_hub's own, on its way to send a file over plain LFS
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
COMMAND = [sys.executable, "-c", "from hub_moe.cli.main import main; main()", "hub", "mirror"]


@pytest.fixture(scope="module")
def hubs(tmp_path_factory):
    """SRC and DST."""
    pair = [create_hub(tmp_path_factory.mktemp(name) / "root") for name in ("src", "dst")]
    for hub in pair:
        hub.start()
    yield pair
    for hub in pair:
        hub.stop()
    for hub in pair:
        with Store(hub.root) as store:
            assert list(find_faults(store)) == []


@pytest.fixture(scope="module")
def source(hubs):
    with Client(hubs[0]) as client:
        yield client


@pytest.fixture(scope="module")
def target(hubs):
    with Client(hubs[1]) as client:
        yield client


def sides(hubs, users=("alice", "alice")):
    return [Side(hub.url, user and hub.tokens[user]) for hub, user in zip(hubs, users, strict=True)]


def copy(hubs, name, *, to=None, kind="model", force=False, users=("alice", "alice")):
    """The report of one run in this process."""
    addresses = [RepoAddress(hub.url, kind, "alice", one) for hub, one in zip(hubs, (name, to or name), strict=True)]
    ends = list(zip(sides(hubs, users), addresses, strict=True))
    with RepoMirror(*ends, advance=lambda name, count: None, force=force) as mirror:
        for step in (RepoMirror.plan, RepoMirror.apply):
            if not run_each([mirror], step):
                break
        return mirror.report


def command(hubs, *arguments, **options):
    environment = os.environ | {"SRC": hubs[0].tokens["alice"], "DST": hubs[1].tokens["alice"]}
    tokens = ("--src-token-env", "SRC", "--dst-token-env", "DST")
    return subprocess.Popen(
        [*COMMAND, *arguments, *tokens],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def refs(client, name, kind="model"):
    found = client.send("GET", f"/api/{kind}s/alice/{name}/refs").json()
    return {one["ref"]: one["targetCommit"] for group in ("branches", "tags") for one in found[group]}


def talk(client, name, number):
    details = client.send("GET", f"/api/models/alice/{name}/discussions/{number}").json()
    return details, [one["data"]["latest"]["raw"] for one in details["events"] if one["type"] == "comment"]


def post(client, path, **fields):
    return client.send("POST", f"/api/models/alice/{path}", json=fields).raise_for_status().json()


def make(client, name, **fields):
    client.create(name, **fields)
    client.commit(name, {"README.md": b"---\nlicense: mit\n---\n# hi\n", "a/b.txt": b"b"})
    client.commit(name, {"w.bin": b"\0w" * 5000, "v.bin": f"\0{name}".encode() * 900}, as_large=True)
    post(client, f"{name}/branch/dev")
    post(client, f"{name}/tag/main", tag="v1", message="one")
    client.commit(name, {"a/b.txt": b"c"})


def test_a_copy_has_the_same_commits_branches_tags_and_large_files(hubs, source, target):
    make(source, "whole")
    report = copy(hubs, "whole")
    assert (report.status, report.files, report.bytes, report.error) == ("copied", 2, 15_400, "")
    assert refs(target, "whole") == refs(source, "whole")
    assert target.send("GET", "/alice/whole/resolve/main/w.bin").content == b"\0w" * 5000
    assert target.send("GET", "/alice/whole/resolve/v1/a/b.txt").content == b"b"
    card = target.send("GET", "/api/models/alice/whole").json()["cardData"]
    assert card == {"license": "mit"}


def test_a_second_run_changes_nothing_and_a_third_copies_only_what_is_new(hubs, source, target):
    make(source, "again")
    copy(hubs, "again")
    second = copy(hubs, "again")
    assert (second.status, second.refs, second.files, second.commits) == ("unchanged", [], 0, 0)
    assert second.verified > 0
    source.commit("again", {"new.bin": b"\0new" * 100, "w2.bin": b"\0w" * 5000}, as_large=True)
    third = copy(hubs, "again")
    assert (third.status, third.refs, third.files) == ("copied", ["refs/heads/main"], 1)
    assert refs(target, "again") == refs(source, "again")


def test_a_pull_request_is_carried_over_once_and_kept_up_to_date(hubs, source, target):
    make(source, "pulls")
    with Client(hubs[0], "bob") as bob:
        body = b'{"key": "header", "value": {"summary": "proposal", "description": "Dear @alice, look."}}\n'
        body += b'{"key": "file", "value": {"path": "p.txt", "content": "cA==", "encoding": "base64"}}'
        bob.send("POST", "/api/models/alice/pulls/commit/main?create_pr=1", content=body).raise_for_status()
    post(source, "pulls/discussions", title="Only talk", description="no pull request")
    post(source, "pulls/discussions/1/comment", comment="Thanks!")
    assert copy(hubs, "pulls").pull_requests == [1]
    details, texts = talk(target, "pulls", 1)
    assert (details["status"], details["title"], len(texts)) == ("open", "proposal", 2)
    assert f"{hubs[0].url}/alice/pulls/discussions/1, opened by bob on " in texts[0]
    assert "look." in texts[0]
    assert "@alice" not in texts[0]
    assert "alice wrote on" in texts[1]
    assert "Thanks!" in texts[1]
    assert target.send("GET", "/alice/pulls/resolve/refs%2Fpr%2F1/p.txt").content == b"p"

    assert copy(hubs, "pulls").status == "unchanged"
    post(source, "pulls/discussions/1/comment", comment="One more.")
    post(source, "pulls/discussions/1/title", title="A better proposal")
    line = b'{"key": "header", "value": {"summary": "more"}}\n'
    line += b'{"key": "file", "value": {"path": "q.txt", "content": "cQ==", "encoding": "base64"}}'
    source.send("POST", "/api/models/alice/pulls/commit/refs%2Fpr%2F1", content=line).raise_for_status()
    assert copy(hubs, "pulls").pull_requests == [1]
    details, texts = talk(target, "pulls", 1)
    assert (details["title"], len(texts), "One more." in texts[2]) == ("A better proposal", 3, True)
    assert target.send("GET", "/alice/pulls/resolve/refs%2Fpr%2F1/q.txt").content == b"q"

    post(source, "pulls/discussions/1/status", status="closed")
    copy(hubs, "pulls")
    assert talk(target, "pulls", 1)[0]["status"] == "closed"
    assert target.send("GET", "/api/models/alice/pulls/discussions").json()["count"] == 1
    assert copy(hubs, "pulls").status == "unchanged"

    post(source, "pulls/discussions/1/status", status="open")
    line = line.replace(b"q.txt", b"r.txt")
    source.send("POST", "/api/models/alice/pulls/commit/refs%2Fpr%2F1", content=line).raise_for_status()
    assert copy(hubs, "pulls").error == ""
    assert talk(target, "pulls", 1)[0]["status"] == "open"
    assert target.send("GET", "/alice/pulls/resolve/refs%2Fpr%2F1/r.txt").content == b"q"


def test_a_copy_that_people_at_the_target_closed_stays_closed(hubs, source, target):
    source.create("theirs")
    source.commit("theirs", {"p.txt": b"p"}, create_pr="1")
    copy(hubs, "theirs")
    post(target, "theirs/discussions/1/merge")
    source.commit("theirs", {"after.txt": b"1"})
    report = copy(hubs, "theirs", force=True)
    assert (report.error, report.pull_requests) == ("", [])
    assert talk(target, "theirs", 1)[0]["status"] == "merged"


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_datasets_and_spaces_are_copied_to_their_kind(hubs, source, target, kind):
    source.create(f"kind-{kind}", type=kind, **({"sdk": "static"} if kind == "space" else {})).raise_for_status()
    assert copy(hubs, f"kind-{kind}", kind=kind).error == ""
    assert refs(target, f"kind-{kind}", kind) == refs(source, f"kind-{kind}", kind)


def test_a_private_repo_stays_private_and_a_gated_one_gated(hubs, source, target):
    source.create("closed", visibility="private")
    source.send("PUT", "/api/models/alice/closed/settings", json={"gated": "manual"})
    assert copy(hubs, "closed").settings == {"private": True, "gated": "manual"}
    facts = target.send("GET", "/api/models/alice/closed").json()
    assert (facts["private"], facts["gated"]) == (True, "manual")
    source.send("PUT", "/api/models/alice/closed/settings", json={"gated": False, "visibility": "public"})
    report = copy(hubs, "closed")
    assert (len(report.notes), report.settings) == (2, {})
    assert copy(hubs, "closed", force=True).settings == {"private": False, "gated": False}


def test_another_history_is_not_replaced_and_nothing_deleted_unless_forced(hubs, source, target):
    make(source, "other")
    copy(hubs, "other")
    target.commit("other", {"only-here.txt": b"1"})
    post(target, "other/branch/only-here")
    before = refs(target, "other")
    source.commit("other", {"there.txt": b"1"})
    report = copy(hubs, "other")
    assert (report.status, "another history in refs/heads/main" in report.error) == ("failed", True)
    assert refs(target, "other") == before
    report = copy(hubs, "other", force=True)
    assert report.deleted == ["refs/heads/only-here"]
    assert refs(target, "other") == refs(source, "other")
    post(target, "other/branch/only-here")
    assert copy(hubs, "other").kept == ["refs/heads/only-here"]


def test_bytes_that_were_tampered_with_at_the_source_are_found_and_nothing_is_pushed(hubs, source, target):
    make(source, "tampered")
    with Store(hubs[0].root) as store:
        facts = source.send("GET", "/api/models/alice/tampered/tree/main").json()
        sha256 = next(one["lfs"]["oid"] for one in facts if one["path"] == "v.bin")
        blob = store.contents.blobs.path(sha256)
    right = blob.read_bytes()
    blob.write_bytes(b"X" + right[1:])
    report = copy(hubs, "tampered")
    assert (report.status, "gives other bytes for v.bin" in report.error) == ("failed", True)
    assert len(refs(target, "tampered")) == 1
    blob.unlink()
    assert "has lost the large file" in copy(hubs, "tampered").error
    blob.write_bytes(right)
    assert copy(hubs, "tampered").status == "copied"


@pytest.mark.parametrize(
    ("users", "sentence"),
    [
        (("alice", None), "--dst-token-env"),
        (("alice", "reader"), "this token cannot write"),
        (("alice", "bob"), "rights to write"),
        (("bob", "alice"), "does not exist, or needs another token"),
    ],
)
def test_who_may_not_read_or_write_is_told_so(hubs, source, users, sentence):
    source.create("locked", visibility="private")
    report = copy(hubs, "locked", to=f"locked-{users[0]}-{users[1]}", users=users)
    assert (report.status, sentence in report.error) == ("failed", True), report.error


def test_an_owner_is_copied_repo_by_repo_by_the_command(hubs, source, target):
    with Client(hubs[0], "bob") as bob, Client(hubs[1], "bob") as there:
        bob.create("one")
        bob.create("two", type="dataset")
        addresses = [f"{hub.url}/bob" for hub in hubs]
        tokens = {"HF_TOKEN": "hf_unused", "SRC": hubs[0].tokens["bob"], "DST": hubs[1].tokens["bob"]}
        names = ("--src-token-env", "SRC", "--dst-token-env", "DST")
        planned = subprocess.run(
            [*COMMAND, *addresses, *names, "--dry-run"], env=os.environ | tokens, capture_output=True, text=True
        )
        assert (planned.returncode, planned.stderr.count("(new)")) == (0, 2)
        assert there.send("GET", "/api/models/bob/one").status_code == 404
        done = subprocess.run(
            [*COMMAND, *addresses, *names, "--yes", "--json"], env=os.environ | tokens, capture_output=True, text=True
        )
        assert [one["status"] for one in json.loads(done.stdout)] == ["copied", "copied"], done.stderr
        assert there.send("GET", "/api/datasets/bob/two").json()["sha"]


def test_the_command_wants_an_answer_or_yes_and_never_a_token_in_an_address(hubs):
    addresses = [f"{hub.url}/alice/x" for hub in hubs]
    asked = command(hubs, *addresses)
    assert "--yes" in asked.communicate()[1]
    assert asked.returncode == 2
    failed = command(hubs, *addresses, "--yes")
    assert "does not exist" in failed.communicate()[1]
    assert failed.returncode == 1


def test_a_hub_that_cannot_be_reached_is_one_sentence(hubs):
    done = command(hubs, "http://127.0.0.1:9/alice/x", f"{hubs[1].url}/alice/x", "--dry-run")
    said = done.communicate()[1]
    assert (done.returncode, "cannot be reached" in said, "Traceback" in said) == (1, True, False), said


@pytest.mark.parametrize(
    "text", ["alice/x", "http://u:hf_x@h/alice/x", "http://h", "http://h/a/b/c", "ftp://h/a/b", "http://h/a/b?x", ""]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ConfigError, match="is no address"):
        Address.parse(text)


def test_addresses_that_do_not_fit_together_are_refused():
    side = Side("http://h", None)
    for one, other, sentence in (
        ("http://h/a/b", "http://H/A/b.git", "are the same"),
        ("http://h/a/b", "http://i/a", "both name a repo"),
        ("http://h/a/b", "http://i/datasets/a/b", "of one kind"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            pair_repos(Address.parse(one), Address.parse(other), side)


def test_the_token_of_this_machine_goes_only_to_its_own_hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("EMPTY", "")
    assert Side.open("http://elsewhere.example", None).token is None
    assert Side.open("https://huggingface.co", None).token == "hf_secret"
    with pytest.raises(ConfigError, match="holds no token"):
        Side.open("http://elsewhere.example", "EMPTY")


@pytest.mark.parametrize("victim", ["client", "source", "target"])
def test_killed_at_any_moment_a_second_run_finishes_the_job(tmp_path, victim):
    hubs = [create_hub(tmp_path / name) for name in ("src", "dst")]
    for hub in hubs:
        hub.start()
    chance = random.Random(victim)
    with Client(hubs[0]) as client:
        make(client, "m")
        for number in range(4):
            client.commit("m", {f"large{number}.bin": chance.randbytes(6_000_000)}, as_large=True)
        client.commit("m", {"p.bin": chance.randbytes(2_000_000)}, as_large=True, create_pr="1")
        wanted = refs(client, "m")
    for _ in range(2):
        running = command(hubs, *(f"{hub.url}/alice/m" for hub in hubs), "--yes", start_new_session=True)
        time.sleep(chance.uniform(1.2, 2.6))
        if victim == "client":
            running.send_signal(signal.SIGKILL)
        else:
            hub = hubs[victim == "target"]
            hub.kill()
            running.send_signal(signal.SIGINT)
            hub.start()
        running.communicate()
        with Store(hubs[1].root) as store:
            assert list(find_faults(store)) == []
    report = copy(hubs, "m")
    assert report.error == ""
    with Client(hubs[1]) as client:
        assert refs(client, "m") == wanted
        assert client.send("GET", "/api/models/alice/m/discussions").json()["count"] == 1
        assert talk(client, "m", 1)[0]["status"] == "open"
    for hub in hubs:
        hub.stop()
    with Store(hubs[1].root) as store:
        assert list(find_faults(store)) == []


def test_a_ref_that_somebody_moves_meanwhile_is_named(hubs, source, target, tmp_path):
    source.create("raced")
    target.create("raced")
    here, there = sides(hubs)
    address, other = (RepoAddress(hub.url, "model", "alice", "raced") for hub in hubs)
    history = History(tmp_path / "history")
    refs = history.fetch(here, address, pull_requests={})
    change = {"refs/heads/main": ("1" * 40, refs["refs/heads/main"])}
    with pytest.raises(HubError, match=f"^{re.escape(str(other))}: refs/heads/main was changed meanwhile"):
        history.push(there, other, change, haves=[])
    history.close()
