"""The files of a repo at a revision: folders, and one file as text, table, picture or rendered markdown."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from starlette.responses import RedirectResponse, Response

from ..calls import Call
from ..cards import read_card
from ..profiles import read_weights_header
from ..store import GitRepo, Repo
from ..store.files import FileFacts
from ..store.git import LogEntry, TreeEntry
from ..store.last_commits import find_last_commits
from ..store.names import check_path
from .markdown import MAX_CHARACTERS, Place, render_markdown
from .preview import can_preview, read_preview
from .repo import repo_routes, show_repo_page
from .tensors import parse_header
from .urls import repo_url

_PER_PAGE = 100
_HISTORY = 1000
_MAX_TEXT_BYTES = 400_000
_MAX_LINES = 2000
_MAX_LINE = 5000
_TENSORS_PER_PAGE = 500
_MAX_REFS = 200
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".avif", ".svg")
_MAX_PICTURE_BYTES = 20_000_000
_MARKS = {".safetensors": "safetensors", ".parquet": "parquet", ".gguf": "gguf"}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


@dataclass(frozen=True)
class Entry:
    """A row of a folder's table."""

    name: str
    path: str
    is_folder: bool
    facts: FileFacts | None
    last: LogEntry | None

    @property
    def marks(self) -> list[str]:
        """What is special about the file."""
        return [] if self.facts is None else find_marks(self.path, self.facts)


def find_marks(path: str, facts: FileFacts) -> list[str]:
    """`LFS` for a large file, and the formats that matter: a pickle runs code when it is loaded."""
    lower = path.lower()
    marks = [word for suffix, word in _MARKS.items() if lower.endswith(suffix)]
    marks += ["pickle"] if lower.endswith(_PICKLES) else []
    return [*marks, "LFS"] if facts.sha256 else marks


def show_tree(call: Call) -> Response:
    """`GET /{id}/tree/{rev}[/{path}]`."""
    repo, revision = call.repo_to_read(), call.param("rev")
    folder = call.param("path").strip("/") if "path" in call.request.path_params else ""
    page = max(1, call.number("p", 1, most=10**6))
    with call.store.repos.open(repo) as git:
        commit = git.resolve(revision)
        if folder and (found := git.find_entry(commit, check_path(folder))) and not found.is_folder:
            return RedirectResponse(repo_url(repo.id, "blob", revision, path=folder), status_code=303)
        listed = call.store.files.list_entries(git, commit, folder=folder, recursive=False)
        listed = sorted(listed, key=lambda entry: (not entry.is_folder, entry.path))
        entries = _describe(call, git, commit, listed[(page - 1) * _PER_PAGE : page * _PER_PAGE])
        head, refs = next(iter(git.log(commit))), read_refs(git)
    return show_repo_page(
        call,
        repo,
        "tree.html",
        tab="files",
        revision=revision,
        path=folder,
        entries=entries,
        count=len(listed),
        page=page,
        pages=-(-len(listed) // _PER_PAGE),
        head=head,
        refs=refs,
        view="tree",
    )


def show_file(call: Call) -> Response:
    """`GET /{id}/blob/{rev}/{path}`."""
    repo, revision, path = call.repo_to_read(), call.param("rev"), call.param("path")
    with call.store.repos.open(repo) as git:
        commit = git.resolve(revision)
        found = git.find_entry(commit, check_path(path))
        if found and found.is_folder:
            return RedirectResponse(repo_url(repo.id, "tree", revision, path=path), status_code=303)
        facts = call.store.files.find(git, commit, path)
        shown = _read(call, git, repo, facts)
        last = find_last_commits(git, commit, [path], limit=_HISTORY).get(path)
        refs = read_refs(git)
    return show_repo_page(
        call,
        repo,
        "blob.html",
        tab="files",
        revision=revision,
        path=path,
        facts=facts,
        file_marks=find_marks(path, facts),
        last=last,
        refs=refs,
        shown=shown,
        view="blob",
    )


def read_refs(git: GitRepo) -> dict[str, list[str]]:
    """What one can switch to: branches, tags, pull requests (the newest first)."""
    numbers = sorted((int(name) for name in git.list_refs("refs/pr/")), reverse=True)
    return {
        "Branches": list(git.list_refs("refs/heads/"))[:_MAX_REFS],
        "Tags": list(git.list_refs("refs/tags/"))[:_MAX_REFS],
        "Pull requests": [f"refs/pr/{number}" for number in numbers[:_MAX_REFS]],
    }


def _describe(call: Call, git: GitRepo, commit: str, entries: list[TreeEntry]) -> list[Entry]:
    facts = call.store.files.facts(git, [entry.oid for entry in entries if not entry.is_folder])
    last = find_last_commits(git, commit, [entry.path for entry in entries], limit=_HISTORY)
    return [
        Entry(entry.path.rpartition("/")[2], entry.path, entry.is_folder, facts.get(entry.oid), last.get(entry.path))
        for entry in entries
    ]


def _read(call: Call, git: GitRepo, repo: Repo, facts: FileFacts) -> dict[str, Any]:
    """What the page shows of a file: `kind` names the block of the template, the rest is for that block."""
    path, query = call.param("path"), call.request.query_params
    lower = path.lower()
    if lower.endswith(".safetensors"):
        return _read_tensors(call, git, facts)
    if lower.endswith(_PICTURES) and facts.size_bytes <= _MAX_PICTURE_BYTES and "plain" not in query:
        return {"kind": "picture", "has_source": lower.endswith(".svg")}
    content = call.store.files.read(git, facts, limit_bytes=_MAX_TEXT_BYTES)
    is_whole = len(content) == facts.size_bytes
    if _is_binary(content):
        return {"kind": "binary"}
    if lower.endswith(".md") and "plain" not in query:
        card = read_card(content.decode("utf-8", "replace"))
        place = Place(repo.id, call.param("rev"), path.rpartition("/")[0], call.base_url)
        is_whole = is_whole and len(card.text) <= MAX_CHARACTERS
        return {"kind": "markdown", "html": render_markdown(card.text, place), "is_whole": is_whole, "data": card.data}
    if can_preview(path) and "plain" not in query:
        preview = read_preview(path, content, is_whole=is_whole)
        if preview and len(preview.columns) > 1:
            return {"kind": "rows", "preview": preview}
    lines = content.decode("utf-8", "replace").split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    shown = [line.rstrip("\r") if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]}…" for line in lines[:_MAX_LINES]]
    return {"kind": "text", "lines": shown, "is_whole": is_whole and len(lines) <= _MAX_LINES}


def _read_tensors(call: Call, git: GitRepo, facts: FileFacts) -> dict[str, Any]:
    parsed = parse_header(read_weights_header(call.store, git, facts) or b"")
    if parsed is None:
        return {"kind": "binary", "fault": "This is not a whole safetensors file: its header cannot be read."}
    tensors, notes = parsed
    search = call.request.query_params.get("q", "")[:200]
    found = [tensor for tensor in tensors if search.lower() in tensor.name.lower()]
    page = max(1, call.number("p", 1, most=10**6))
    return {
        "kind": "tensors",
        "q": search,
        "tensors": found[(page - 1) * _TENSORS_PER_PAGE : page * _TENSORS_PER_PAGE],
        "count": len(found),
        "total": sum(tensor.count for tensor in found),
        "dtypes": _sum_dtypes((tensor.dtype, tensor.count) for tensor in found),
        "notes": notes,
        "page": page,
        "pages": -(-len(found) // _TENSORS_PER_PAGE),
    }


def _sum_dtypes(counts: Iterator[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for dtype, count in counts:
        sums[dtype] = sums.get(dtype, 0) + count
    return sums


def _is_binary(content: bytes) -> bool:
    """Whether the first bytes are not UTF-8; a letter cut in two at the end does not count."""
    sample = content[:8000]
    return b"\0" in sample or len(sample.decode("utf-8", "ignore").encode()) < len(sample) - 3


ROUTES = [
    *repo_routes("/tree/{rev}", show_tree),
    *repo_routes("/tree/{rev}/{path:path}", show_tree),
    *repo_routes("/blob/{rev}/{path:path}", show_file),
]
