"""Change the files of a repo: which way each file is to be sent, then the commit itself."""

import base64
import binascii
from typing import Any

from starlette.responses import JSONResponse, Response

from .calls import Call, route
from .ndjson import read_header, read_operations
from .store import Repo
from .store.discussions import Discussion, check_comment, check_title
from .store.errors import InvalidInputError, NotFoundError, StaleParentError
from .store.git import GitRepo
from .store.ignores import Ignores
from .store.names import check_path

_MAX_FILES = 1000


def preupload(call: Call) -> Response:
    """`POST /api/{kind}s/{id}/preupload/{rev}`: inline or as a large file, and what is at each path now."""
    repo, fields = call.repo_to_contribute(), call.json()
    files = fields.get("files")
    if not isinstance(files, list) or len(files) > _MAX_FILES:
        raise InvalidInputError(f"'files' must be a list of at most {_MAX_FILES} files.")
    with call.store.repos.open(repo) as git:
        commit = git.resolve(call.param("rev"))
        ignores = _read_ignores(call, git, commit, fields)
        return JSONResponse({"files": [_plan(call, git, commit, ignores, file) for file in files]})


def commit(call: Call) -> Response:
    """`POST /api/{kind}s/{id}/commit/{rev}`, with an NDJSON body."""
    if call.flag("create_pr"):
        return _open_pull_request(call)
    revision = call.param("rev")
    pull_request = _find_pull_request(call, revision)
    repo = call.repo_to_contribute() if pull_request else call.repo_to_write()
    header = read_header(call.body)
    oid = call.store.commits.commit(
        repo,
        read_operations(call.body),
        revision=revision,
        who=call.identity,
        message=header.message,
        parent=header.parent,
    )
    if pull_request:
        data = {"subject": header.summary, "oid": oid}
        call.store.discussions.add_event(repo, pull_request, call.identity, "commit", data)
    return JSONResponse(_describe_commit(call, repo, oid))


def _open_pull_request(call: Call) -> Response:
    """The pull request's ref is there before anybody can see its number."""
    repo, revision = call.repo_to_contribute(), call.param("rev")
    header = read_header(call.body)
    title = check_title(header.summary[:200].ljust(3, "."))
    description = check_comment(header.description if header.description.strip() else header.summary)
    with call.store.repos.open(repo) as git:
        target = git.find_writable_ref(revision)
        head = git.resolve(target)
    if header.parent is not None and not head.startswith(header.parent):
        raise StaleParentError("The branch was updated since you opened this page. Please refresh and try again.")
    num = call.store.repos.next_number(repo)
    oid = call.store.commits.propose(
        repo,
        read_operations(call.body),
        ref=f"refs/pr/{num}",
        revision=target,
        who=call.identity,
        message=header.message,
    )
    discussion = call.store.discussions.create(
        repo, call.identity, num=num, title=title, description=description, target=target
    )
    data = {"subject": header.summary, "oid": oid}
    call.store.discussions.add_event(repo, discussion, call.identity, "commit", data)
    url = f"{call.repo_url(repo.id)}/discussions/{num}"
    return JSONResponse(_describe_commit(call, repo, oid) | {"pullRequestUrl": url})


def _find_pull_request(call: Call, revision: str) -> Discussion | None:
    """The pull request that a revision names, if the caller may commit to it."""
    number = revision.removeprefix("refs/pr/")
    if number == revision:
        return None
    repo = call.repo_to_contribute()
    if not number.isascii() or not number.isdigit() or len(number) > 9:
        raise NotFoundError("revision", f"Invalid rev id: {revision}")
    discussion = call.store.discussions.find(repo, int(number))
    call.store.discussions.require_commit(repo, discussion, call.identity)
    return discussion


def _describe_commit(call: Call, repo: Repo, oid: str) -> dict[str, Any]:
    url = f"{call.repo_url(repo.id)}/commit/{oid}"
    return {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}


def _read_ignores(call: Call, git: GitRepo, commit: str, fields: dict[str, Any]) -> Ignores:
    if fields.get("gitIgnore") is not None:
        return Ignores.from_client(call.text(fields, "gitIgnore"))
    entry = git.find_entry(commit, ".gitignore")
    return Ignores.from_repo(git.read_file(entry.oid)) if entry and not entry.is_folder else Ignores()


def _plan(call: Call, git: GitRepo, commit: str, ignores: Ignores, file: object) -> dict[str, Any]:
    if not isinstance(file, dict):
        raise InvalidInputError("Each of 'files' must be an object.")
    path, size_bytes = check_path(call.text(file, "path")), file.get("size", 0)
    if not isinstance(size_bytes, int):
        raise InvalidInputError("'size' must be a whole number.")
    try:
        sample = base64.b64decode(call.text(file, "sample", ""), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidInputError("'sample' is not valid base64.") from None
    is_large = call.store.files.wants_large(git, commit, path, size_bytes=size_bytes, sample=sample)
    return {
        "path": path,
        "uploadMode": "lfs" if is_large else "regular",
        "shouldIgnore": ignores.ignores(path),
        "oid": _current_oid(call, git, commit, path),
    }


def _current_oid(call: Call, git: GitRepo, commit: str, path: str) -> str | None:
    """What the client compares with, to skip a file that is there already: sha256 if large, else git's sha1."""
    entry = git.find_entry(commit, path)
    if entry is None or entry.is_folder:
        return None
    facts = call.store.files.facts(git, [entry.oid])[entry.oid]
    return facts.sha256 or facts.oid


_REPO = "/api/{kinds:kinds}/{owner}/{name}"
ROUTES = [
    route(f"{_REPO}/preupload/{{rev}}", preupload, "POST"),
    route(f"{_REPO}/commit/{{rev}}", commit, "POST"),
]
