"""A store in a temporary folder with users alice and bob."""

import pytest

pytest.importorskip("dulwich")

from hub_moe.hubserver.store import RepoId, Store

MODEL = RepoId("model", "alice", "m")


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "hub") as store:
        store.accounts.add_user("alice")
        store.accounts.add_user("bob")
        yield store


@pytest.fixture
def alice(store):
    return store.accounts.identify(store.accounts.create_token("alice"))


@pytest.fixture
def bob(store):
    return store.accounts.identify(store.accounts.create_token("bob"))


@pytest.fixture
def repo(store, alice):
    return store.repos.create(MODEL, alice)
