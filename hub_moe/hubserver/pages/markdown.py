"""Cards and comments as HTML. Their authors are strangers: whatever they write, no script, style, form or frame of
theirs reaches the page, and nothing is loaded from another site."""

import posixpath
import re
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from html.parser import HTMLParser
from urllib.parse import quote, unquote, urlsplit

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from markupsafe import Markup

from ..store import RepoId
from .tables import enable_tables
from .urls import repo_url

MAX_CHARACTERS = 120_000
_SCHEMES = {"http", "https", "mailto"}
_TAGS = {"a", "abbr", "b", "blockquote", "br", "caption", "code", "dd", "del", "details", "div", "dl", "dt", "em"}
_TAGS |= {"figcaption", "figure", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "img", "ins", "kbd", "li", "mark"}
_TAGS |= {"ol", "p", "pre", "q", "s", "samp", "small", "span", "strong", "sub", "summary", "sup", "table", "tbody"}
_TAGS |= {"td", "tfoot", "th", "thead", "tr", "u", "ul", "var"}
_CELL = {"align", "colspan", "rowspan"}
_ATTRIBUTES = {
    "*": {"dir", "id", "lang", "title"},
    "a": {"href"},
    "div": {"align"},
    "img": {"align", "alt", "height", "src", "width"},
    "li": {"value"},
    "ol": {"start"},
    "p": {"align"},
    "td": _CELL,
    "th": _CELL | {"scope"},
    "details": {"open"},
} | {f"h{level}": {"align", "id"} for level in range(1, 7)}
_URL = re.compile(r"https?://[^\s<>\"'`]*[^\s<>\"'`.,:;!?)\]}*_]")
_ALIGN = re.compile(r"text-align:(left|right|center)")


@dataclass(frozen=True)
class Place:
    """Where a text stands, so that relative links lead somewhere; `origin` is the address of this Hub."""

    repo_id: RepoId
    revision: str
    folder: str = ""
    origin: str = ""

    def find(self, address: str, page: str) -> str | None:
        """The address on this Hub of a relative link (`page` is blob or resolve); None if it leaves the repo."""
        parts = urlsplit(address)
        path = unquote(parts.path)
        if path.startswith("/"):
            return quote("/" + path.lstrip("/"))
        inside = posixpath.normpath(posixpath.join(self.folder, path)) if path else ""
        if not inside or inside.startswith("..") or inside == ".":
            return None
        page = "tree" if path.endswith("/") and page == "blob" else page
        fragment = f"#{quote(parts.fragment)}" if parts.fragment else ""
        return repo_url(self.repo_id, page, self.revision, path=inside) + fragment


@lru_cache(maxsize=64)
def render_markdown(text: str, place: Place) -> Markup:
    """Sanitised HTML. Headings start at h2, for a page has its own h1; at most `MAX_CHARACTERS` are shown."""
    raw = _MARKDOWN.render(text[:MAX_CHARACTERS].replace("\0", ""))
    clean = _clean(raw, place)
    finisher = _Finisher()
    finisher.feed(clean)
    finisher.close()
    return Markup(_clean("".join(finisher.parts), None))


def _clean(html: str, place: Place | None) -> str:
    """The one sanitiser; `place` resolves addresses and names, None leaves those of an earlier pass."""
    return nh3.clean(
        html,
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        attribute_filter=(lambda tag, name, value: _filter(place, tag, name, value)) if place else None,
        link_rel="nofollow noopener noreferrer",
        url_schemes=_SCHEMES,
        allowed_classes={"div": {"scroll"}} if place is None else {},
        tag_attribute_values={"div": {"tabindex": {"0"}}} if place is None else {},
    )


def _filter(place: Place, tag: str, name: str, value: str) -> str | None:
    if name == "id":
        return f"card-{value}"  # never one of the page's own
    if name == "href" and value.startswith("#"):
        return f"#card-{value[1:]}"
    if name not in {"href", "src"}:
        return value
    value = value.strip()
    if place.origin and value.startswith(f"{place.origin}/"):
        value = value.removeprefix(place.origin)
    try:
        parts = urlsplit(value)
    except ValueError:
        return None
    if parts.scheme or parts.netloc:
        return value if parts.scheme in _SCHEMES else None
    found = place.find(value, "resolve" if tag == "img" else "blob")
    is_foreign = tag == "img" and found and "/resolve/" not in found and not found.startswith("/uploads/")
    return None if is_foreign else found


class _Finisher(HTMLParser):
    """Rewrites clean HTML: headings one level down, tables that scroll, images from elsewhere as links."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.parts: list[str] = []
        self._open_links = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open_links += tag == "a"
        text = self.get_starttag_text() or ""
        if tag == "img":
            text = self._show_image({name: value or "" for name, value in attrs}, text)
        elif tag == "table":
            text = f'<div class="scroll" tabindex="0">{text}'
        elif tag in _LOWER:
            text = f"<{_LOWER[tag]}{text[len(tag) + 1 :]}"
        self.parts.append(text)

    def handle_endtag(self, tag: str) -> None:
        self._open_links -= tag == "a"
        self.parts.append(f"</{_LOWER.get(tag, tag)}>" + ("</div>" if tag == "table" else ""))

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_entityref(self, name: str) -> None:
        self.parts.append(f"&{name};")

    def handle_charref(self, name: str) -> None:
        self.parts.append(f"&#{name};")

    def _show_image(self, attrs: dict[str, str], text: str) -> str:
        source = attrs.get("src", "")
        if source.startswith("/"):
            return text
        label = escape(attrs.get("alt") or source.rpartition("/")[2] or "image")
        if not source or self._open_links:
            return label
        return f'<a href="{escape(source)}" title="An image from another site, not loaded">{label}</a>'


_LOWER = {f"h{level}": f"h{level + 1}" for level in range(1, 6)}


def _name_headings(state: StateCore) -> None:
    """An id for each heading, by the Hub's rule, so that a card's table of contents works."""
    seen: dict[str, int] = {}
    for token, inner in zip(state.tokens, state.tokens[1:], strict=False):
        if token.type == "heading_open":
            name = re.sub(r"[^\w\- ]", "", inner.content.lower()).strip().replace(" ", "-")
            seen[name] = seen.get(name, -1) + 1
            token.attrSet("id", f"{name}-{seen[name]}" if seen[name] else name)


def _align_cells(state: StateCore) -> None:
    """A style attribute would be refused by the page's policy."""
    for token in state.tokens:
        style = token.attrs.pop("style", None) if token.type in {"td_open", "th_open"} else None
        match = _ALIGN.fullmatch(str(style))
        if match:
            token.attrSet("align", match.group(1))


def _link_bare_urls(state: StateCore) -> None:
    for block in state.tokens:
        shown: list[Token] = []
        depth = 0
        for token in block.children or []:
            depth += {"link_open": 1, "link_close": -1}.get(token.type, 0)
            shown += _split_urls(token.content) if token.type == "text" and not depth else [token]
        block.children = shown if block.children is not None else None


def _split_urls(text: str) -> list[Token]:
    tokens, end = [], 0
    for match in _URL.finditer(text):
        tokens += [_text(text[end : match.start()]), Token("link_open", "a", 1, attrs={"href": match.group()})]
        tokens += [_text(match.group()), Token("link_close", "a", -1)]
        end = match.end()
    return [*tokens, _text(text[end:])]


def _text(content: str) -> Token:
    return Token("text", "", 0, content=content)


def _build_parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": True}).enable("strikethrough")
    enable_tables(parser)
    for rule in (_name_headings, _align_cells, _link_bare_urls):
        parser.core.ruler.push(rule.__name__, rule)
    return parser


_MARKDOWN = _build_parser()
