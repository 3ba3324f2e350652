"""A Hub filled with repos, people who visit it by HTTP, and a real browser."""

import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2
import pytest

from hub_moe.hubserver.process import Hub
from hub_moe.hubserver.pytest_plugin import create_hub

from .showcase import fill

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
BROWSER_OPTIONS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
FORM_TOKEN = re.compile(r'name="form_token" value="([0-9a-f]+)"')


@dataclass
class Town:
    """A running Hub and the numbers of the talk on `alice/nano-moe-cook`."""

    hub: Hub
    talk: dict[str, int]

    @property
    def url(self):
        return self.hub.url


class Visitor:
    """A person at a browser, as far as HTTP goes; `token` logs them in."""

    def __init__(self, url, token=None):
        self.url = url
        self.client = httpx2.Client(base_url=url, headers=HTML, timeout=60)
        self.form_token = ""
        if token:
            assert self.post("/login", token=token, next="/").status_code == 303
            self.form_token = FORM_TOKEN.search(self.get("/").text).group(1)

    def get(self, path, **options):
        return self.client.get(path, **options)

    def post(self, path, *, headers=None, **fields):
        fields = {"form_token": self.form_token} | fields
        return self.client.post(path, data=fields, headers={"origin": self.url} | (headers or {}))


@pytest.fixture(scope="session")
def town(tmp_path_factory):
    """Read it, change nothing in it."""
    hub = create_hub(tmp_path_factory.mktemp("town") / "root")
    talk = fill(hub)
    with hub.running():
        yield Town(hub, talk)


@pytest.fixture(scope="session")
def visit(town):
    """`visit()` is a stranger, `visit("alice")` somebody logged in by their token of that name."""
    visitors = []

    def start(user=None):
        visitors.append(Visitor(town.url, town.hub.tokens[user] if user else None))
        return visitors[-1]

    yield start
    for visitor in visitors:
        visitor.client.close()


@pytest.fixture(scope="session")
def stranger(visit):
    return visit()


@pytest.fixture(scope="package")  # while it is open, no other test can start an event loop
def browser():
    """A headless Chromium; skips where none is installed, unless everything has to be tested."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        message = f"none of {', '.join(BROWSERS)} is installed"
        if os.environ.get("HUB_MOE_TEST_EVERYTHING"):
            pytest.fail(message)
        pytest.skip(message)
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """`with open_page(url, width=360) as page`; a dialog, an error or a request to elsewhere fails.

    `expected` is a pattern of errors that belong to the test.
    """

    @contextmanager
    def open_one(origin, *, width=1280, expected=None, **options):
        context = browser.new_context(viewport={"width": width, "height": 740}, **options)
        page, faults = context.new_page(), []
        page.on("dialog", lambda dialog: (faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("pageerror", lambda error: faults.append(f"script: {error}"))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        context.on("request", lambda asked: asked.url.startswith(origin) or faults.append(f"foreign: {asked.url}"))
        yield page
        context.close()
        assert [fault for fault in faults if not (expected and re.search(expected, fault))] == []

    return open_one
