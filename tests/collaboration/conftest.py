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
