"""Large files over git-lfs' batch protocol. Uploads go to signed links, because the client sends them no token."""

import secrets
from collections.abc import Iterator
from functools import partial
from math import ceil
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .calls import MAX_JSON_BYTES, Call, refuse, route
from .downloads import answer_content
from .git_http import challenge, git_route
from .permits import repo_to_contribute, repo_to_read, sign_for
from .receiving import receive
from .signing import read_signed
from .store import Repo, RepoId, Store
from .store.errors import InvalidInputError, NotFoundError, StoreError, TooLargeError, UnauthenticatedError
from .store.names import check_sha256
from .store.parts import IncomingPart

MAX_FILE_BYTES = 1 << 40
_MAX_OBJECTS = 1000
_MAX_PARTS = 50_000
_MEDIA_TYPE = "application/vnd.git-lfs+json"


def batch(call: Call) -> Response:
    """`POST {id}.git/info/lfs/objects/batch`: where to send or fetch each object."""
    fields = call.json()
    objects, is_upload = fields.get("objects"), fields.get("operation") == "upload"
    if not isinstance(objects, list) or len(objects) > _MAX_OBJECTS:
        raise InvalidInputError(f"'objects' must be a list of at most {_MAX_OBJECTS} objects.")
    repo = call.repo_to_contribute() if is_upload else call.repo_to_read()
    transfers = fields.get("transfers") or ["basic"]
    if not isinstance(transfers, list):
        raise InvalidInputError("'transfers' must be a list of names.")
    wanted = [_read_object(one) for one in objects]
    most = max((size for _, size in wanted), default=0)
    is_multipart = is_upload and "multipart" in transfers and most > _part_bytes(call)  # git-lfs cannot
    if is_multipart and sum(size // _part_bytes(call) for _, size in wanted) > _MAX_PARTS:
        raise TooLargeError(f"One request may announce uploads in at most {_MAX_PARTS} parts; ask for fewer objects.")
    plan = (
        partial(_plan_upload, part_bytes=_part_bytes(call) if is_multipart else most) if is_upload else _plan_download
    )
    answer = {
        "transfer": "multipart" if is_multipart else "basic",
        "objects": [{"oid": oid, "size": size} | plan(call, repo, oid, size) for oid, size in wanted],
        "hash_algo": "sha256",
    }
    return JSONResponse(answer, media_type=_MEDIA_TYPE)


def answer_locks(call: Call) -> Response:
    """`{id}.git/info/lfs/locks[/verify]`: there are no file locks here; at a 501 git-lfs stops asking for them."""
    call.repo_to_read()
    return JSONResponse({"message": "This Hub has no file locks."}, 501, media_type=_MEDIA_TYPE)


def duplicate(call: Call) -> Response:
    """`POST /api/{kind}s/{id}/lfs-files/duplicate`: let another repo name large files of this one."""
    source, fields = call.repo_to_read(), call.json()
    target, files = fields.get("target"), fields.get("files")
    if not isinstance(target, dict) or not isinstance(files, list) or len(files) > _MAX_OBJECTS:
        raise InvalidInputError(f"Expected a 'target' and a list of at most {_MAX_OBJECTS} 'files'.")
    owner, _, name = call.text(target, "name").partition("/")
    target_id = RepoId(call.text(target, "type", "model"), owner, name)
    repo = call.store.repos.find_to_contribute(target_id, call.who)
    failed = []
    for file in files:
        sha256 = check_sha256(call.text(file if isinstance(file, dict) else {}, "sha256"))
        if call.store.commits.has_content(source, sha256):
            call.store.commits.register(repo.uid, sha256)
        else:
            failed.append({"sha256": sha256, "error": "This repo has no such file."})
    return JSONResponse({"success": not failed, "failed": failed})


def list_files(call: Call) -> Response:
    """`GET /api/{kind}s/{id}/lfs-files`: what the owners could delete to make room."""
    found = call.store.large_files.list_all(call.repo_to_write())
    return JSONResponse(
        [
            {
                "fileOid": file.sha256,
                "oid": file.sha256,
                "filename": file.path,
                "size": file.size_bytes,
                "pushedAt": file.pushed_at,
                "ref": file.ref or None,
            }
            for file in found
        ]
    )


def delete_files(call: Call) -> Response:
    """`POST /api/{kind}s/{id}/lfs-files/batch`: delete large files from a repo for good."""
    repo, deletions = call.repo_to_write(), call.json().get("deletions")
    if not isinstance(deletions, dict):
        raise InvalidInputError("'deletions' must be an object.")
    sha256s = deletions.get("sha")
    if not isinstance(sha256s, list) or len(sha256s) > _MAX_OBJECTS or not all(isinstance(one, str) for one in sha256s):
        raise InvalidInputError(f"'deletions.sha' must be a list of at most {_MAX_OBJECTS} sha256.")
    call.store.large_files.delete(repo, sha256s, rewrite_history=deletions.get("rewriteHistory") is not False)
    return JSONResponse({"success": True})


def verify(call: Call) -> Response:
    """`POST /lfs/verify/{link}`: whether an upload arrived."""
    fields = _read_upload_link(call.store, call.param("link"))
    if not _has_arrived(call.store, fields):
        raise NotFoundError("upload", f"The content {fields['oid']} has not been uploaded.")
    return Response(status_code=200)


def complete(call: Call) -> Response:
    """`POST /lfs/upload/{link}`: join the parts of a multipart upload."""
    fields = _read_upload_link(call.store, call.param("link"))
    if "parts" not in fields or "part" in fields:
        raise InvalidInputError("This link takes the bytes by PUT; nothing is to be completed.")
    parts = call.json().get("parts")
    if not isinstance(parts, list) or len(parts) != fields["parts"]:
        raise InvalidInputError(f"Expected a list of {fields['parts']} parts.")
    sha256, size = fields["oid"], fields["size"]
    if not _has_arrived(call.store, fields):  # what another repo has does not count: its sha256 may be known to all
        call.store.parts.complete(fields["upload"], parts=fields["parts"], sha256=sha256, size_bytes=size)
    _register(call.store, fields)
    return JSONResponse({"success": True})


def _read_upload_link(store: Store, link: str) -> dict[str, Any]:
    fields = read_signed(store.secret, "upload", link)
    repo_to_contribute(store, fields)
    return fields


def _register(store: Store, fields: dict[str, Any]) -> None:
    repo_to_contribute(store, fields)  # the bytes may have taken hours
    store.commits.register(fields["repo"], fields["oid"])


def _has_arrived(store: Store, fields: dict[str, Any]) -> bool:
    """Whether the repo that an upload link is for has the content."""
    is_here = store.contents.size_bytes(fields["oid"]) == fields["size"]
    return is_here and store.commits.has_uploaded(fields["repo"], fields["oid"])


async def upload(request: Request) -> Response:
    """`PUT /lfs/upload/{link}`: a whole content, or one part of it, straight to disk."""
    store: Store = request.app.state.store
    fields = await run_in_threadpool(_read_upload_link, store, request.path_params["link"])
    if "part" in fields:
        await receive(request, await run_in_threadpool(_part, store, fields))  # `complete` may hold its lock for long
    elif "parts" in fields:
        raise InvalidInputError("This upload goes in parts.")
    else:
        await receive(request, store.contents.receive(sha256=fields["oid"], size_bytes=fields["size"]))
        await run_in_threadpool(_register, store, fields)
    return Response(status_code=200, headers={"ETag": f'"{fields["oid"]}-{fields.get("part", 0)}"'})


def _part(store: Store, fields: dict[str, Any]) -> IncomingPart:
    name, number = fields["upload"], fields["part"]
    return store.parts.receive(name, number, offset=fields["offset"], size_bytes=fields["part_size"])


def download(call: Call) -> Response:
    """`GET /lfs/download/{link}`."""
    fields = read_signed(call.store.secret, "download", call.param("link"))
    oid, repo = fields["oid"], repo_to_read(call.store, fields)
    if not call.store.commits.has_content(repo, oid):
        raise NotFoundError("entry", "This repo has the file no more.")
    return answer_content(call.store.contents, oid, request=call.request, headers={"ETag": f'"{oid}"'})


def _read_object(one: object) -> tuple[str, int]:
    if not isinstance(one, dict) or not isinstance(one.get("oid"), str) or not isinstance(one.get("size"), int):
        raise InvalidInputError('An object is {"oid": sha256, "size": bytes}.')
    if not 0 <= one["size"] <= MAX_FILE_BYTES:
        raise TooLargeError(f"A file has at most {MAX_FILE_BYTES} bytes.")
    return check_sha256(one["oid"]), one["size"]


def _part_bytes(call: Call) -> int:
    part_bytes: int = call.request.app.state.part_bytes
    return part_bytes


def _plan_upload(call: Call, repo: Repo, oid: str, size: int, *, part_bytes: int) -> dict[str, Any]:
    """No actions for what this repo has already: the client then sends nothing."""
    if call.store.commits.has_content(repo, oid):
        return {}
    fields: dict[str, Any] = {"oid": oid, "size": size}
    if size <= part_bytes:
        link = sign_for(call, "upload", repo, fields)
        upload_action: dict[str, Any] = {"href": f"{call.base_url}/lfs/upload/{link}"}
    else:
        count = ceil(size / part_bytes)
        fields |= {"parts": count, "upload": secrets.token_hex(32)}
        link = sign_for(call, "upload", repo, fields)
        headers = {"chunk_size": str(part_bytes)}
        for number in range(1, count + 1):
            offset = (number - 1) * part_bytes
            part = {"part": number, "offset": offset, "part_size": min(part_bytes, size - offset)}
            headers[str(number)] = f"{call.base_url}/lfs/upload/{sign_for(call, 'upload', repo, fields | part)}"
        upload_action = {"href": f"{call.base_url}/lfs/upload/{link}", "header": headers}
    actions = {"upload": upload_action, "verify": {"href": f"{call.base_url}/lfs/verify/{link}"}}
    return {"authenticated": True, "actions": actions}


def _plan_download(call: Call, repo: Repo, oid: str, size: int) -> dict[str, Any]:
    if not call.store.commits.has_content(repo, oid):
        return {"error": {"code": 404, "message": "Object does not exist"}}
    link = sign_for(call, "download", repo, {"oid": oid})
    return {"authenticated": True, "actions": {"download": {"href": f"{call.base_url}/lfs/download/{link}"}}}


def _answer_error(request: Request, error: StoreError) -> Response:
    """git-lfs reads `message`, the client of the Hub `error` and its codes."""
    headers = challenge(error)
    if isinstance(error, UnauthenticatedError) and "authorization" not in request.headers:
        headers["X-Error-Code"] = "RepoNotFound"
    answer = refuse(error, headers)
    if request.headers.get("user-agent", "").startswith("git-lfs"):
        return JSONResponse({"message": str(error)}, answer.status_code, headers, media_type=_MEDIA_TYPE)
    return answer


def _repo_routes() -> Iterator[Route]:
    for repo in ("/{owner}/{name}.git", "/{kinds:kinds}/{owner}/{name}.git"):
        for path, handler, method in (
            ("objects/batch", batch, "POST"),
            ("locks", answer_locks, "GET"),
            ("locks", answer_locks, "POST"),
            ("locks/verify", answer_locks, "POST"),
        ):
            yield git_route(
                f"{repo}/info/lfs/{path}", handler, method, most_bytes=MAX_JSON_BYTES, answer_error=_answer_error
            )


ROUTES = [
    *_repo_routes(),
    route("/api/{kinds:kinds}/{owner}/{name}/lfs-files/duplicate", duplicate, "POST"),
    route("/api/{kinds:kinds}/{owner}/{name}/lfs-files", list_files),
    route("/api/{kinds:kinds}/{owner}/{name}/lfs-files/batch", delete_files, "POST"),
    Route("/lfs/upload/{link}", upload, methods=["PUT"]),
    route("/lfs/upload/{link}", complete, "POST"),
    route("/lfs/verify/{link}", verify, "POST"),
    route("/lfs/download/{link}", download),
]
