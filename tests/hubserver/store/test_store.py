"""Repos, commits, large files and accounts without HTTP."""

import hashlib
import threading

import pytest

from hub_moe.errors import ConfigError
from hub_moe.hubserver.store import RepoId, Store
from hub_moe.hubserver.store.check import find_faults, find_orphans
from hub_moe.hubserver.store.commits import AddFile, AddLargeFile, DeleteFile
from hub_moe.hubserver.store.errors import (
    ConflictError,
    ForbiddenError,
    GatedError,
    InvalidInputError,
    NotFoundError,
    StaleParentError,
    TooLargeError,
    UnauthenticatedError,
)
from hub_moe.hubserver.store.git import format_pointer, parse_pointer
from hub_moe.hubserver.store.locks import take
from hub_moe.hubserver.store.repos import IN_USE

from .conftest import MODEL


def commit(store, repo, who, *operations, **options):
    return store.commits.commit(repo, operations, **{"revision": "main", "who": who, "message": "m"} | options)


def paths(store, repo, revision="main"):
    with store.repos.open(repo) as git:
        found = store.files.list_entries(git, git.resolve(revision))
    return {entry.path for entry in found if not entry.is_folder}


def upload(store, repo, content):
    sha256 = hashlib.sha256(content).hexdigest()
    store.contents.store([content], sha256=sha256, size_bytes=len(content))
    store.commits.register(repo.uid, sha256)
    return sha256


def test_a_new_repo_has_one_commit_with_gitattributes(store, repo):
    assert paths(store, repo) == {".gitattributes"}
    with store.repos.open(repo) as git:
        assert [entry.message for entry in git.log(git.resolve("main"))] == ["initial commit"]


def test_a_commit_adds_replaces_and_deletes_files_and_folders(store, repo, alice):
    commit(store, repo, alice, AddFile("a/b/x", b"1"), AddFile("a/y", b"2"), AddFile("z", b"3"))
    commit(store, repo, alice, DeleteFile("a/b/"), DeleteFile("z"), AddFile("a/y", b"4"), AddFile("new", b"5"))
    assert paths(store, repo) == {".gitattributes", "a/y", "new"}


def test_a_folder_may_be_deleted_and_refilled_in_one_commit(store, repo, alice):
    commit(store, repo, alice, AddFile("a/old", b"1"))
    commit(store, repo, alice, AddFile("a/new", b"2"), DeleteFile("a/"))
    assert paths(store, repo) == {".gitattributes", "a/new"}


def test_a_commit_that_changes_nothing_leaves_the_head(store, repo, alice):
    head = commit(store, repo, alice, AddFile("x", b"1"))
    assert commit(store, repo, alice, AddFile("x", b"1")) == head


@pytest.mark.parametrize(
    ("operations", "error"),
    [
        ([AddFile("../x", b"")], InvalidInputError),
        ([DeleteFile("missing")], NotFoundError),
        ([DeleteFile(".gitattributes/")], NotFoundError),
        ([AddFile("x", b""), AddFile("x/y", b"")], InvalidInputError),
        ([AddFile(".gitattributes/x", b"")], InvalidInputError),
        ([AddLargeFile("x", "0" * 64)], InvalidInputError),
        ([AddFile("x", format_pointer("0" * 64, 5))], InvalidInputError),
    ],
)
def test_an_impossible_operation_changes_nothing(store, repo, alice, operations, error):
    with pytest.raises(error):
        commit(store, repo, alice, AddFile("good", b"1"), *operations)
    assert paths(store, repo) == {".gitattributes"}


def test_a_stale_parent_is_refused(store, repo, alice):
    old = commit(store, repo, alice, AddFile("x", b"1"))
    commit(store, repo, alice, AddFile("x", b"2"), parent=old)
    with pytest.raises(StaleParentError):
        commit(store, repo, alice, AddFile("x", b"3"), parent=old)


def test_concurrent_commits_are_each_applied_once(store, repo, alice):
    def work(worker):
        for number in range(10):
            commit(store, repo, alice, AddFile(f"{worker}/{number}", b"x"))

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths(store, repo) == {".gitattributes"} | {f"{w}/{n}" for w in range(4) for n in range(10)}
    with store.repos.open(repo) as git:
        assert len(list(git.log(git.resolve("main")))) == 41


def test_a_large_file_is_a_pointer_in_git_and_seen_by_its_real_size(store, repo, alice):
    content = b"large" * 1000
    sha256 = upload(store, repo, content)
    head = commit(store, repo, alice, AddLargeFile("model.safetensors", sha256))
    with store.repos.open(repo) as git:
        facts = store.files.find(git, head, "model.safetensors")
        assert parse_pointer(git.read_file(facts.oid)) == (sha256, 5000)
        assert (facts.sha256, facts.size_bytes, facts.pointer_size_bytes) == (sha256, 5000, 129)
        assert store.files.read(git, facts) == content


def test_knowing_the_sha256_of_anothers_file_does_not_give_its_content(store, repo, alice, bob):
    sha256 = upload(store, repo, b"secret")
    bobs = store.repos.create(RepoId("model", "bob", "m"), bob)
    with pytest.raises(InvalidInputError, match="never uploaded"):
        commit(store, bobs, bob, AddLargeFile("x", sha256))
    with pytest.raises(InvalidInputError, match="never uploaded"):
        commit(store, bobs, bob, AddFile("x", format_pointer(sha256, 6)))


@pytest.mark.parametrize("content", [b"other", b"longer than said", b"cut"])
def test_content_is_refused_unless_its_size_and_sha256_are_as_promised(store, content):
    sha256 = hashlib.sha256(b"right").hexdigest()
    with pytest.raises(InvalidInputError):
        store.contents.store([content], sha256=sha256, size_bytes=5)
    assert store.contents.blobs.size_bytes(sha256) is None
    assert list(store.contents.blobs.incoming.iterdir()) == []


def test_a_stream_longer_than_promised_is_cut_at_once(store):
    def endless():
        while True:
            yield b"x" * 100

    with pytest.raises(TooLargeError):
        store.contents.store(endless(), sha256="0" * 64, size_bytes=1000)


def test_branches_and_tags(store, repo, alice):
    first = commit(store, repo, alice, AddFile("x", b"1"))
    store.commits.create_branch(repo, "feature/a", start="main")
    store.commits.create_tag(repo, "v1", at=first[:40], who=alice, message="one")
    second = commit(store, repo, alice, AddFile("x", b"2"), revision="feature/a")
    with store.repos.open(repo) as git:
        assert git.list_refs("refs/heads/") == {"feature/a": second, "main": first}
        assert git.list_refs("refs/tags/") == {"v1": first}
    with pytest.raises(ConflictError):
        store.commits.create_branch(repo, "main", start="main")
    with pytest.raises(ConflictError):
        store.commits.create_branch(repo, "feature", start="main")
    with pytest.raises(NotFoundError):
        commit(store, repo, alice, AddFile("x", b"3"), revision="v1")
    store.commits.delete_ref(repo, "refs/heads/feature/a")
    with pytest.raises(InvalidInputError):
        store.commits.delete_ref(repo, "refs/heads/main")


def test_squash_keeps_the_files_and_one_commit(store, repo, alice):
    commit(store, repo, alice, AddFile("x", b"1"))
    head = store.commits.squash(repo, branch="main", who=alice, message="all")
    assert paths(store, repo) == {".gitattributes", "x"}
    with store.repos.open(repo) as git:
        assert [entry.oid for entry in git.log(git.resolve("main"))] == [head]


def test_a_moved_repo_keeps_its_history_and_its_old_name_is_free(store, repo, alice):
    head = commit(store, repo, alice, AddFile("x", b"1"))
    store.repos.move(MODEL, RepoId("model", "alice", "n"), alice)
    with pytest.raises(NotFoundError):
        store.repos.find(MODEL, alice)
    moved = store.repos.find(RepoId("model", "ALICE", "N"), alice)
    assert str(moved.id) == "alice/n"
    with store.repos.open(moved) as git:
        assert git.resolve("main") == head


def test_who_may_see_and_change_a_repo(store, repo, alice, bob):
    reader = store.accounts.identify(store.accounts.create_token("alice", name="r", role="read"))
    with pytest.raises(ForbiddenError):
        store.repos.find_to_write(MODEL, bob)
    with pytest.raises(ForbiddenError):
        store.repos.find_to_write(MODEL, reader)
    with pytest.raises(UnauthenticatedError):
        store.repos.find_to_write(MODEL, None)
    store.repos.update(MODEL, alice, private=True)
    for who in (bob, None):
        with pytest.raises(NotFoundError):
            store.repos.find(MODEL, who)
        assert store.repos.visible("model", who) == []
    assert store.repos.find(MODEL, reader).private


def test_a_gated_repo_opens_to_who_was_granted(store, repo, alice, bob):
    store.repos.update(MODEL, alice, private=None, gated="manual")
    for who in (bob, None):
        with pytest.raises(GatedError):
            store.repos.find_to_read(MODEL, who)
    repo = store.repos.find(MODEL, alice)
    assert store.repos.ask_access(repo, bob) == "pending"
    assert store.repos.change_access(repo, "Bob", "accepted")
    assert store.repos.find_to_read(MODEL, bob).gated == "manual"


def test_asking_for_access_needs_a_token_that_may_write_and_undoes_nothing(store, repo, alice, bob):
    reader = store.accounts.identify(store.accounts.create_token("bob", name="r", role="read"))
    with pytest.raises(InvalidInputError, match="not gated"):
        store.repos.ask_access(repo, bob)
    store.repos.update(MODEL, alice, private=None, gated="auto")
    repo = store.repos.find(MODEL, alice)
    with pytest.raises(ForbiddenError):
        store.repos.ask_access(repo, reader)
    assert store.repos.access_status(repo, "bob") is None
    assert store.repos.ask_access(repo, bob) == "accepted"
    assert not store.repos.change_access(repo, "bob", "accepted")
    assert store.repos.change_access(repo, "bob", "rejected")
    assert store.repos.ask_access(repo, bob) == "rejected"
    assert not store.repos.add_access(repo, "bob", "accepted")
    assert store.repos.access_status(repo, "bob") == "rejected"


def test_who_asks_while_the_request_is_rejected_is_not_let_in(store, repo, alice, bob):
    store.repos.update(MODEL, alice, private=None, gated="auto")
    repo = store.repos.find(MODEL, alice)
    for number in range(10):
        name = f"user{number}"
        store.accounts.add_user(name)
        who = store.accounts.identify(store.accounts.create_token(name))
        store.repos.add_access(repo, name, "pending")
        threads = [threading.Thread(target=store.repos.ask_access, args=(repo, who)) for _ in range(3)]
        for thread in threads:
            thread.start()
        store.repos.change_access(repo, name, "rejected")
        for thread in threads:
            thread.join()
        assert store.repos.access_status(repo, name) == "rejected"


def test_an_organisation_shares_its_repos_with_its_members_by_role(store, alice, bob):
    store.accounts.add_user("lab", kind="org")
    store.accounts.add_member("lab", "alice", role="write")
    store.accounts.add_member("lab", "bob", role="read")
    lab = RepoId("dataset", "lab", "d")
    store.repos.create(lab, alice, private=True)
    assert store.repos.find(lab, bob).private
    with pytest.raises(ForbiddenError):
        store.repos.find_to_write(lab, bob)


def test_a_revoked_token_is_worth_nothing_and_no_token_is_stored(store, alice, tmp_path):
    token = store.accounts.create_token("bob", name="x")
    store.accounts.revoke_token("bob", "x")
    with pytest.raises(UnauthenticatedError):
        store.accounts.identify(token)
    files = [path.read_bytes() for path in (tmp_path / "hub").glob("hub.sqlite3*")]
    assert not any(token.encode() in content for content in files)


@pytest.mark.parametrize("name", ["ALICE", "datasets", "a/b"])
def test_a_user_cannot_take_a_name_that_is_taken_reserved_or_invalid(store, name):
    with pytest.raises((ConflictError, InvalidInputError)):
        store.accounts.add_user(name)


def test_one_folder_is_served_by_one_server(tmp_path):
    with Store(tmp_path, serve=True), pytest.raises(ConfigError, match="Another server"):
        Store(tmp_path, serve=True)


def test_a_server_clears_what_a_killed_one_left(store, repo, alice, tmp_path):
    git = store.repos.path(repo)
    (git / "refs/heads/main.lock").touch()
    (git / "objects/tmp_obj_x").touch()
    (store.contents.blobs.incoming / "half").touch()
    with Store(store.root, serve=True) as again:
        commit(again, repo, alice, AddFile("x", b"1"))
        assert list(again.contents.blobs.incoming.iterdir()) == []
    assert not list(git.glob("objects/tmp_obj_*"))


@pytest.mark.parametrize("lock", ["cleaning.lock", "repo"])
def test_a_server_that_starts_beside_a_gc_leaves_what_that_is_writing(store, repo, alice, lock):
    git = store.repos.path(repo)
    (git / "refs/heads/main.lock").touch()
    half = [git / "objects/tmp_obj_x", git / "objects/pack/pack-1.pack"]
    for path in half:
        path.touch()
    with take(git / IN_USE if lock == "repo" else store.root / lock), Store(store.root, serve=True):
        assert [path.exists() for path in half] == [True, True]
    commit(store, repo, alice, AddFile("x", b"1"))
    with Store(store.root, serve=True) as again:
        assert [path.exists() for path in half] == [False, False]
        assert list(find_faults(again)) == []


def test_check_finds_a_damaged_object_a_missing_file_and_a_false_sha256(store, repo, alice):
    sha256 = upload(store, repo, b"large")
    head = commit(store, repo, alice, AddFile("x", b"1"), AddLargeFile("y", sha256))
    assert list(find_faults(store)) == []
    store.contents.blobs.path(sha256).write_bytes(b"LARGE")
    assert len(list(find_faults(store))) == 1
    store.contents.blobs.path(sha256).unlink()
    assert len(list(find_faults(store))) == 2
    with store.repos.open(repo) as git:
        oid = store.files.find(git, head, "x").oid
    (store.repos.path(repo) / "objects" / oid[:2] / oid[2:]).unlink()
    assert any("missing or damaged object" in fault for fault in find_faults(store))


def test_check_names_a_repository_that_belongs_to_nobody(store, repo):
    (store.root / "repos" / "lost.git").mkdir()
    assert find_orphans(store) == ["lost.git"]
