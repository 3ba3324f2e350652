"""Templates and the headers of every page: no script runs, nothing is loaded from elsewhere."""

import hashlib
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import Response

from ..sessions import form_token
from ..store import Identity
from . import urls

_STATIC = Path(__file__).parent / "static"
_TYPES = {"style.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml"}
STATIC_FILES = {name: (_STATIC / name).read_bytes() for name in _TYPES}
_VERSION = hashlib.sha256(b"".join(STATIC_FILES.values())).hexdigest()[:12]
_POLICY = "; ".join(
    ("default-src 'none'", "style-src 'self'", "img-src 'self'", "form-action 'self'")
    + ("base-uri 'none'", "frame-ancestors 'none'")
)
# Without a referrer of the same origin, browsers send `Origin: null` with our own forms.
PAGE_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Vary": "Cookie, Accept",
}
_PREFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def show_page(
    request: Request, template: str, who: Identity | None, *, status_code: int = 200, **values: Any
) -> Response:
    """A page from a template, for who is logged in."""
    here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    here = here if request.method in {"GET", "HEAD"} else "/"
    shared = {"who": who, "form_token": form_token(request), "here": here, "version": _VERSION, "search": ""}
    text = _ENVIRONMENT.get_template(template).render(shared | values)
    return Response(
        text.encode("utf-8", "replace"),
        status_code=status_code,
        headers={**PAGE_HEADERS, "Cache-Control": "no-store" if who else "private, no-cache"},
        media_type="text/html; charset=utf-8",
    )


def answer_static(name: str) -> Response:
    """A file that belongs to the pages; its address changes with its content."""
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "public, max-age=31536000, immutable"}
    return Response(STATIC_FILES[name], headers=headers, media_type=_TYPES[name])


def format_size(size_bytes: int) -> str:
    """`1.3 MB`, in powers of 1000 like the Hub."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.95:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_count(count: int) -> str:
    """`1.3B` for a number of parameters, in full below a thousand."""
    for size, letter in _PREFIXES:
        if count >= size:
            return f"{count / size:.3g}{letter}" if count < 1000 * size else f"{count / size:.0f}{letter}"
    return str(count)


def format_day(moment: str | int) -> str:
    """`22 Sep 2026`, from the Hub's spelling of a date or seconds since 1970."""
    return f"{_parse(moment):%d %b %Y}".lstrip("0")


def format_moment(moment: str | int) -> str:
    """`22 Sep 2026, 17:25 UTC`."""
    return f"{format_day(moment)}, {_parse(moment):%H:%M} UTC"


def format_iso(moment: str | int) -> str:
    """For `<time datetime>`."""
    return f"{_parse(moment):%Y-%m-%dT%H:%M:%SZ}"


def format_plural(count: int, word: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {re.sub('y$', 'ie', word)}s"


def _parse(moment: str | int) -> datetime:
    if isinstance(moment, str):
        return datetime.fromisoformat(moment)
    try:
        return datetime.fromtimestamp(moment, UTC)
    except (OverflowError, OSError, ValueError):  # a commit from elsewhere may carry any number
        return datetime.fromtimestamp(0, UTC)


_ENVIRONMENT = Environment(
    loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.filters |= {
    "size": format_size,
    "count": format_count,
    "day": format_day,
    "moment": format_moment,
    "iso": format_iso,
    "plural": format_plural,
}
_ENVIRONMENT.globals |= {"url": urls.repo_url, "list_url": urls.list_url, "with_query": urls.with_query}
