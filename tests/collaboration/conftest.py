"""A Hub, and this process as a client of it: alice, who owns the bases."""

import os
import sys

import pytest

pytest.importorskip("dulwich")
pytest.importorskip("starlette")

from hub_moe.hubserver.pytest_plugin import hub  # noqa: F401  (for installations older than the entry point)


@pytest.fixture(scope="module")
def world(hub, tmp_path_factory):  # noqa: F811
    """See `proposals.World`; the client's settings are put back after the module."""
    from huggingface_hub import constants

    from .proposals import World

    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_CACHE", str(root / "cache"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setitem(os.environ, "HF_TOKEN", hub.tokens["alice"])
        yield World(hub, root)


@pytest.fixture
def repo(world, tiny_tokenizer, request):
    """A base of the test's own; see `proposals.Repo`."""
    from .proposals import Repo

    return Repo(world, name_of(request.node), tiny_tokenizer)


@pytest.fixture
def make_repo(world, tiny_tokenizer, request):
    """Likewise, where a function put the base's evidence and card into its folder."""
    from .proposals import Repo

    return lambda prepare: Repo(world, name_of(request.node), tiny_tokenizer, prepare=prepare)


def name_of(test):
    """Of a test's own repo."""
    name = "".join(letter if letter.isalnum() else "-" for letter in test.name)[5:60].strip("-")
    return f"m-{name}".replace("--", "-")


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `hub-moe` in this process: `(exit code, stdout, stderr)`."""
    from hub_moe.cli.main import main

    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hub-moe", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return run
