"""`hub backup` and `hub restore`: what comes back is the Hub of one moment, or nothing."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import threading
import time

import pytest

from hub_moe.errors import ConfigError
from hub_moe.hubserver.store import Store
from hub_moe.hubserver.store.backup import back_up, restore
from hub_moe.hubserver.store.check import find_faults
from hub_moe.hubserver.store.commits import AddFile, AddLargeFile
from hub_moe.hubserver.store.locks import take

from ..xet_by_hand import File, Xorb, pack_shard
from .conftest import MODEL
from .test_contents import add_shard, add_xorb

XORB = Xorb([b"chunk" * 100, b"other" * 100])


@pytest.fixture
def filled(store, repo, alice):
    """A repo with an ordinary file, a whole large file, a recipe, many files (a pack) and a pull request."""
    large = hashlib.sha256(b"L" * 5000).hexdigest()
    store.contents.store([b"L" * 5000], sha256=large, size_bytes=5000)
    store.commits.register(repo.uid, large)
    file = File([(XORB, 0, 2)])
    add_xorb(store, XORB)
    add_shard(store, repo, pack_shard(file))
    many = [AddFile(f"many/{number}", b"%d" % number) for number in range(100)]
    recipe = AddLargeFile("x.bin", hashlib.sha256(file.content).hexdigest())
    options = {"revision": "main", "who": alice, "message": "m"}
    store.commits.commit(repo, [AddFile("a", b"1"), AddLargeFile("l.bin", large), recipe, *many], **options)
    num = store.repos.next_number(repo)
    store.commits.propose(repo, [AddFile("p", b"1")], ref=f"refs/pr/{num}", **options)
    store.discussions.create(repo, alice, num=num, title="title", description="d", target="refs/heads/main")
    return store


def read_all(root, who):
    """Every file of the repo `alice/m`, and the titles of its pull requests."""
    with Store(root) as store:
        repo = store.repos.find(MODEL, who)
        titles = [one.title for one in store.discussions.list_all(repo, is_pull_request=True)]
        with store.repos.open(repo) as git:
            head = git.resolve("main")
            entries = [entry for entry in store.files.list_entries(git, head) if not entry.is_folder]
            facts = store.files.facts(git, [entry.oid for entry in entries])
            return {entry.path: store.files.read(git, facts[entry.oid]) for entry in entries}, titles


@pytest.mark.parametrize("name", ["b.tar", "folder"])
def test_a_backup_comes_back_whole_without_the_secret(filled, alice, tmp_path, name):
    told = []
    facts = back_up(filled, tmp_path / name, on_progress=lambda done, total: told.append((done, total)))
    assert (facts.repos, told[-1][0] >= facts.size_bytes) == (1, True)
    restored = tmp_path / "restored"
    assert restore(tmp_path / name, restored) == facts
    assert read_all(restored, alice) == read_all(filled.root, alice)
    assert (restored / "secret").read_bytes() != (filled.root / "secret").read_bytes()
    with Store(restored) as again:
        assert list(find_faults(again)) == []
        new = again.commits.commit(
            again.repos.find(MODEL, alice),
            [AddFile(f"again/{number}", b"%d" % number) for number in range(100)],
            revision="main",
            who=alice,
            message="a pack",
        )
        assert new
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "hub", "restored"])


def test_garbage_is_not_backed_up(filled, repo, alice, tmp_path):
    sha256 = hashlib.sha256(b"nobody's").hexdigest()
    filled.contents.store([b"nobody's"], sha256=sha256, size_bytes=8)
    add_xorb(filled, Xorb([b"of no file"]))
    (filled.contents.blobs.incoming / "half").touch()
    back_up(filled, tmp_path / "b")
    names = {path.name for path in (tmp_path / "b").rglob("*")}
    assert names & {sha256, Xorb([b"of no file"]).name, "half", "secret", "incoming"} == set()


def test_a_pack_without_its_index_and_an_index_without_its_pack_are_not_backed_up(filled, repo, tmp_path):
    packs = filled.repos.path(repo) / "objects/pack"
    (packs / "pack-1.pack").touch()
    (packs / "pack-2.idx").touch()
    back_up(filled, tmp_path / "b")
    names = {path.name for path in (tmp_path / "b").rglob("pack-*")}
    assert names & {"pack-1.pack", "pack-2.idx"} == set()
    assert {path.rpartition(".")[2] for path in names} == {"pack", "idx"}


def test_what_exists_is_not_overwritten(filled, tmp_path):
    back_up(filled, tmp_path / "b.tar")
    with pytest.raises(ConfigError, match="exists already"):
        back_up(filled, tmp_path / "b.tar")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(ConfigError, match="not empty"):
        restore(tmp_path / "b.tar", tmp_path / "full")
    (tmp_path / "empty").mkdir()
    restore(tmp_path / "b.tar", tmp_path / "empty")


@pytest.mark.parametrize("damage", ["cut", "flipped", "nothing", "manifest", "escape", "link"])
def test_a_damaged_backup_is_refused_and_leaves_nothing(filled, tmp_path, damage):
    path = tmp_path / "b.tar"
    back_up(filled, path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[content.index(b"LLLLLL")] = 0
        path.write_bytes(content)
    elif damage == "nothing":
        path.write_bytes(b"")
    else:
        member = tarfile.TarInfo({"manifest": "backup.json", "escape": "../outside", "link": "link"}[damage])
        if damage == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/"
        member.size = 2 if damage == "manifest" else 0
        with tarfile.open(path, "w" if damage == "manifest" else "a") as tar:
            tar.addfile(member, io.BytesIO(b"{}"))
    with pytest.raises(ConfigError, match=r"b\.tar|no file named"):
        restore(path, tmp_path / "restored")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar", "hub"]


def test_a_backup_of_another_version_is_refused(filled, tmp_path):
    back_up(filled, tmp_path / "b")
    facts = json.loads((tmp_path / "b/backup.json").read_text())
    (tmp_path / "b/backup.json").write_text(json.dumps(facts | {"version": 2}))
    with pytest.raises(ConfigError, match="version 2"):
        restore(tmp_path / "b", tmp_path / "restored")


def test_a_backup_waits_for_nobody_who_cleans(filled, tmp_path):
    with take(filled.repos.cleaning_lock), pytest.raises(ConfigError, match="running"):
        back_up(filled, tmp_path / "b.tar")


def test_a_repo_that_is_deleted_while_it_is_copied_is_in_the_backup(filled, repo, alice, tmp_path):
    def delete(done, total):
        if not deleted:
            deleted.append(filled.repos.delete(MODEL, alice))

    deleted = []
    before = read_all(filled.root, alice)
    back_up(filled, tmp_path / "b.tar", on_progress=delete)
    restore(tmp_path / "b.tar", tmp_path / "restored")
    assert read_all(tmp_path / "restored", alice) == before


def test_backups_taken_while_people_commit_are_each_of_one_moment(filled, repo, alice, tmp_path):
    stop = threading.Event()

    def work(worker):
        number = 0
        while not stop.is_set():
            content = b"%d %d" % (worker, number) * 50
            sha256 = hashlib.sha256(content).hexdigest()
            filled.contents.store([content], sha256=sha256, size_bytes=len(content))
            filled.commits.register(repo.uid, sha256)
            large = AddLargeFile(f"{worker}/{number}", sha256)
            filled.commits.commit(repo, [large], revision="main", who=alice, message="m")
            num = filled.repos.next_number(repo)
            options = {"revision": "main", "who": alice, "message": "m"}
            filled.commits.propose(repo, [AddFile("p", b"1")], ref=f"refs/pr/{num}", **options)
            filled.discussions.create(repo, alice, num=num, title="title", description="d", target="refs/heads/main")
            number += 1

    workers = [threading.Thread(target=work, args=(worker,)) for worker in range(2)]
    for worker in workers:
        worker.start()
    for number in range(4):
        time.sleep(0.1)
        back_up(filled, tmp_path / f"{number}.tar")
    stop.set()
    for worker in workers:
        worker.join()
    for number in range(4):
        restore(tmp_path / f"{number}.tar", tmp_path / f"{number}")  # refuses a faulty one


def test_a_backup_that_is_killed_leaves_no_file_of_its_name(filled, tmp_path):
    filled.contents.store(
        [bytes(50_000_000)], sha256=hashlib.sha256(bytes(50_000_000)).hexdigest(), size_bytes=50_000_000
    )
    code = (
        "import os, signal, sys; from pathlib import Path; from hub_moe.hubserver.store import Store\n"
        "from hub_moe.hubserver.store.backup import back_up\n"
        "die = lambda done, total: os.kill(os.getpid(), signal.SIGKILL)\n"
        "back_up(Store(Path(sys.argv[1])), Path(sys.argv[2]), on_progress=die)"
    )
    target = tmp_path / "b.tar"
    done = subprocess.run([sys.executable, "-c", code, str(filled.root), str(target)], capture_output=True)
    assert (done.returncode, target.exists()) == (-9, False)
    with pytest.raises(ConfigError, match=r"b\.tar\.partial exists already"):
        back_up(filled, target)
