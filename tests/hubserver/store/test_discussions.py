"""Discussions and pull requests in the store: what is refused is not done, and nobody undoes what another did."""

import threading

import pytest

from hub_moe.hubserver.store.commits import MAX_MESSAGE_CHARACTERS, AddFile
from hub_moe.hubserver.store.discussions import MAX_COMMENT_CHARACTERS, MAX_HISTORY
from hub_moe.hubserver.store.errors import InvalidInputError, NotFoundError
from hub_moe.hubserver.store.gc import collect
from hub_moe.hubserver.store.merges import render_diff

LONG = "x" * (MAX_COMMENT_CHARACTERS + 1)


@pytest.fixture
def propose(store, repo, bob):
    def propose(path="a", content=b"1"):
        num = store.repos.next_number(repo)
        ref = f"refs/pr/{num}"
        store.commits.propose(repo, [AddFile(path, content)], ref=ref, revision="main", who=bob, message="m")
        return store.discussions.create(repo, bob, num=num, title="title", description="d", target="refs/heads/main")

    return propose


@pytest.mark.parametrize("description", ["", "  ", LONG])
def test_a_discussion_without_a_first_comment_is_not_opened(store, repo, bob, description):
    with pytest.raises(InvalidInputError, match="comment"):
        store.discussions.create(repo, bob, num=1, title="title", description=description)
    assert store.discussions.list_all(repo) == []


def test_a_discussion_of_a_repo_that_was_deleted_is_not_opened(store, repo, alice, bob):
    store.repos.delete(repo.id, alice)
    with pytest.raises(NotFoundError):
        store.discussions.create(repo, bob, num=1, title="title", description="d")
    with pytest.raises(NotFoundError):
        store.repos.next_number(repo)


@pytest.mark.parametrize(
    "change",
    [{"comment": " "}, {"comment": LONG}, {"status": "merged"}, {"status": ""}, {"title": ""}, {"title": LONG}],
)
def test_of_several_changes_all_are_made_or_none(store, repo, bob, propose, change):
    one = propose()
    with pytest.raises(InvalidInputError):
        store.discussions.change(repo, one, bob, **{"title": "other", "comment": "said", "status": "closed"} | change)
    assert store.discussions.find(repo, one.num) == one
    assert [event.type for event in store.discussions.events(repo, one)] == ["comment"]
    made = store.discussions.change(repo, one, bob, title=" other ", comment="said", status="closed")
    assert made == store.discussions.events(repo, one)[1:]
    assert [event.type for event in made] == ["title-change", "comment", "status-change"]
    assert (made[0].data["to"], store.discussions.find(repo, one.num).title) == ("other", "other")


def test_every_message_has_the_same_limit(store, repo, alice, bob):
    long, changes = "x" * (MAX_MESSAGE_CHARACTERS + 1), [AddFile("a", b"1")]
    for message in (long, " "):
        with pytest.raises(InvalidInputError, match="message"):
            store.commits.propose(repo, changes, ref="refs/pr/1", revision="main", who=bob, message=message)
        with pytest.raises(InvalidInputError, match="message"):
            store.commits.commit(repo, changes, revision="main", who=alice, message=message)
    with pytest.raises(InvalidInputError, match="message"):
        store.commits.squash(repo, branch="main", who=alice, message=long)
    with pytest.raises(InvalidInputError, match="message"):
        store.commits.create_tag(repo, "v1", at="main", who=alice, message=long)
    with store.repos.open(repo) as git:
        assert (git.read_ref("refs/pr/1"), git.read_ref("refs/tags/v1")) == (None, None)
        assert [entry.message for entry in git.log(git.resolve("main"))] == ["initial commit"]


def test_who_closes_what_is_merged_meanwhile_is_told_so(store, repo, alice, bob, propose):
    stale = propose()
    commit = store.merges.merge(repo, stale, alice)
    with pytest.raises(InvalidInputError, match="stays merged"):
        store.discussions.change_status(repo, stale, bob, "closed")
    with pytest.raises(InvalidInputError, match="is merged"):
        store.merges.merge(repo, stale, alice)
    now = store.discussions.find(repo, stale.num)
    assert (now.status, now.merge_commit) == ("merged", commit)


def test_a_pull_request_that_is_closed_while_it_is_merged_moves_no_branch(store, repo, alice, bob, propose):
    for number in range(8):
        one, results = propose(f"f{number}"), {}

        def attempt(name, change, *args, results=results):
            try:
                results[name] = bool(change(*args))
            except InvalidInputError:
                results[name] = False

        threads = [
            threading.Thread(target=attempt, args=("merged", store.merges.merge, repo, one, alice)),
            threading.Thread(
                target=attempt, args=("closed", store.discussions.change_status, repo, one, bob, "closed")
            ),
        ]
        for thread in threads[:: 1 if number % 2 else -1]:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(results.values()) == 1
        with store.repos.open(repo) as git:
            is_in_main = git.find_entry(git.resolve("main"), f"f{number}") is not None
        assert (store.discussions.find(repo, one.num).status == "merged") is is_in_main is results["merged"]


def test_a_pull_request_that_was_closed_just_before_the_branch_moves_is_not_merged(store, repo, alice, bob, propose):
    one = propose()
    with store.repos.open(repo) as git:
        head = git.resolve("main")
    store.discussions.change_status(repo, one, bob, "closed")
    with pytest.raises(InvalidInputError, match="is closed"), store.discussions.merging(repo, one, alice, head):
        pytest.fail("the branch would move")
    assert store.discussions.find(repo, one.num).merge_commit is None


def test_a_merge_that_fails_leaves_the_pull_request_open(store, repo, alice, propose):
    one = propose()
    with pytest.raises(OSError, match="full"), store.discussions.merging(repo, one, alice, "0" * 40):
        raise OSError("full")
    assert store.discussions.find(repo, one.num).status == "open"


def test_a_comment_that_is_hidden_while_it_is_edited_stays_hidden(store, repo, alice, bob, propose):
    one = propose()
    for _ in range(10):
        event = store.discussions.comment(repo, one, bob, "insult")

        def edit(event=event):
            for number in range(10):
                try:
                    store.discussions.edit_comment(repo, one, bob, event.id, f"insult {number}")
                except InvalidInputError:
                    return

        thread = threading.Thread(target=edit)
        thread.start()
        store.discussions.hide_comment(repo, one, alice, event.id)
        thread.join()
        last = store.discussions.events(repo, one)[-1]
        assert (last.data["hidden"], "insult" in str(last.data)) == (True, False)


def test_a_comment_keeps_its_last_versions(store, repo, bob, propose):
    one = propose()
    event = store.discussions.comment(repo, one, bob, "first")
    for number in range(MAX_HISTORY + 5):
        event = store.discussions.edit_comment(repo, one, bob, event.id, str(number))
    assert [version["raw"] for version in event.data["history"]] == [str(n) for n in range(4, MAX_HISTORY + 4)]
    assert store.discussions.events(repo, one)[-1] == event


def render(store, repo, num):
    with store.repos.open(repo) as git:
        return render_diff(git, store.discussions.find(repo, num))


@pytest.mark.parametrize("commits", [0, 1])
def test_a_merged_pull_request_without_changes_shows_none(store, repo, alice, bob, commits):
    for number in range(commits):
        store.commits.commit(repo, [AddFile("b", b"%d" % number)], revision="main", who=alice, message="m")
    with store.commits.changing(repo) as git:
        git.move_ref("refs/pr/1", old=None, new=git.resolve("main"))
    one = store.discussions.create(repo, bob, num=1, title="title", description="d", target="refs/heads/main")
    store.merges.merge(repo, one, alice)
    assert render(store, repo, 1) == ""


def test_a_merged_pull_request_shows_the_same_after_squash_and_gc(store, repo, alice, propose):
    one = propose()
    store.commits.commit(repo, [AddFile("b", b"1")], revision="main", who=alice, message="m")
    merge_commit = store.merges.merge(repo, one, alice)
    before = render(store, repo, one.num)
    assert "diff --git a/a b/a" in before
    assert "b/b" not in before
    store.commits.squash(repo, branch="main", who=alice, message="")
    collect(store, older_than_s=-5)
    assert render(store, repo, one.num) == before
    with store.repos.open(repo) as git:
        assert git.resolve(merge_commit) == merge_commit
        (git.path / "objects" / merge_commit[:2] / merge_commit[2:]).unlink()  # as an older `hub gc` has done
    assert "diff --git a/a b/a" in render(store, repo, one.num)
    assert collect(store, older_than_s=-5).skipped == []
