"""`hub gc`: what nothing needs goes, everything else stays, whatever happens meanwhile."""

import hashlib
import os
import threading

import pytest

from hub_moe.errors import ConfigError
from hub_moe.hubserver.store import RepoId, Store
from hub_moe.hubserver.store.check import find_faults, find_orphans
from hub_moe.hubserver.store.commits import AddFile, AddLargeFile, DeleteFile
from hub_moe.hubserver.store.errors import InvalidInputError, NotFoundError
from hub_moe.hubserver.store.gc import collect
from hub_moe.hubserver.store.locks import take
from hub_moe.hubserver.store.repos import IN_USE

from ..xet_by_hand import File, Xorb, pack_shard
from .test_contents import add_shard, add_xorb

EVERYTHING = {"older_than_s": -5}


@pytest.fixture
def commit(store, repo, alice):
    def commit(*operations, revision="main", to=None):
        options = {"revision": revision, "who": alice, "message": "m"}
        return store.commits.commit(to or repo, operations, **options)

    return commit


@pytest.fixture
def upload(store, repo):
    def upload(content, to=None):
        sha256 = hashlib.sha256(content).hexdigest()
        store.contents.store([content], sha256=sha256, size_bytes=len(content))
        store.commits.register((to or repo).uid, sha256)
        return sha256

    return upload


@pytest.fixture
def upload_by_xet(store, repo):
    def upload(*runs, to=None):
        file = File(list(runs))
        for xorb, _, _ in runs:
            add_xorb(store, xorb)
        add_shard(store, to or repo, pack_shard(file))
        return hashlib.sha256(file.content).hexdigest()

    return upload


def objects(store, repo):
    return {path for path in (store.repos.path(repo) / "objects").rglob("*") if path.is_file()}


def squash(store, repo, alice):
    store.commits.squash(repo, branch="main", who=alice, message="one")


def test_nothing_of_a_repo_in_use_is_deleted(store, repo, alice, commit, upload, upload_by_xet):
    commit(AddLargeFile("a.bin", upload(b"a" * 5000)), AddLargeFile("x.bin", upload_by_xet((Xorb([b"x"]), 0, 1))))
    store.commits.create_tag(repo, "v1", at="main", who=alice, message="annotated")
    store.commits.create_branch(repo, "old", start="main")
    store.commits.propose(repo, [AddFile("p", b"1")], ref="refs/pr/1", revision="main", who=alice, message="m")
    commit(DeleteFile("a.bin"), DeleteFile("x.bin"))
    before = objects(store, repo)
    freed = collect(store, **EVERYTHING)
    assert (freed.counts, freed.skipped) == ({}, [])
    assert objects(store, repo) == before
    assert list(find_faults(store)) == []


def test_a_squashed_history_leaves_its_objects_and_large_files_to_gc(store, repo, alice, commit, upload, upload_by_xet):
    large, shared = upload(b"l" * 9000), Xorb([b"one" * 500, b"two" * 500])
    commit(AddLargeFile("l.bin", large), AddFile("s.txt", b"small"))
    first = commit(AddLargeFile("x.bin", upload_by_xet((shared, 0, 1))))
    commit(DeleteFile("l.bin"), DeleteFile("x.bin"), AddLargeFile("y.bin", upload_by_xet((shared, 0, 2))))
    squash(store, repo, alice)
    planned = collect(store, dry_run=True, **EVERYTHING)
    assert store.contents.size_bytes(large) == 9000
    freed = collect(store, **EVERYTHING)
    assert (freed.counts, freed.sizes_bytes) == (planned.counts, planned.sizes_bytes)
    assert freed.counts.items() >= {"large files": 1, "recipes": 1}.items()
    assert freed.sizes_bytes["large files"] == 9000
    assert (store.contents.size_bytes(large), list(store.xorbs.all())) == (None, [shared.name])
    assert list(find_faults(store)) == []
    with store.repos.open(repo) as git, pytest.raises(NotFoundError):
        git.resolve(first)
    assert collect(store, **EVERYTHING).counts == {}


def test_a_deleted_repo_frees_what_no_other_repo_has(store, repo, alice, commit, upload, upload_by_xet):
    other = store.repos.create(RepoId("model", "alice", "other"), alice)
    own, both, xorb = upload(b"o" * 3000), upload(b"b" * 3000), Xorb([b"x" * 3000])
    commit(AddLargeFile("o", own), AddLargeFile("b", both), AddLargeFile("x", upload_by_xet((xorb, 0, 1))))
    upload(b"b" * 3000, to=other)
    commit(AddLargeFile("b", both), to=other)
    store.repos.delete(repo.id, alice)
    freed = collect(store, **EVERYTHING)
    assert freed.counts == {"large files": 1, "recipes": 1, "xorbs": 1}
    assert list(store.contents.all()) == [both]
    assert list(find_faults(store)) == []


def test_what_is_young_stays_because_its_commit_may_be_on_the_way(store, repo, alice, commit, upload, upload_by_xet):
    commit(AddFile("a", b"1"))
    squash(store, repo, alice)
    upload(b"not committed yet")
    upload_by_xet((Xorb([b"nor this"]), 0, 1))
    add_xorb(store, Xorb([b"no shard yet"]))
    (store.contents.blobs.incoming / "half").touch()
    assert collect(store, older_than_s=60).counts == {}
    assert collect(store, **EVERYTHING).counts.keys() == {"git objects", "large files", "recipes", "xorbs"}


def test_a_young_commit_keeps_the_old_objects_that_it_needs(store, repo, alice, commit):
    commit(AddFile("a", b"old and young"))
    for path in objects(store, repo):
        os.utime(path, (0, 0))
    commit(AddFile("b", b"young"))
    squash(store, repo, alice)
    assert collect(store, older_than_s=60).counts == {}


def test_packs_are_rewritten_without_what_nothing_needs(store, repo, alice, commit):
    many = commit(*(AddFile(f"{number}.txt", b"%d" % number) for number in range(200)))
    commit(*(DeleteFile(f"{number}.txt") for number in range(100)))
    assert list((store.repos.path(repo) / "objects/pack").glob("*.pack"))
    squash(store, repo, alice)
    planned = collect(store, dry_run=True, **EVERYTHING)
    freed = collect(store, **EVERYTHING)
    assert (freed.counts, freed.skipped) == (planned.counts, [])
    assert freed.counts["git objects"] >= 102
    with store.repos.open(repo) as git:
        assert many not in git.objects
        assert git.read_file(git.find_entry(git.resolve("main"), "150.txt").oid) == b"150"
    assert list(find_faults(store)) == []
    assert collect(store, **EVERYTHING).counts == {}


def test_a_repository_of_no_repo_is_deleted_but_not_one_in_the_making(store, repo):
    for name in ("left", "making"):
        folder = store.root / f"repos/{name}.git"
        folder.mkdir()
        os.utime(folder, (0, 0))
    with take(store.root / "repos/making.git" / IN_USE):
        os.utime(store.root / "repos/making.git", (0, 0))
        assert collect(store, **EVERYTHING).counts == {"git repositories": 1}
    assert find_orphans(store) == ["making.git"]


def test_a_stale_upload_is_deleted(store):
    parts = store.contents.blobs.incoming / "parts-x"
    parts.mkdir()
    (parts / "1").write_bytes(b"123")
    os.utime(parts / "1", (0, 0))
    os.utime(parts, (0, 0))
    assert collect(store, older_than_s=3600).sizes_bytes == {"unfinished uploads": 3}


def test_uploads_may_end_while_gc_looks_at_them(store):
    incoming, stop = store.contents.blobs.incoming, threading.Event()

    def upload():
        while not stop.is_set():
            for number in range(20):
                (incoming / str(number)).touch()
            for number in range(20):
                (incoming / str(number)).unlink()

    uploads = threading.Thread(target=upload)
    uploads.start()
    try:
        for _ in range(300):
            assert collect(store, **EVERYTHING).counts == {}
    finally:
        stop.set()
        uploads.join()


def test_a_repo_that_is_open_all_the_time_is_left_alone(store, repo, alice, commit, monkeypatch):
    monkeypatch.setattr("hub_moe.hubserver.store.gc._WAIT_S", 0.1)
    commit(AddFile("a", b"1"))
    squash(store, repo, alice)
    with store.repos.open(repo):
        assert "in use" in collect(store, **EVERYTHING).skipped[0]
    assert collect(store, **EVERYTHING).counts["git objects"] > 0


def test_a_damaged_repo_is_left_alone_and_named(store, repo, alice, commit, upload):
    large = upload(b"keep me")
    commit(AddLargeFile("a", large), AddFile("b", b"2"))
    with store.repos.open(repo) as git:
        oid = git.find_entry(git.resolve("main"), "b").oid
    (store.repos.path(repo) / "objects" / oid[:2] / oid[2:]).unlink()
    squash(store, repo, alice)
    assert "damaged" in collect(store, **EVERYTHING).skipped[0]
    assert store.contents.size_bytes(large) == 7


def test_only_one_cleans_at_a_time(store):
    with take(store.repos.cleaning_lock), pytest.raises(ConfigError, match="running"):
        collect(store)


def test_a_shard_over_a_xorb_that_gc_deleted_is_refused_with_advice_and_the_address_changes(store, repo, upload_by_xet):
    xorb, before = Xorb([b"cached by the client"]), store.xet.generation()
    upload_by_xet((xorb, 0, 1))
    with Store(store.root) as other:  # as a process of its own would: this one still remembers the xorb's index
        collect(other, **EVERYTHING)
    assert store.xet.generation() == before + 1
    with pytest.raises(InvalidInputError, match=r"gc.*HF_XET_CACHE"):
        add_shard(store, repo, pack_shard(File([(xorb, 0, 1)])))
    add_xorb(store, xorb)
    add_shard(store, repo, pack_shard(File([(xorb, 0, 1)])))


def test_gc_and_commits_at_once_lose_nothing(store, repo, alice, commit, upload, upload_by_xet):
    stop, failures, kept = threading.Event(), [], {}

    def work(worker):
        for number in range(25):
            content = b"%d %d" % (worker, number) * 100
            xorb = Xorb([content[:200], content[200:]])
            try:
                sha256 = upload(content) if number % 2 else upload_by_xet((xorb, 0, 2))
                commit(AddLargeFile(f"{worker}/{number}", sha256))
                kept[f"{worker}/{number}"] = content
            except (InvalidInputError, NotFoundError) as error:  # gc without an age may take what is not committed
                failures.append(str(error))

    def clean():
        with Store(store.root) as other:
            while not stop.is_set():
                collect(other, **EVERYTHING)

    workers = [threading.Thread(target=work, args=(worker,)) for worker in range(3)]
    cleaner = threading.Thread(target=clean)
    for thread in [*workers, cleaner]:
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    cleaner.join()
    assert list(find_faults(store)) == []
    with store.repos.open(repo) as git:
        head = git.resolve("main")
        for path, content in kept.items():
            assert store.files.read(git, store.files.find(git, head, path)) == content
    assert kept
    assert [failure for failure in failures if "upload" not in failure] == []
