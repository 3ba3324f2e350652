"""The pages in a real browser: on a wide screen and a phone, light and dark, with and without scripts allowed."""

import re

import pytest

from hub_moe.hubserver.pytest_plugin import create_hub
from hub_moe.hubserver.store import Store

from .showcase import Author, fill, png
from .test_pages import PAGES
from .xss import VECTORS

COOK = "/alice/nano-moe-cook"
PATHS = [path for path, _ in PAGES.values()]
LOGGED_IN = [f"{COOK}/discussions", f"{COOK}/discussions/1", f"{COOK}/discussions/2", "/alice/secret-moe"]
CONTRAST = """() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((one, i) => one * a + below[i] * (1 - a));
  const light = rgb => rgb.map(one => one / 255).map(one => one <= .04045 ? one / 12.92 : ((one + .055) / 1.055) ** 2.4)
    .reduce((sum, one, i) => sum + one * [.2126, .7152, .0722][i], 0);
  const back = node => {
    const layers = [];
    for (let one = node; one; one = one.parentElement) layers.unshift(parse(getComputedStyle(one).backgroundColor));
    return layers.reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const poor = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, style = getComputedStyle(node);
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest('.unseen, .skip')) continue;
    const ground = back(node), ink = over(parse(style.color), ground);
    const [low, high] = [light(ground), light(ink)].sort((a, b) => a - b);
    const isLarge = parseFloat(style.fontSize) >= 24;
    const text = `${node.className} ${walker.currentNode.data.trim()}`;
    if ((high + .05) / (low + .05) < (isLarge ? 3 : 4.5)) poor.add(text);
  }
  return [...poor];
}"""
UNNAMED = """() => [...document.querySelectorAll('input:not([type=hidden]), textarea, select, button, a, nav, img')]
  .filter(one => !(one.labels?.length || one.textContent.trim() || one.ariaLabel || one.alt || one.ariaHidden
                   || one.getAttribute('aria-labelledby') || one.title))
  .map(one => one.outerHTML.slice(0, 100))"""


def log_in(page, town, user="alice"):
    page.goto(f"{town.url}/login")
    page.get_by_label("Access token").fill(town.hub.tokens[user])
    page.get_by_role("main").get_by_role("button", name="Log in").click()
    page.wait_for_url(f"{town.url}/")


def overflow(page):
    """How much wider than the window the page is."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_reads_well_on_a_wide_screen(open_page, town, scheme):
    with open_page(town.url, color_scheme=scheme) as page:
        for path in PATHS:
            page.goto(town.url + path)
            assert overflow(page) == 0, path
            assert page.evaluate(CONTRAST) == [], path
            assert page.evaluate(UNNAMED) == [], path
            assert page.locator("h1").count() == 1, path


def test_the_checks_find_what_they_are_for(open_page, town):
    with open_page("about:", width=360) as page:
        page.set_content(
            "<h1>x</h1><p style='color: #888; background: #aaa; width: 500px'>pale</p><input><a href=x></a>"
        )
        assert overflow(page) > 100
        assert page.evaluate(CONTRAST) == [" pale"]
        assert len(page.evaluate(UNNAMED)) == 2


def test_no_page_is_wider_than_a_phone_and_no_script_is_needed(open_page, town):
    with open_page(town.url, width=360, java_script_enabled=False, color_scheme="dark") as page:
        for path in PATHS:
            page.goto(town.url + path)
            assert overflow(page) == 0, path
        log_in(page, town)
        for path in LOGGED_IN:
            page.goto(town.url + path)
            assert overflow(page) == 0, path


def test_light_and_dark_differ_and_follow_the_system(open_page, town):
    grounds = {}
    for scheme in ("light", "dark"):
        with open_page(town.url, color_scheme=scheme) as page:
            page.goto(town.url)
            grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light, dark = (sum(map(int, re.findall(r"\d+", grounds[scheme]))) for scheme in ("light", "dark"))
    assert light > 700
    assert dark < 100


def test_the_keyboard_reaches_the_content_and_shows_where_it_is(open_page, town):
    with open_page(town.url) as page:
        page.goto(town.url + COOK)
        page.keyboard.press("Tab")
        skip = page.get_by_role("link", name="Skip to the content")
        assert skip.bounding_box()["x"] >= 0
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        focused = page.evaluate("document.querySelector('main').contains(document.activeElement)")
        assert focused
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        for _ in range(25):
            page.keyboard.press("Tab")
            assert page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 1


def test_the_picture_of_a_card_is_shown_and_one_from_elsewhere_is_not_asked_for(open_page, town):
    with open_page(town.url) as page:
        page.goto(town.url + COOK)
        picture = page.get_by_alt_text("Load of the experts by layer")
        assert picture.evaluate("image => [image.complete, image.naturalWidth]") == [True, 480]
        assert page.get_by_role("link", name="build: passing").get_attribute("href").startswith("https://elsewhere")


def test_revisions_are_switched_without_a_script(open_page, town):
    with open_page(town.url, java_script_enabled=False) as page:
        page.goto(f"{town.url}{COOK}/blob/main/config.json")
        page.locator("details.menu summary").click()
        page.get_by_role("link", name="PR 2").click()
        assert page.url == f"{town.url}{COOK}/blob/refs%2Fpr%2F2/config.json"
        assert "n_shared_experts" in page.get_by_role("main").inner_text()


@pytest.fixture(scope="module")
def hostile_town(tmp_path_factory):
    """A Hub whose cards, comments, titles, names of files and rows are attacks; and alice is logged in to lose much."""
    from .conftest import Town

    hub = create_hub(tmp_path_factory.mktemp("hostile") / "root")
    with Store(hub.root) as store:
        bob = Author(store, hub.tokens["bob"])
        nasty = '"><img src=x onerror=alert(1)>'
        card = (
            "---\nlicense: '<script>alert(1)</script>'\ntags: ['<img src=x onerror=alert(1)>']\nbase_model: '" + nasty
        )
        card += "'\nlibrary_name: '<svg onload=alert(1)>'\n---\n" + "\n\n".join(VECTORS)
        rows = '{"<script>alert(1)</script>": "<img src=x onerror=alert(1)>"}\n' * 3
        files = {"README.md": card, "plots/x.png": png(40, 20), "code.py": "<script>alert(1)</script>\n" + nasty}
        files |= {f"{nasty.replace('/', '')}.txt": "x", "page.html": "<script>alert(1)</script>"}
        files |= {
            "bad.svg": '<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(1)</script></svg>'
        }
        model = bob.create("trap", files=files)
        bob.create("trap", "dataset", {"data.jsonl": rows, "README.md": "\n\n".join(reversed(VECTORS))})
        bob.commit(model, {"more.txt": "x"}, f"<script>alert(1)</script>{nasty}\n\n<script>alert(1)</script>")
        talk = bob.propose(
            model, {"code.py": "</td><script>alert(1)</script>"}, f"<script>{nasty}", "\n\n".join(VECTORS)
        )
        for vector in VECTORS:
            bob.comment(model, talk, vector)
    with hub.running():
        yield Town(hub, {"patch": talk.num})


def test_attacks_are_inert_in_cards_comments_names_and_files(open_page, hostile_town):
    paths = [
        "/",
        "/models",
        "/bob",
        "/bob/trap",
        "/datasets/bob/trap",
        "/bob/trap/discussions",
        "/bob/trap/discussions/1",
    ]
    paths += ["/bob/trap/tree/main", "/bob/trap/commits/main", "/bob/trap/commit/main", "/bob/trap/blob/main/code.py"]
    paths += ["/bob/trap/blob/main/bad.svg", "/bob/trap/blob/main/README.md", "/bob/trap/blob/main/README.md?plain=1"]
    missing_pictures = "^Failed to load resource: the server responded with a status of 4(00|04|22)"
    with open_page(hostile_town.url, expected=missing_pictures) as page:
        log_in(page, hostile_town)
        for path in paths:
            page.goto(hostile_town.url + path)
            assert page.locator("h1").count() == 1, path
            assert page.locator("main").count() == 1, path
            assert overflow(page) == 0, path
            page.mouse.move(300, 300)
            assert page.url == hostile_town.url + path
        page.goto(f"{hostile_town.url}/bob/trap")
        for link in page.get_by_role("article").get_by_text("click me").all():
            link.click(timeout=2000)
            assert page.url == f"{hostile_town.url}/bob/trap"
        assert page.get_by_role("button", name="Log out").count() == 1


def test_a_file_opened_by_itself_runs_nothing(open_page, hostile_town):
    with open_page(hostile_town.url, expected="^Blocked script execution") as page:
        log_in(page, hostile_town)
        for name in ("page.html", "bad.svg"):
            page.goto(f"{hostile_town.url}/bob/trap/resolve/main/{name}")
            page.wait_for_timeout(100)


def test_a_person_logs_in_sees_what_is_theirs_talks_and_merges(open_page, tmp_path):
    from .conftest import Town

    hub = create_hub(tmp_path / "root")
    town = Town(hub, fill(hub))
    with hub.running(), open_page(town.url, java_script_enabled=False) as page:
        page.goto(f"{town.url}{COOK}/discussions/2")
        assert page.get_by_role("button", name="Merge into main").count() == 0
        page.get_by_role("main").get_by_role("link", name="Log in").click()
        page.get_by_label("Access token").fill(hub.tokens["alice"])
        page.get_by_role("main").get_by_role("button", name="Log in").click()
        assert page.url == f"{town.url}{COOK}/discussions/2"
        page.get_by_label("Your comment").fill("Looks **right**, merging.\n\n- one\n- two")
        page.get_by_role("button", name="Comment", exact=True).click()
        assert page.locator(".comment").last.locator("strong").inner_text() == "right"
        page.get_by_role("button", name="Merge into main").click()
        assert page.locator(".talk-head .state").inner_text() == "merged"
        assert page.url == f"{town.url}{COOK}/discussions/2"
        page.goto(f"{town.url}/alice/secret-moe")
        assert "Not yet" in page.get_by_role("article").inner_text()
        page.get_by_role("button", name="Log out").click()
        assert page.goto(f"{town.url}/alice").status == 200
        assert "secret-moe" not in page.content()
        assert page.context.cookies() == []
