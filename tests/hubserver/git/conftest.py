"""A Hub, a new repo on it, and git as alice and as nobody."""

import hashlib

import pytest

from ..client_over_http import Client
from .git_client import Git


@pytest.fixture(scope="module")
def client(hub):
    with Client(hub) as client:
        yield client


@pytest.fixture
def name(client, request):
    """A new repo of alice's with one file."""
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]
    client.create(name)
    client.commit(name, {"README.md": b"# hi\n", "data/x.txt": b"x"})
    return name


@pytest.fixture
def git(hub, tmp_path):
    return Git(hub, tmp_path / "home")


@pytest.fixture
def nobody(hub, tmp_path):
    return Git(hub, tmp_path / "home", user=None)


@pytest.fixture
def lfs(git):
    git.run("lfs", "install", "--skip-repo")
    return git
