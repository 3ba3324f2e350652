"""Unmodified git against the Hub: clone, fetch and pull."""

import gzip

import pytest

from hub_moe.hubserver.store import RepoId, Store

from ..client_over_http import Client
from .git_client import Git, head, read


def pkts(*lines):
    return b"".join(b"%04x%s" % (len(line) + 4, line.encode()) for line in lines)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_clone_has_every_file_and_a_pull_brings_what_the_api_committed(nobody, client, name, tmp_path, version):
    folder = nobody.clone(f"alice/{name}", tmp_path / "c", "-c", f"protocol.version={version}")
    assert (folder / "data/x.txt").read_text() == "x"
    client.commit(name, {"data/y.txt": b"y"})
    client.send("POST", f"/api/models/alice/{name}/tag/main", json={"tag": "v1", "message": "one"})
    nobody.run("pull", "-q", "--tags", cwd=folder)
    assert (folder / "data/y.txt").read_text() == "y"
    assert nobody.run("rev-parse", "HEAD", cwd=folder) == head(client, name)
    assert nobody.run("tag", cwd=folder) == "v1"
    nobody.run("fsck", "--strict", cwd=folder)


@pytest.mark.parametrize("version", [0, 2])
def test_a_shallow_clone_is_deepened_step_by_step(nobody, client, name, tmp_path, version):
    for number in range(5):
        client.commit(name, {"n.txt": b"%d" % number})
    option = ("-c", f"protocol.version={version}")
    folder = nobody.clone(f"alice/{name}", tmp_path / "c", *option, "--depth", "1")
    assert nobody.run("rev-list", "--count", "HEAD", cwd=folder) == "1"
    nobody.run("fetch", "-q", "--deepen", "2", cwd=folder)
    assert nobody.run("rev-list", "--count", "HEAD", cwd=folder) == "3"
    client.commit(name, {"n.txt": b"new"})
    nobody.run("pull", "-q", cwd=folder)
    assert nobody.run("rev-list", "--count", "HEAD", cwd=folder) == "4"
    nobody.run("fetch", "-q", "--unshallow", cwd=folder)
    assert nobody.run("rev-list", "--count", "HEAD", cwd=folder) == "8"
    nobody.run("fsck", "--strict", cwd=folder)


def test_history_is_cut_at_a_date_or_a_ref(nobody, client, name, tmp_path):
    client.send("POST", f"/api/models/alice/{name}/branch/old", json={})
    client.commit(name, {"new.txt": b"new"})
    folder = nobody.clone(f"alice/{name}", tmp_path / "not", "--shallow-exclude", "old")
    assert nobody.run("rev-list", "--count", "HEAD", cwd=folder) == "1"
    folder = nobody.clone(f"alice/{name}", tmp_path / "since", "--shallow-since", "2000-01-01")
    assert nobody.run("rev-list", "--count", "HEAD", cwd=folder) == "3"
    body = pkts(f"want {head(client, name)}", "deepen-since 4102444800") + b"0000" + pkts("done")
    answer = client.send("POST", f"/alice/{name}/git-upload-pack", content=body)
    assert b"ERR No commits selected" in answer.content


def test_a_fetch_after_both_sides_moved_takes_only_what_is_new(git, client, name, tmp_path):
    folder = git.clone(f"alice/{name}", tmp_path / "c")
    for number in range(40):
        git.commit(folder, {"mine.txt": b"%d" % number})
    client.commit(name, {"theirs.txt": b"1"})
    git.run("fetch", cwd=folder)
    git.run("merge", "-q", "origin/main", "-m", "merge", cwd=folder)
    git.run("push", "-q", cwd=folder)
    assert read(client, name, "mine.txt").text == "39"
    assert git.run("count-objects", "-v", cwd=folder).count("in-pack: 0") == 0
    git.run("fsck", "--strict", cwd=folder)


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_datasets_and_spaces_are_cloned_by_their_own_address(nobody, client, kind, tmp_path):
    client.create(f"cloned-{kind}", type=kind)
    folder = nobody.clone(f"{kind}s/alice/cloned-{kind}.git", tmp_path / "c")
    assert (folder / ".gitattributes").exists()


def test_a_private_repo_is_cloned_with_a_token_and_is_as_absent_as_a_missing_one_without(hub, git, nobody, tmp_path):
    with Client(hub) as client:
        client.create("private-git", visibility="private")
    git.clone("alice/private-git", tmp_path / "c")
    body = {"operation": "download", "objects": []}
    with Client(hub, None) as client:
        for repo in ("alice/private-git", "alice/no-such"):
            answer = client.send("GET", f"/{repo}/info/refs?service=git-upload-pack")
            assert (answer.status_code, answer.headers["www-authenticate"][:5]) == (401, "Basic")
            assert client.send("POST", f"/{repo}/git-upload-pack").text == answer.text
            answer = client.send("POST", f"/{repo}.git/info/lfs/objects/batch", json=body)
            assert (answer.status_code, answer.headers["lfs-authenticate"][:5]) == (401, "Basic")
    bob = Git(hub, tmp_path / "home", "bob")
    for repo in ("alice/private-git", "alice/no-such"):
        assert "could not read Username" in nobody.try_run("clone", nobody.url(repo)).stderr
        assert "not found" in bob.try_run("clone", bob.url(repo)).stderr


def test_a_gated_repo_is_refused_until_access_is_granted(hub, client, tmp_path):
    client.create("gated-git")
    client.send("PUT", "/api/models/alice/gated-git/settings", json={"gated": "manual"})
    bob = Git(hub, tmp_path / "home", "bob")
    assert "authorized list" in bob.try_run("clone", bob.url("alice/gated-git")).stderr
    client.send("POST", "/api/models/alice/gated-git/user-access-request/grant", json={"user": "bob"})
    bob.clone("alice/gated-git", tmp_path / "c")


def test_a_token_is_taken_as_bearer_or_password_and_a_wrong_one_refused(hub, client, name):
    path, token = f"/alice/{name}/info/refs?service=git-receive-pack", hub.tokens["alice"]
    with Client(hub, None) as nobody:
        assert nobody.send("GET", path).status_code == 401
        assert nobody.client.get(hub.url + path, auth=("", token)).status_code == 200
        assert nobody.client.get(hub.url + path, auth=("alice", "hf_wrong")).status_code == 401
        for wrong in ("Basic %%%", "Basic", "Basic " + "/" * 8, "Digest x"):
            assert nobody.send("GET", path, headers={"authorization": wrong}).status_code == 401
    assert client.send("GET", path).status_code == 200
    assert client.send("GET", f"/alice/{name}/info/refs").status_code == 400


def test_a_compressed_request_is_unfolded_and_a_bomb_is_not(client, name):
    tip = head(client, name)
    wants = f"0032want {tip}\n0000".encode() + b"0009done\n"
    headers = {"content-encoding": "gzip", "content-type": "application/x-git-upload-pack-request"}
    path = f"/alice/{name}/git-upload-pack"
    answer = client.send("POST", path, content=gzip.compress(wants), headers=headers)
    assert answer.content.startswith(b"0008NAK\nPACK")
    assert client.send("POST", path, content=gzip.compress(bytes(40_000_000)), headers=headers).status_code == 413
    assert client.send("POST", path, content=b"not gzip", headers=headers).status_code == 400
    assert client.send("POST", path, content=wants, headers=headers | {"content-encoding": "br"}).status_code == 400


@pytest.mark.parametrize(
    "body", [b"", b"0", b"zzzz", b"0005", b"ffff", b"0032want x", b"0006\xff\xfe", b"00000009done\n"]
)
@pytest.mark.parametrize("protocol", ["version=0", "version=2"])
def test_any_body_of_a_fetch_is_answered_without_a_fault(client, name, body, protocol):
    answer = client.send("POST", f"/alice/{name}/git-upload-pack", content=body, headers={"git-protocol": protocol})
    assert answer.status_code < 500
    assert b"Traceback" not in answer.content


def test_a_commit_that_no_ref_leads_to_is_not_sent(hub, client, name):
    tip = head(client, name)
    client.commit(name, {"x": b"1"})
    orphan = head(client, name)
    with Store(hub.root) as store:
        alice = store.accounts.identify(hub.tokens["alice"])
        with store.commits.changing(store.repos.find(RepoId("model", "alice", name), alice)) as git:
            git.move_ref("refs/heads/main", old=orphan, new=tip)
    for commit, start in ((orphan, b"ERR upload-pack: not our ref"), (tip, b"NAK"), ("1" * 40, b"ERR")):
        body = f"0032want {commit}\n0000".encode() + b"0009done\n"
        assert client.send("POST", f"/alice/{name}/git-upload-pack", content=body).content[4:].startswith(start)
