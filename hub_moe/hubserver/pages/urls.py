"""The addresses of pages."""

from urllib.parse import quote, urlencode

from ..store import RepoId
from ..store.errors import InvalidInputError


def repo_url(repo_id: RepoId, *parts: str, path: str = "") -> str:
    """The address of a repo, or of one of its pages: each part is one segment, `path` may have several."""
    prefix = "" if repo_id.kind == "model" else f"/{repo_id.kind}s"
    segments = "".join(f"/{quote(part, safe='')}" for part in parts)
    return f"{prefix}/{repo_id}{segments}" + (f"/{quote(path)}" if path else "")


def list_url(kind: str, **query: str) -> str:
    """The address of a list of repos."""
    return f"/{kind}s" + with_query(query)


def with_query(query: dict[str, str]) -> str:
    """`?a=b`, without what is empty; nothing when all is."""
    text = urlencode({name: value for name, value in query.items() if value})
    return f"?{text}" if text else ""


def parse_repo_id(kind: str, text: str) -> RepoId | None:
    """`OWNER/NAME` as a card writes it, None if it is something else."""
    owner, _, name = text.partition("/")
    try:
        return RepoId(kind, owner, name)
    except InvalidInputError:
        return None


def is_local(address: str) -> bool:
    """Whether an address stays on this Hub; browsers read a backslash as a slash."""
    return address.startswith("/") and address[1:2] not in {"/", "\\"} and address.isascii() and address.isprintable()
