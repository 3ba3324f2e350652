"""Which commit changed a file last: the fast search against the definition, on random histories."""

import random

import pytest

from hub_moe.hubserver.store import RepoId
from hub_moe.hubserver.store.commits import AddFile, DeleteFile
from hub_moe.hubserver.store.last_commits import find_last_commits

PATHS = ["a", "b.txt", "d/a", "d/e/f", "d/e/g h", "d/é", "e"]


def find_slowly(git, commit, path):
    """The newest commit of the first-parent line after which `path` is not what it was before."""
    while parents := git.parents(commit):
        if _oid(git, parents[0], path) != _oid(git, commit, path):
            return commit
        commit = parents[0]
    return commit


def _oid(git, commit, path):
    entry = git.find_entry(commit, path)
    return entry.oid if entry else None


@pytest.mark.parametrize("seed", range(3))
def test_the_last_commit_of_every_file_and_folder_is_the_one_by_definition(store, alice, seed):
    choose = random.Random(seed)
    repo = store.repos.create(RepoId("model", "alice", f"history-{seed}"), alice)
    there = set()
    for step in range(25):
        path = choose.choice(PATHS)
        goes = path in there and choose.random() < 0.3
        change = DeleteFile(path) if goes else AddFile(path, b"%d" % choose.randrange(3))
        there = there - {path} if goes else there | {path}
        store.commits.commit(repo, [change], revision="main", who=alice, message=f"step {step}")
    with store.repos.open(repo) as git:
        head = git.resolve("main")
        asked = [entry.path for entry in store.files.list_entries(git, head)]
        found = find_last_commits(git, head, [*asked, "absent", "absent/too"])
        assert {path: entry.oid for path, entry in found.items()} == {one: find_slowly(git, head, one) for one in asked}
        few = find_last_commits(git, head, asked, limit=5)
        assert few == {path: entry for path, entry in found.items() if path in few}
        assert len(few) < len(found)
