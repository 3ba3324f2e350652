"""Read the files of a repo: download, tree, paths-info."""

from typing import Any
from urllib.parse import parse_qs, quote

from starlette.responses import JSONResponse, Response

from .calls import Call, refuse, route
from .downloads import answer_bytes, answer_content, name_picture
from .refs import format_date
from .sessions import identify_person
from .store.errors import InvalidInputError, NotFoundError
from .store.files import FileFacts
from .store.git import GitRepo, TreeEntry
from .store.last_commits import find_last_commits
from .store.names import check_path

_ENTRIES_PER_PAGE = 1000
_EXPANDED_PER_PAGE = 50
_MAX_PATHS = 10_000


def resolve(call: Call) -> Response:
    """`GET|HEAD /{id}/resolve/{rev}/{path}`: always 200 or 206 from here, never a redirect."""
    repo, path = call.repo_to_read(), call.param("path")
    with call.store.repos.open(repo) as git:
        commit = git.resolve(call.param("rev"))
        try:
            facts = call.store.files.find(git, commit, path)
            if facts.sha256 and not call.store.commits.has_content(repo, facts.sha256):
                raise NotFoundError("entry", "The content of this file was deleted.")
        except NotFoundError as error:
            return refuse(error, {"X-Repo-Commit": commit})  # lets the client remember that there is no such file
        content = b"" if facts.sha256 else git.read_file(facts.oid)
    if call.request.method == "GET" and "x-hf-download-counter" in call.request.headers:
        call.store.downloads.count(repo.uid, call.client_name)
    headers = {
        "X-Repo-Commit": commit,
        "ETag": f'"{facts.sha256 or facts.oid}"',
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(path.rsplit('/', 1)[-1])}",
        "Cache-Control": "private, no-cache",
    } | name_picture(path)
    if facts.sha256 is None:
        return answer_bytes(content, range_header=call.request.headers.get("range"), headers=headers)
    headers |= {"X-Linked-Size": str(facts.size_bytes), "X-Linked-Etag": f'"{facts.sha256}"'}
    xet_name = call.store.contents.recipes.names([facts.sha256]).get(facts.sha256)
    if xet_name:
        route = f"{call.base_url}/api/{repo.id.kind}s/{repo.id}/xet-read-token/{commit}"
        headers |= {"X-Xet-Hash": xet_name, "X-Xet-Refresh-Route": route}
    return answer_content(call.store.contents, facts.sha256, request=call.request, headers=headers)


def list_tree(call: Call) -> Response:
    """`GET /api/{kind}s/{id}/tree/{rev}[/{path}]`; later pages stay on the commit of the first."""
    is_expanded = call.flag("expand")
    most = _EXPANDED_PER_PAGE if is_expanded else _ENTRIES_PER_PAGE
    size, start = max(1, call.number("limit", most, most=most)), call.number("cursor", 0, most=10**9)
    folder = call.param("path").strip("/") if "path" in call.request.path_params else ""
    with call.store.repos.open(call.repo_to_read()) as git:
        commit = git.resolve(call.param("rev"))
        entries = call.store.files.list_entries(git, commit, folder=folder, recursive=call.flag("recursive"))
        shown = describe_entries(call, git, commit, entries[start : start + size], is_expanded=is_expanded)
    headers = {}
    if len(entries) > start + size:
        path = f"/api/{call.repo_id.kind}s/{call.repo_id}/tree/{commit}/{quote(folder, safe='')}".rstrip("/")
        query = call.request.url.include_query_params(cursor=start + size).query
        headers["Link"] = f'<{call.base_url}{path}?{query}>; rel="next"'
    return JSONResponse(shown, headers=headers)


def list_paths(call: Call) -> Response:
    """`POST /api/{kind}s/{id}/paths-info/{rev}`, form-encoded or JSON; unknown paths are left out."""
    paths, is_expanded = _read_paths(call)
    with call.store.repos.open(call.repo_to_read()) as git:
        commit = git.resolve(call.param("rev"))
        found = [git.find_entry(commit, check_path(path.strip("/"))) for path in paths if path.strip("/")]
        entries = [entry for entry in found if entry is not None]
        return JSONResponse(describe_entries(call, git, commit, entries, is_expanded=is_expanded))


def describe_entries(
    call: Call, git: GitRepo, commit: str, entries: list[TreeEntry], *, is_expanded: bool = False
) -> list[dict[str, Any]]:
    """Files and folders as the Hub's API shows them; `is_expanded` adds the last commit of each."""
    facts = call.store.files.facts(git, [entry.oid for entry in entries if not entry.is_folder])
    xet_names = call.store.contents.recipes.names(one.sha256 for one in facts.values() if one.sha256)
    last = find_last_commits(git, commit, [entry.path for entry in entries]) if is_expanded else {}
    shown = []
    for entry in entries:
        row: dict[str, Any] = {"type": "directory", "oid": entry.oid, "size": 0, "path": entry.path}
        if not entry.is_folder:
            row |= {"type": "file"} | _describe_file(facts[entry.oid], xet_names)
        if entry.path in last:
            commit_of = last[entry.path]
            title = commit_of.message.partition("\n")[0]
            row["lastCommit"] = {"id": commit_of.oid, "title": title, "date": format_date(commit_of)}
        shown.append(row)
    return shown


def _describe_file(facts: FileFacts, xet_names: dict[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {"size": facts.size_bytes}
    if facts.sha256:
        row["lfs"] = {"oid": facts.sha256, "size": facts.size_bytes, "pointerSize": facts.pointer_size_bytes}
        if facts.sha256 in xet_names:
            row["xetHash"] = xet_names[facts.sha256]
    return row


def _read_paths(call: Call) -> tuple[list[str], bool]:
    if "json" in call.request.headers.get("content-type", ""):
        fields = call.json()
        paths, is_expanded = fields.get("paths"), fields.get("expand") is True
    else:
        try:
            form = parse_qs(call.body.read().decode(), errors="strict", max_num_fields=_MAX_PATHS + 10)
        except (UnicodeDecodeError, ValueError):
            raise InvalidInputError("The body is not a valid form.") from None
        paths, is_expanded = form.get("paths", []), form.get("expand", [""])[0].lower() in {"true", "1"}
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths) or len(paths) > _MAX_PATHS:
        raise InvalidInputError(f"'paths' must be a list of at most {_MAX_PATHS} paths.")
    return paths, is_expanded


_REPO = "/api/{kinds:kinds}/{owner}/{name}"
_FILE = "{owner}/{name}/resolve/{rev}/{path:path}"
ROUTES = [
    route(f"/{{kinds:kinds}}/{_FILE}", resolve, "GET", "HEAD", identify=identify_person),
    route(f"/{_FILE}", resolve, "GET", "HEAD", identify=identify_person),
    route(f"{_REPO}/tree/{{rev}}", list_tree),
    route(f"{_REPO}/tree/{{rev}}/{{path:path}}", list_tree),
    route(f"{_REPO}/paths-info/{{rev}}", list_paths, "POST"),
]
