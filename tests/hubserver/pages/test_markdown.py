"""Cards and comments as HTML: what is kept, what is rewritten, what never comes through."""

import re
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_moe.hubserver.pages.markdown import MAX_CHARACTERS, Place, render_markdown
from hub_moe.hubserver.pages.tables import MAX_CELLS
from hub_moe.hubserver.store import RepoId

from .xss import VECTORS

PLACE = Place(RepoId("model", "alice", "m"), "refs/pr/1", "docs")
HERE = "/alice/m/{}/refs%2Fpr%2F1/"
FORBIDDEN = {"script", "style", "iframe", "object", "embed", "form", "input", "button", "svg", "math", "base", "meta"}
FORBIDDEN |= {"link", "video", "audio", "source", "template", "textarea", "select", "noscript", "title", "body"}


class Reader(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def find_dangers(html):
    """What in a piece of HTML could run, load from elsewhere, or pretend to be ours."""
    for tag, attrs in Reader(html).tags:
        if tag in FORBIDDEN:
            yield tag
        for name, value in attrs.items():
            if name.startswith("on") or name in {"style", "srcset", "srcdoc", "formaction", "action", "poster", "name"}:
                yield f"{tag} {name}"
            if name == "href" and not re.match(r"(https?:|mailto:|#card-|/(?![/\\]))", value or ""):
                yield f"{tag} {value}"
            if name == "src" and not re.match(r"/(?![/\\])(\S+/resolve|uploads)/", value or ""):
                yield f"{tag} {value}"
            if name == "id" and not value.startswith("card-"):
                yield f"id {value}"


@pytest.mark.parametrize("text", VECTORS)
def test_no_known_attack_comes_through(text):
    for around in ("{}", "word {} word", "- {}\n", "> {}", "<div>{}</div>", "\n\n{}\n\n<b>after</b>"):
        assert list(find_dangers(render_markdown(around.replace("{}", text), PLACE))) == []


@given(
    st.lists(st.sampled_from([*VECTORS, "\n\n", "<p>", "</p>", "`", "[", "](", ")", "<", ">", '"', "'"]), max_size=5)
)
def test_no_mixture_of_attacks_comes_through(parts):
    assert list(find_dangers(render_markdown("".join(parts), PLACE))) == []


@given(st.text())
def test_any_text_is_rendered_safely(text):
    assert list(find_dangers(render_markdown(text, PLACE))) == []


def test_the_check_for_dangers_finds_them():
    for html in ("<script>", "<a href='javascript:x'>", "<img src='https://x/'>", "<b onclick=x>", "<p id=main>"):
        assert list(find_dangers(html)), html


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("notes.md", HERE.format("blob") + "docs/notes.md"),
        ("../train.py", HERE.format("blob") + "train.py"),
        ("./a b%20c.md#Part", HERE.format("blob") + "docs/a%20b%20c.md#Part"),
        ("data/", HERE.format("tree") + "docs/data"),
        ("/bob/other", "/bob/other"),
        ("#usage", "#card-usage"),
        ("https://example.org/x?y=1", "https://example.org/x?y=1"),
        ("mailto:a@example.org", "mailto:a@example.org"),
    ],
)
def test_a_link_leads_where_its_author_meant(written, address):
    html = render_markdown(f'<a href="{written}">x</a>', PLACE)
    assert [attrs.get("href") for tag, attrs in Reader(html).tags if tag == "a"] == [address]


@pytest.mark.parametrize(
    "written", ["../../x", "../..", "javascript:x", "data:text/html,x", "http://[", "ftp://x/y", ""]
)
def test_a_link_that_leads_nowhere_loses_its_address(written):
    html = render_markdown(f'<a href="{written}">x</a>', PLACE)
    assert [attrs.get("href") for tag, attrs in Reader(html).tags if tag == "a"] == [None]


def test_pictures_of_the_repo_are_shown_and_those_of_other_sites_are_links():
    html = render_markdown("![load](../load.png)\n\n![cat](https://other.example/cat.png)", PLACE)
    assert f'<img src="{HERE.format("resolve")}load.png" alt="load">' in html
    assert re.search(r'<a href="https://other.example/cat.png"[^>]*>cat</a>', html)
    badge = render_markdown("[![build](https://other.example/b.svg)](https://other.example/)", PLACE)
    assert re.search(r'<p><a href="https://other.example/"[^>]*>build</a></p>', badge)


def test_addresses_of_this_hub_are_its_own_wherever_it_is_reached():
    place = Place(PLACE.repo_id, "main", origin="http://hub.example:7860")
    html = render_markdown("![a](http://hub.example:7860/uploads/x.png) [b](http://hub.example:7860/alice/m)", place)
    assert '<img src="/uploads/x.png" alt="a">' in html
    assert 'href="/alice/m"' in html
    assert "<img" not in render_markdown("![a](http://hub.example:7860.evil.example/uploads/x.png) ![b](/login)", place)


def test_headings_start_below_the_page_s_own_and_can_be_linked_to():
    html = render_markdown("# One\n\n## Two words\n\n## Two words\n\n<h1>Three</h1>\n\n###### Six", PLACE)
    assert re.findall(r"<(h\d)[^>]*>", html) == ["h2", "h3", "h3", "h2", "h6"]
    assert re.findall(r'id="([^"]+)"', html) == ["card-one", "card-two-words", "card-two-words-1", "card-six"]


def test_tables_keep_their_alignment_without_a_style():
    html = render_markdown("| a | b |\n| :-- | --: |\n| 1 | 2 |", PLACE)
    assert '<div class="scroll" tabindex="0"><table>' in html
    assert '<td align="right">2</td>' in html
    assert "style" not in html


def test_bare_addresses_become_links_but_not_inside_code_or_links():
    html = render_markdown(
        "See https://example.org/a_b(c). `https://x.example` [https://y.example](https://z.example)", PLACE
    )
    assert re.findall(r'href="([^"]+)"', html) == ["https://example.org/a_b(c", "https://z.example"]


def test_code_and_entities_stay_as_they_were_written():
    assert "<code>a &lt; b &amp;&amp; c</code>" in render_markdown("`a < b && c`", PLACE)
    assert "<p>&lt;b&gt; &amp; é</p>" in render_markdown("&lt;b&gt; &amp; &eacute;", PLACE)


def test_a_long_text_is_cut_and_the_nastiest_nesting_is_no_trouble():
    assert len(render_markdown("x" * (MAX_CHARACTERS + 1000), PLACE)) < MAX_CHARACTERS + 100
    for text in ("> " * 40_000, "<div>" * 8_000, "[" * 20_000, "<b>" * 8_000, "- " * 40_000, "*a_" * 8_000):
        render_markdown(text, PLACE)


def write_table(columns, rows, row="|"):
    return "|a" * columns + "\n" + "|-" * columns + "\n" + f"{row}\n" * rows


@pytest.mark.parametrize(
    "text",
    [
        write_table(200, 7000),
        write_table(1000, 1000) * 19,
        (write_table(500, 30) + "\n") * 50,
        "|a\n|-\n> b\n" * 14_000,
        "> " + write_table(1000, 1000).replace("\n", "\n> "),
    ],
)
def test_small_tables_that_stand_for_many_cells_are_shown_as_they_were_written(text):
    start_s = time.monotonic()
    html = render_markdown(text, PLACE)
    assert time.monotonic() - start_s < 30
    assert html.count("<td") + html.count("<th>") <= MAX_CELLS
    assert "|" in html


def test_a_table_of_honest_size_is_a_table_and_text_after_a_refused_one_too():
    assert render_markdown(write_table(10, 500, "|b"), PLACE).count("<td") == 5000
    html = render_markdown(write_table(1000, 1000) + "\n" + write_table(2, 1, "|b|c"), PLACE)
    assert (html.count("<table"), html.count("<td")) == (1, 2)
