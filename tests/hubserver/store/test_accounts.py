"""Users who leave a Hub: nothing of theirs is left without an owner, and what they said stays."""

import pytest

from hub_moe.hubserver.store import RepoId
from hub_moe.hubserver.store.errors import ConflictError, NotFoundError, UnauthenticatedError


def test_a_user_with_repos_is_not_removed_and_they_are_named(store, repo, alice):
    store.repos.create(RepoId("dataset", "alice", "d"), alice)
    with pytest.raises(ConflictError, match=r"^alice still has the dataset alice/d and the model alice/m; give them"):
        store.accounts.remove("ALICE")
    assert store.accounts.identify_by_id(alice.token_id) == alice


def test_of_many_repos_some_are_named(store, alice):
    for number in range(12):
        store.repos.create(RepoId("model", "alice", f"m{number:02}"), alice)
    with pytest.raises(ConflictError, match=r"alice/m08 and 3 more; give"):
        store.accounts.remove("alice")


def test_the_only_admin_of_an_organisation_is_not_removed(store):
    for org in ("lab", "club", "team"):
        store.accounts.add_user(org, kind="org", members=["alice"])
        store.accounts.add_member(org, "bob", role="admin")
    store.accounts.add_member("team", "alice", role="admin")
    with pytest.raises(ConflictError, match=r"^bob is the only admin of club and lab; give"):
        store.accounts.remove("bob")
    for org in ("lab", "club"):
        store.accounts.add_member(org, "alice", role="admin")
    store.accounts.remove("bob")
    assert [name for name, _ in store.accounts.members("lab")] == ["alice"]


def test_the_only_admin_with_repos_hears_of_both(store, repo):
    store.accounts.add_user("lab", kind="org")
    store.accounts.add_member("lab", "alice", role="admin")
    with pytest.raises(ConflictError, match=r"^alice still has the model alice/m and is the only admin of lab; give"):
        store.accounts.remove("alice")


def test_what_a_removed_user_said_stays_and_their_tokens_and_likes_do_not(store, repo, bob):
    discussion = store.discussions.create(repo, bob, num=1, title="Talk", description="Hello")
    store.likes.like(repo, bob)
    store.accounts.remove("bob")
    with pytest.raises(UnauthenticatedError):
        store.accounts.identify_by_id(bob.token_id)
    with pytest.raises(NotFoundError):
        store.accounts.find("bob")
    assert store.discussions.find(repo, discussion.num).author == "bob"
    assert store.likes.likers(repo) == []


def test_an_organisation_without_repos_is_removed_and_its_members_stay(store):
    store.accounts.add_user("lab", kind="org", members=["alice"])
    store.accounts.remove("lab")
    assert [one["name"] for one in store.accounts.list_all()] == ["alice", "bob"]
    assert store.accounts.orgs("alice") == []
