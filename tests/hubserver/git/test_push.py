"""Unmodified git and git-lfs against the Hub: push."""

import hashlib
import shutil
import threading

import pytest

from hub_moe.hubserver.pytest_plugin import create_hub

from ..client_over_http import Client
from .git_client import Git, assert_whole, has_git_lfs, head, read

needs_git_lfs = pytest.mark.skipif(not has_git_lfs(), reason="git-lfs is not installed")


def test_what_is_pushed_is_seen_by_the_api_with_the_same_commit_id(hub, git, client, name, tmp_path):
    folder = git.clone(f"alice/{name}", tmp_path / "c")
    pushed = git.commit(folder, {"new/file.txt": b"pushed", "README.md": b"# changed\n"}, "A subject\n\nA body")
    git.run("push", "-q", cwd=folder)
    assert head(client, name) == pushed
    assert read(client, name, "new/file.txt").text == "pushed"
    shown = client.send("GET", f"/api/models/alice/{name}/commits/main").json()[0]
    assert (shown["id"], shown["title"], shown["message"]) == (pushed, "A subject", "A body")
    git.run("push", "-q", "origin", "HEAD:refs/heads/feature/a", cwd=folder)
    git.run("tag", "-a", "v1", "-m", "one", cwd=folder)
    git.run("tag", "light", cwd=folder)
    git.run("push", "-q", "--tags", cwd=folder)
    refs = client.send("GET", f"/api/models/alice/{name}/refs").json()
    assert {one["name"]: one["targetCommit"] for one in refs["tags"]} == {"v1": pushed, "light": pushed}
    git.run("push", "-q", "origin", ":refs/heads/feature/a", ":refs/tags/light", cwd=folder)
    refs = client.send("GET", f"/api/models/alice/{name}/refs").json()
    assert ([one["name"] for one in refs["branches"]], [one["name"] for one in refs["tags"]]) == (["main"], ["v1"])
    assert_whole(hub)


def test_a_push_that_is_no_fast_forward_needs_force(git, client, name, tmp_path):
    folder = git.clone(f"alice/{name}", tmp_path / "c")
    client.commit(name, {"theirs.txt": b"1"})
    git.commit(folder, {"mine.txt": b"1"})
    assert "rejected" in git.try_run("push", cwd=folder).stderr
    git.run("fetch", "-q", cwd=folder)
    git.run("push", "-q", "--force", cwd=folder)
    assert read(client, name, "theirs.txt").status_code == 404
    assert read(client, name, "mine.txt").text == "1"


@pytest.mark.parametrize(("user", "sentence"), [("reader", "this token cannot write"), ("bob", "rights to write")])
def test_who_may_not_write_cannot_push(hub, git, client, name, tmp_path, user, sentence):
    folder = git.clone(f"alice/{name}", tmp_path / "c")
    git.commit(folder, {"x": b"1"})
    before = head(client, name)
    refused = Git(hub, tmp_path / "home", user).try_run("push", cwd=folder)
    assert refused.returncode
    assert sentence in refused.stderr
    assert head(client, name) == before


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        (":refs/heads/main", "main cannot be deleted"),
        ("HEAD:refs/notes/x", "Only branches, tags"),
        ("HEAD:refs/pr/99", "no discussion 99"),
        ("HEAD:refs/pr/x", "not the ref of a pull request"),
        ("HEAD:refs/convert/parquet", "Only branches, tags"),
        ("HEAD:refs/heads/main/x", "cannot both exist"),
        ("HEAD:refs/heads/" + "0" * 40, "not a valid name"),
        ("HEAD^{tree}:refs/tags/tree", "A ref leads to a commit"),
    ],
)
def test_a_ref_that_may_not_be_is_refused_with_a_sentence(git, client, name, tmp_path, target, sentence):
    folder = git.clone(f"alice/{name}", tmp_path / "c")
    new = git.commit(folder, {"x": b"1"})
    refused = git.try_run("push", "origin", target, cwd=folder)
    assert refused.returncode
    assert sentence in refused.stderr
    assert client.send("GET", f"/api/models/alice/{name}/revision/{new}").status_code == 404


def test_one_refused_ref_keeps_the_others_of_the_same_push_back(git, client, name, tmp_path):
    folder = git.clone(f"alice/{name}", tmp_path / "c")
    before, new = head(client, name), git.commit(folder, {"x": b"1"})
    refused = git.try_run("push", "origin", "HEAD:main", "HEAD:refs/notes/x", cwd=folder)
    assert "because refs/notes/x was refused" in refused.stderr
    assert head(client, name) == before
    assert client.send("GET", f"/api/models/alice/{name}/revision/{new}").status_code == 404


@pytest.mark.parametrize("option", ["--atomic", "--no-atomic"])
def test_a_branch_in_place_of_a_folder_of_branches_needs_the_folder_to_go(git, client, name, tmp_path, option):
    folder = git.clone(f"alice/{name}", tmp_path / "c")
    git.run("push", "-q", option, "origin", "HEAD:refs/heads/a/b", cwd=folder)
    assert "cannot both exist" in git.try_run("push", option, "origin", "HEAD:refs/heads/a", cwd=folder).stderr
    git.run("push", "-q", option, "origin", ":refs/heads/a/b", "HEAD:refs/heads/a", cwd=folder)
    branches = client.send("GET", f"/api/models/alice/{name}/refs").json()["branches"]
    assert [one["name"] for one in branches] == ["a", "main"]


def test_a_shallow_clone_can_push(hub, git, client, name, tmp_path):
    folder = git.clone(f"alice/{name}", tmp_path / "c", "--depth", "1")
    pushed = git.commit(folder, {"s.txt": b"1"})
    git.run("push", "-q", cwd=folder)
    assert head(client, name) == pushed
    assert_whole(hub)


def test_pushes_and_api_commits_at_the_same_time_are_all_applied(hub, git, client, name, tmp_path):
    def commit_by_api():
        with Client(hub) as other:
            for number in range(15):
                assert other.commit(name, {f"api/{number}": b"1"}).status_code == 200

    folder = git.clone(f"alice/{name}", tmp_path / "c")
    thread = threading.Thread(target=commit_by_api)
    thread.start()
    pushed = 0
    while thread.is_alive() or not pushed:
        git.commit(folder, {f"git/{pushed}": b"1"})
        while git.try_run("push", "-q", cwd=folder).returncode:
            git.run("pull", "-q", "--rebase", cwd=folder)
        pushed += 1
    thread.join()
    git.run("pull", "-q", "--rebase", cwd=folder)
    assert (len(list(folder.glob("api/*"))), len(list(folder.glob("git/*")))) == (15, pushed)
    assert_whole(hub)


def test_a_pull_request_is_fetched_and_its_author_pushes_to_it(hub, client, name, tmp_path):
    with Client(hub, "bob") as bob:
        body = b'{"key": "header", "value": {"summary": "proposal"}}\n'
        body += b'{"key": "file", "value": {"path": "p.txt", "content": "cA==", "encoding": "base64"}}'
        answer = bob.send("POST", f"/api/models/alice/{name}/commit/main?create_pr=1", content=body)
        number = answer.json()["pullRequestUrl"].rpartition("/")[2]
    git = Git(hub, tmp_path / "home", "bob")
    folder = git.clone(f"alice/{name}", tmp_path / "c")
    git.run("fetch", "-q", "origin", f"refs/pr/{number}:pr", cwd=folder)
    git.run("checkout", "-q", "pr", cwd=folder)
    git.commit(folder, {"p.txt": b"better"}, "better")
    pushed = git.commit(folder, {"q.txt": b"more"}, "more")
    git.run("push", "-q", "origin", f"pr:refs/pr/{number}", cwd=folder)
    details = client.send("GET", f"/api/models/alice/{name}/discussions/{number}").json()
    commits = [event["data"] for event in details["events"] if event["type"] == "commit"]
    assert [one["subject"] for one in commits] == ["proposal", "better", "more"]
    assert commits[-1]["oid"] == pushed
    assert "cannot be deleted" in git.try_run("push", "origin", f":refs/pr/{number}", cwd=folder).stderr
    client.send("POST", f"/api/models/alice/{name}/discussions/{number}/merge", content=b"null").raise_for_status()
    git.commit(folder, {"q.txt": b"late"})
    assert "is merged" in git.try_run("push", "origin", f"pr:refs/pr/{number}", cwd=folder).stderr
    assert_whole(hub)


def test_an_executable_file_stays_so_through_later_commits_and_a_merge(git, client, name, tmp_path):
    folder = git.clone(f"alice/{name}", tmp_path / "c")
    git.commit(folder, {"run.sh": b"1", "plain.sh": b"1"})
    (folder / "run.sh").chmod(0o755)
    git.commit(folder, {}, "executable")
    git.run("push", "-q", cwd=folder)
    client.commit(name, {"run.sh": b"2", "other": b"1"})
    proposal = client.commit(name, {"tool.sh": b"1"}, create_pr="1").json()["pullRequestUrl"].rpartition("/")[2]
    git.run("fetch", "-q", "origin", f"refs/pr/{proposal}:pr", cwd=folder)
    git.run("checkout", "-q", "pr", cwd=folder)
    for path in ("tool.sh", "plain.sh"):
        (folder / path).chmod(0o755)
    git.commit(folder, {}, "executable too")
    git.run("push", "-q", "origin", f"pr:refs/pr/{proposal}", cwd=folder)
    client.send("POST", f"/api/models/alice/{name}/discussions/{proposal}/merge", content=b"null").raise_for_status()
    git.run("fetch", "-q", cwd=folder)
    listed = git.run("ls-tree", "-r", "origin/main", cwd=folder).splitlines()
    assert sorted(line.split("\t")[1] for line in listed if line.startswith("100755")) == [
        "plain.sh",
        "run.sh",
        "tool.sh",
    ]


def test_a_push_of_many_files_to_a_new_repo_arrives_whole(hub, git, client, tmp_path):
    client.create("many")
    folder = git.clone("alice/many", tmp_path / "c")
    git.commit(folder, {f"d{n % 20}/{n}.txt": b"%d" % n for n in range(2000)})
    git.commit(folder, {f"d{n % 20}/{n}.txt": b"%d!" % n for n in range(500)})
    git.run("push", "-q", cwd=folder)
    listed = client.send("GET", "/api/models/alice/many/tree/main").json()
    assert sum(one["type"] == "directory" for one in listed) == 20
    assert [read(client, "many", f"d3/{number}.txt").text for number in (3, 1983)] == ["3!", "1983"]
    assert_whole(hub)


@needs_git_lfs
def test_git_lfs_uploads_and_downloads_large_files(hub, lfs, nobody, client, name, tmp_path):
    folder = lfs.clone(f"alice/{name}", tmp_path / "c")
    content = b"\0weights" * 100_000
    lfs.commit(folder, {"model.safetensors": content})
    said = lfs.try_run("push", cwd=folder).stderr
    assert "Locking" not in said
    assert "locking" not in said
    assert read(client, name, "model.safetensors").content == content
    shown = client.send("GET", f"/api/models/alice/{name}/tree/main").json()
    lfs_facts = next(one["lfs"] for one in shown if one["path"] == "model.safetensors")
    assert lfs_facts["oid"] == hashlib.sha256(content).hexdigest()
    client.commit(name, {"second.bin": b"\1" * 5000}, as_large=True)
    lfs.run("pull", "-q", cwd=folder)
    assert (folder / "second.bin").read_bytes() == b"\1" * 5000
    cloned = nobody.clone(f"alice/{name}", tmp_path / "anonymous")
    assert (cloned / "model.safetensors").read_bytes() == content
    assert_whole(hub)


@needs_git_lfs
def test_git_lfs_needs_a_token_for_a_private_repo(hub, lfs, client, tmp_path):
    client.create("private-lfs", visibility="private")
    client.commit("private-lfs", {"w.bin": b"\2" * 5000}, as_large=True)
    folder = lfs.clone("alice/private-lfs", tmp_path / "c")
    assert (folder / "w.bin").read_bytes() == b"\2" * 5000
    shutil.rmtree(folder / ".git/lfs")
    refused = Git(hub, tmp_path / "home", None).try_run(
        "lfs", "fetch", "--all", lfs.url("alice/private-lfs"), cwd=folder
    )
    assert refused.returncode


@needs_git_lfs
def test_a_large_file_goes_whole_from_git_lfs_to_a_hub_that_takes_parts(tmp_path):
    hub = create_hub(tmp_path / "hub", options=("--part-bytes", "1000"))
    hub.start()
    git = Git(hub, tmp_path / "home")
    git.run("lfs", "install", "--skip-repo")
    with Client(hub) as client:
        client.create("m")
        folder = git.clone("alice/m", tmp_path / "c")
        git.commit(folder, {"w.bin": b"0123456789" * 500})
        git.run("push", "-q", cwd=folder)
        assert client.send("GET", "/alice/m/resolve/main/w.bin").content == b"0123456789" * 500
    hub.stop()


def test_a_pointer_pushed_without_its_content_is_refused(git, client, name, tmp_path):
    folder = git.clone(f"alice/{name}", tmp_path / "c")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5\n"
    new = git.commit(folder, {"w.dat": pointer.encode()})
    assert "never uploaded" in git.try_run("push", cwd=folder).stderr
    assert client.send("GET", f"/api/models/alice/{name}/revision/{new}").status_code == 404


def test_a_symbolic_link_a_submodule_and_an_oversized_file_are_refused(git, client, name, tmp_path):
    folder = git.clone(f"alice/{name}", tmp_path / "c")
    (folder / "link").symlink_to("README.md")
    git.commit(folder, {})
    assert "a symbolic link" in git.try_run("push", cwd=folder).stderr
    git.run("reset", "-q", "--hard", "origin/main", cwd=folder)
    git.run("update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},sub", cwd=folder)
    git.run("commit", "-q", "-m", "submodule", cwd=folder)
    assert "a submodule" in git.try_run("push", cwd=folder).stderr
    git.run("reset", "-q", "--hard", "origin/main", cwd=folder)
    git.commit(folder, {"huge.txt": b"x" * 51_000_000})
    assert "track it with git-lfs" in git.try_run("push", cwd=folder).stderr
