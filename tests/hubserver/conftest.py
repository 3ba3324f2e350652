"""A running Hub, and the real client of the Hub with and without hf_xet."""

import os

import pytest

pytest.importorskip("dulwich")
pytest.importorskip("starlette")

from hub_moe.hubserver.pytest_plugin import hub  # noqa: F401  (for installations older than the entry point)


@pytest.fixture(params=["http", "xet"])
def transfer(request, monkeypatch, tmp_path):
    """How the client sends large files."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "http")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(os.environ, "HF_XET_CACHE", str(tmp_path / "xet"))
    return request.param


@pytest.fixture
def api(transfer, hub):  # noqa: F811
    """alice's client."""
    return _client(hub, "alice")


@pytest.fixture
def bob(transfer, hub):  # noqa: F811
    """bob's client."""
    return _client(hub, "bob")


@pytest.fixture
def reader(transfer, hub):  # noqa: F811
    """alice's client with a token that may only read."""
    return _client(hub, "reader")


@pytest.fixture
def nobody(transfer, hub):  # noqa: F811
    """A client that is not logged in."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.url, token=False)


@pytest.fixture
def repo_id(api, request):
    """A new model repo of alice's, named after the test."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[-80:].strip("-")
    return api.create_repo(f"alice/{name}".replace("--", "-")).repo_id


def _client(hub, user):  # noqa: F811
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.url, token=hub.tokens[user])
