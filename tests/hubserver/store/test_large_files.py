"""Large files of a repo: deleted for good, copied with the repo, and what of it survives clearing up."""

import hashlib

import pytest

from hub_moe.hubserver.profiles import read_main
from hub_moe.hubserver.store import RepoId
from hub_moe.hubserver.store.check import find_faults, find_orphans
from hub_moe.hubserver.store.commits import AddFile, AddLargeFile, DeleteFile
from hub_moe.hubserver.store.errors import InvalidInputError, NotFoundError
from hub_moe.hubserver.store.gc import collect

CONTENT = b"weights " * 1000


@pytest.fixture
def commit(store, repo, alice):
    def commit(*operations, revision="main"):
        return store.commits.commit(repo, operations, revision=revision, who=alice, message="m")

    return commit


@pytest.fixture
def weights(store, repo, commit):
    """The sha256 of a file that is at three paths of the history."""
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    store.contents.store([CONTENT], sha256=sha256, size_bytes=len(CONTENT))
    store.commits.register(repo.uid, sha256)
    commit(AddLargeFile("model.safetensors", sha256), AddLargeFile("a/b/w.bin", sha256), AddFile("a/x.txt", b"1"))
    commit(DeleteFile("a/b/"), AddFile("y.txt", b"2"))
    commit(AddLargeFile("again.bin", sha256))
    return sha256


def files_of_every_commit(store, repo):
    with store.repos.open(repo) as git:
        history = [entry.oid for entry in git.log(git.resolve("main"))]
        trees = [[e.path for e in git.walk(git.tree_of(oid)) if not e.is_folder] for oid in history]
    return trees[::-1]


def test_a_rewritten_history_has_the_same_commits_without_the_file_and_its_bytes_are_freed(store, repo, alice, weights):
    store.commits.create_tag(repo, "v1", at="main", who=alice, message="annotated")
    store.large_files.delete(repo, [weights], rewrite_history=True)
    first = ".gitattributes"
    assert files_of_every_commit(store, repo) == [
        *([first], [first, "a/x.txt"], [first, "a/x.txt", "y.txt"], [first, "a/x.txt", "y.txt"])
    ]
    with store.repos.open(repo) as git:
        assert git.resolve("v1") == git.resolve("main")
    assert list(find_faults(store)) == []
    collect(store, older_than_s=-5)
    assert store.contents.size_bytes(weights) is None
    assert list(find_faults(store)) == []


def test_a_file_deleted_without_rewriting_leaves_its_commits_and_a_repo_that_can_be_shown(store, repo, commit, weights):
    store.large_files.delete(repo, [weights], rewrite_history=False)
    collect(store, older_than_s=-5)
    assert store.contents.size_bytes(weights) is None
    assert list(find_faults(store)) == []
    assert "model.safetensors" in files_of_every_commit(store, repo)[1]
    assert read_main(store, repo).safetensors is None
    commit(DeleteFile("again.bin"), AddFile("z.txt", b"3"))
    with pytest.raises(InvalidInputError, match="never uploaded"):
        commit(AddLargeFile("back.bin", weights))


def test_a_file_deleted_from_one_repo_stays_in_another(store, repo, alice, bob, weights):
    copy = store.large_files.duplicate(repo, RepoId("model", "bob", "m"), bob, private=False)
    store.large_files.delete(repo, [weights], rewrite_history=True)
    collect(store, older_than_s=-5)
    assert [file.sha256 for file in store.large_files.list_all(copy)] == [weights]
    assert store.contents.size_bytes(weights) == len(CONTENT)
    assert list(find_faults(store)) == []


def test_a_copy_has_only_what_the_original_still_has(store, repo, bob, weights):
    store.large_files.delete(repo, [weights], rewrite_history=False)
    copy = store.large_files.duplicate(repo, RepoId("model", "bob", "m"), bob, private=False)
    assert store.large_files.list_all(copy) == []
    assert list(find_faults(store)) == []


def test_a_merge_of_a_pull_request_survives_the_rewriting(store, repo, alice, weights):
    store.commits.propose(
        repo, [AddFile("p.txt", b"p")], ref="refs/pr/1", revision="refs/heads/main", who=alice, message="m"
    )
    options = {"num": 1, "title": "A change", "description": "d", "target": "refs/heads/main"}
    discussion = store.discussions.create(repo, alice, **options)
    store.merges.merge(repo, discussion, alice)
    store.large_files.delete(repo, [weights], rewrite_history=True)
    with store.repos.open(repo) as git:
        assert store.discussions.find(repo, 1).merge_commit == git.resolve("main")
        assert len(git.parents(git.resolve("main"))) == 2


def test_a_sha256_that_is_none_is_refused_and_one_that_is_not_here_changes_nothing(store, repo, weights):
    before = files_of_every_commit(store, repo)
    with pytest.raises(InvalidInputError):
        store.large_files.delete(repo, ["../x"], rewrite_history=True)
    store.large_files.delete(repo, ["0" * 64], rewrite_history=True)
    assert files_of_every_commit(store, repo) == before


def test_a_short_commit_id_must_be_unique(store, repo, commit):
    ids = [commit(AddFile("x.txt", str(number).encode())) for number in range(3)]
    with store.repos.open(repo) as git:
        assert [git.resolve(oid[:7]) for oid in ids] == ids
        for wrong in (ids[0][:6], "0" * 7, ids[0][:7].upper() + "g", git.tree_of(ids[0])[:10]):
            with pytest.raises(NotFoundError):
                git.resolve(wrong)


def copy_after(store, repo, alice, sha256, action):
    """Copy the large files of a repo; `action` comes between the copy of the history and the note of the files."""

    def fill(git):
        with store.repos.open(repo) as original:
            original.copy_history(git, {"refs/heads/main": original.resolve("main")})
        action()
        collect(store, older_than_s=-5)
        return lambda connection, uid: store.commits.copy_notes(connection, repo, uid, [sha256])

    return store.repos.create(RepoId("model", "alice", "copy"), alice, fill=fill)


def test_a_copy_of_a_repo_that_is_deleted_meanwhile_is_not_made(store, repo, alice, weights):
    with pytest.raises(NotFoundError):
        copy_after(store, repo, alice, weights, lambda: store.repos.delete(repo.id, alice))
    assert store.contents.size_bytes(weights) is None
    assert (store.repos.all(), find_orphans(store), list(find_faults(store))) == ([], [], [])


def test_a_copy_knows_what_was_deleted_for_good_while_it_was_made(store, repo, alice, weights):
    def delete():
        store.large_files.delete(repo, [weights], rewrite_history=False)

    copy = copy_after(store, repo, alice, weights, delete)
    assert store.commits.was_deleted(copy, weights)
    assert list(find_faults(store)) == []
