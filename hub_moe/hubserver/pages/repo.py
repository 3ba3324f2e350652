"""The page of a model, dataset or space: its card, facts, lineage, first rows; and what all pages of a repo share."""

from typing import Any

from starlette.responses import RedirectResponse, Response

from ..calls import Call, Handler, route
from ..evaluations import read_scores
from ..profiles import Profile, read_profile
from ..sessions import identify_person, read_own_form
from ..store import GitRepo, Repo
from ..store.discussions import OPEN
from ..store.errors import GatedError
from .contribution import read_repo_patches
from .facts import write_snippets
from .lineage import read_lineage
from .markdown import MAX_CHARACTERS, Place, render_markdown
from .preview import MAX_PREVIEW_BYTES, can_preview, read_preview
from .rendering import show_page
from .urls import repo_url

_MAX_DATA_FILES = 200
_MAX_SCORES = 50
_MAX_TAGS = 60
_SHOWN_ELSEWHERE = ("base_model:", "license:", "dataset:", "region:")


def show_repo(call: Call) -> Response:
    """`GET /{id}`: a gated repo's card is for all to read, its files are not."""
    repo = call.repo()
    may_read = _may_read(call)
    with call.store.repos.open(repo) as git:
        profile = read_profile(call.store, repo, git, git.resolve("main"))
        data = _read_rows(call, git, profile) if repo.id.kind == "dataset" and may_read else {}
    return show_repo_page(
        call,
        repo,
        "repo.html",
        tab="card",
        profile=profile,
        card=_render_card(call, profile),
        tags=[tag for tag in profile.tags if not tag.startswith(_SHOWN_ELSEWHERE)][:_MAX_TAGS],
        is_card_cut=len(profile.card.text) > MAX_CHARACTERS,
        lineage=read_lineage(call.store, profile, call.who),
        patches=read_repo_patches(call.store, repo, profile) if repo.id.kind == "model" and may_read else None,
        snippets=write_snippets(profile, call.base_url),
        size_bytes=sum(file.size_bytes for file in profile.files),
        may_read=may_read,
        scores=read_scores(call.store, repo)[:_MAX_SCORES] if repo.id.kind == "model" and may_read else [],
        access=call.store.repos.access_status(repo, call.who.user) if call.who and repo.gated else None,
        data=data,
    )


def ask_access(call: Call) -> Response:
    """`POST /{id}/ask-access`."""
    read_own_form(call)
    repo = call.repo()
    call.store.repos.ask_access(repo, call.identity)
    return RedirectResponse(repo_url(repo.id), status_code=303)


def like(call: Call) -> Response:
    """`POST /{id}/like`: like a repo, or with `undo` take it back."""
    fields = read_own_form(call)
    repo = call.repo()
    change = call.store.likes.unlike if fields.get("undo") else call.store.likes.like
    change(repo, call.identity)
    return RedirectResponse(repo_url(repo.id), status_code=303)


def show_repo_page(call: Call, repo: Repo, template: str, *, tab: str, **values: Any) -> Response:
    """A page of a repo: with its name, marks and tabs above."""
    open_count = len(call.store.discussions.list_all(repo, statuses=OPEN))
    may_write = call.who is not None and call.store.repos.may_write(repo, call.who)
    has_liked = call.who is not None and repo.uid in call.store.likes.liked_by(call.who.user)
    shared: dict[str, Any] = {"repo": repo, "tab": tab, "open_count": open_count, "base_url": call.base_url}
    shared |= {"may_write": may_write, "has_liked": has_liked}
    return show_page(call.request, template, call.who, **(shared | values))


def repo_routes(path: str, handler: Handler, *methods: str) -> list[Any]:
    """The routes of a page of repos: `/OWNER/NAME…` for models, `/datasets/OWNER/NAME…`, `/spaces/OWNER/NAME…`."""
    patterns = (f"/{{kinds:kinds}}/{{owner}}/{{name}}{path}", f"/{{owner:owner}}/{{name}}{path}")
    return [route(pattern, handler, *methods, identify=identify_person) for pattern in patterns]


def _render_card(call: Call, profile: Profile) -> str:
    text = profile.card.text
    return render_markdown(text, Place(profile.repo.id, "main", origin=call.base_url)) if text.strip() else ""


def _may_read(call: Call) -> bool:
    try:
        call.repo_to_read()
    except GatedError:
        return False
    return True


def _read_rows(call: Call, git: GitRepo, profile: Profile) -> dict[str, Any]:
    """The first rows of one data file, the one that the query names if there is such a file, else a training file."""
    files = [file for file in profile.files if can_preview(file.path)][:_MAX_DATA_FILES]
    if not files:
        return {}
    wanted = call.request.query_params.get("file")
    file = next((one for one in files if one.path == wanted), None)
    file = file or next((one for one in files if "train" in one.path.lower()), files[0])
    content = call.store.files.read(git, file.facts, limit_bytes=MAX_PREVIEW_BYTES)
    return {
        "files": files,
        "path": file.path,
        "preview": read_preview(file.path, content, is_whole=len(content) == file.size_bytes),
    }


ROUTES = [
    *repo_routes("", show_repo),
    *repo_routes("/ask-access", ask_access, "POST"),
    *repo_routes("/like", like, "POST"),
]
