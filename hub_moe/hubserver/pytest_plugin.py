"""A pytest fixture `hub`: a real Hub on a free port, with users alice and bob, for any project's tests.

The client of the Hub reads HF_ENDPOINT once, when it is imported. Tests that use it in this process pass
`endpoint=hub.url` to `HfApi`; `hub.run_python` runs steps that cannot in a process of their own.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .process import Hub

__all__ = ["Hub", "create_hub", "hub"]


def create_hub(root: Path, *, options: tuple[str, ...] = ()) -> Hub:
    """A stopped Hub in `root` with users alice and bob, each with a token that may write."""
    from .store import Store

    hub = Hub(root, options=options)
    with Store(root) as store:
        for user in ("alice", "bob"):
            store.accounts.add_user(user)
            hub.tokens[user] = store.accounts.create_token(user)
        hub.tokens["reader"] = store.accounts.create_token("alice", name="reader", role="read")
    return hub


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub that runs as long as the tests do. Repos stay, so give each test's repos names of their own."""
    with create_hub(tmp_path_factory.mktemp("hub") / "root").running() as running:
        yield running
