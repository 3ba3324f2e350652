"""What is on this Hub: the facts of one repo, lists, search."""

import math
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from starlette.responses import JSONResponse, Response

from .calls import Call, route
from .cards import MAX_CARD_BYTES, read_card
from .evaluations import read_scores
from .profiles import Profile, read_mains, read_profile
from .refs import format_date
from .store.errors import GatedError, InvalidInputError, NotFoundError
from .store.repos import Repo

_MAX_REPOS = 1000
_SORTS: dict[str, Callable[[Profile], Any]] = {
    "lastModified": lambda profile: profile.repo.modified_at,
    "createdAt": lambda profile: profile.repo.created_at,
    "downloads": lambda profile: profile.repo.downloads,
    "likes": lambda profile: profile.repo.likes,
    "trendingScore": lambda profile: profile.repo.likes,
}
_SORT_NAMES = {"modified": "lastModified", "last_modified": "lastModified", "created_at": "createdAt"}
_SORT_NAMES |= {"trending_score": "trendingScore", "trending": "trendingScore"}
_NOTHING_RUNS_HERE = ("inference", "inference_provider")
_COUNT = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([KMBT]?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SHORT = (
    *("author", "createdAt", "downloads", "gated", "lastModified", "library_name", "likes", "pipeline_tag"),
    *("private", "sdk", "tags", "trendingScore"),
)
_FULL = (*_SHORT, "sha", "cardData", "config", "disabled", "model-index", "safetensors", "siblings", "usedStorage")
_UNKNOWN_HERE = {"gguf", "inference", "inferenceProviderMapping", "mask_token", "resourceGroup", "transformersInfo"}
_UNKNOWN_HERE |= {"widgetData", "citation", "description", "mainSize", "paperswithcode_id", "datasets", "models"}
_UNKNOWN_HERE |= {"region", "runtime", "subdomain"}


def show_repo(call: Call) -> Response:
    """`GET /api/{kind}s/{id}[/revision/{rev}]`; of a gated repo everybody may know what is on `main`."""
    repo = call.repo() if _is_main(call) else call.repo_to_read()
    rev = call.param("rev") if "rev" in call.request.path_params else "main"
    with call.store.repos.open(repo) as git:
        profile = read_profile(call.store, repo, git, git.resolve(rev))
    wanted = call.words("expand")
    return JSONResponse(describe(call, profile, wanted or list(_FULL), with_blobs=call.flag("blobs")))


def list_repos(call: Call) -> Response:
    """`GET /api/{kind}s`, filtered, sorted, in pages."""
    kind = call.request.path_params["kinds"]
    repos = [repo for repo in call.store.repos.visible(kind, call.who) if _may_match(call, repo)]
    found = [profile for profile in read_mains(call.store, repos) if _matches(call, profile)]
    sort = call.request.query_params.get("sort", "lastModified")
    sort = _SORT_NAMES.get(sort, sort)
    if sort not in _SORTS:
        raise InvalidInputError(f"sort is one of {', '.join(sorted(_SORTS))}; got {sort[:40]!r}.")
    found.sort(key=_SORTS[sort], reverse=call.request.query_params.get("direction", "-1") == "-1")
    start = call.number("cursor", 0, most=10**9)
    size = max(1, call.number("limit", _MAX_REPOS, most=_MAX_REPOS))
    fields = call.words("expand") or list(_FULL if call.flag("full") else (*_SHORT, *_asked_for(call)))
    shown = []
    for profile in found[start : start + size]:
        with suppress(NotFoundError):  # deleted in the meantime
            shown.append(describe(call, profile, fields))
    headers = {}
    if len(found) > start + size:
        query = call.request.url.include_query_params(cursor=start + size).query
        headers["Link"] = f'<{call.base_url}/api/{kind}s?{query}>; rel="next"'
    return JSONResponse(shown, headers=headers)


def list_tags(call: Call) -> Response:
    """`GET /api/{kind}s-tags-by-type`: every tag in use, by the part before its colon."""
    kind = call.request.path_params["kinds"]
    repos = call.store.repos.visible(kind, call.who)
    tags = {tag for profile in read_mains(call.store, repos) for tag in profile.tags}
    groups: dict[str, list[dict[str, str]]] = {}
    for tag in sorted(tags):
        group = tag.partition(":")[0] if ":" in tag else "other"
        groups.setdefault(group, []).append({"id": tag, "label": tag.removeprefix(f"{group}:"), "type": group})
    return JSONResponse(groups)


def validate_card(call: Call) -> Response:
    """`POST /api/validate-yaml`: 400 when the YAML of a README has errors."""
    content = call.text(call.json(), "content")
    if len(content) > MAX_CARD_BYTES:
        raise InvalidInputError(f"A repo card has at most {MAX_CARD_BYTES} characters.")
    card = read_card(content)
    answer = {"errors": _messages(card.errors), "warnings": _messages(card.warnings)}
    return JSONResponse(answer, status_code=400 if card.errors else 200)


def describe(call: Call, profile: Profile, fields: list[str], *, with_blobs: bool = False) -> dict[str, Any]:
    """The named fields of a repo, and its ids; InvalidInputError for a field that the Hub does not have."""
    repo = profile.repo
    shown: dict[str, Any] = {"_id": repo.uid[:24], "id": str(repo.id)}
    if repo.id.kind == "model":
        shown["modelId"] = str(repo.id)
    for name in fields:
        if name in _FIELDS:
            shown[name] = _FIELDS[name](call, profile)
        elif name not in _UNKNOWN_HERE:
            raise InvalidInputError(f"{name[:40]!r} is not a field that can be expanded.")
    if with_blobs and "siblings" in shown:
        shown["siblings"] = [file.describe() for file in profile.files]
    return shown


def _is_main(call: Call) -> bool:
    """Whether the query is about the commit that `main` is at, by whatever name."""
    rev = call.param("rev") if "rev" in call.request.path_params else "main"
    if rev == "main":
        return True
    with call.store.repos.open(call.repo()) as git:
        return rev == git.resolve("main")


def _may_match(call: Call, repo: Repo) -> bool:
    """Whether a repo passes those filters of the query that are about its name and settings."""
    query = call.request.query_params
    author, gated = query.get("author"), query.get("gated")
    is_other = (author and repo.id.owner.lower() != author.lower()) or (
        gated is not None and (gated.lower() in {"true", "1"}) != bool(repo.gated)
    )
    name = str(repo.id).lower()
    if is_other or any(query.get(one) for one in _NOTHING_RUNS_HERE):
        return False
    return all(word in name for text in query.getlist("search") for word in text.lower().split())


def _matches(call: Call, profile: Profile) -> bool:
    """Whether a repo passes the filters that are about what is in it."""
    wanted = {*call.words("filter"), *call.words("pipeline_tag"), *call.words("apps")}
    wanted |= {f"{name[:-1]}:{value}" for name in ("datasets", "models") for value in call.words(name)}
    return wanted <= {*profile.tags} and _has_size(profile, call.request.query_params.get("num_parameters"))


def _has_size(profile: Profile, wanted: str | None) -> bool:
    """Whether the number of parameters is in a range like `min:6B,max:128B`."""
    if wanted is None:
        return True
    least, most = 0.0, math.inf
    for part in wanted.split(","):
        name, _, text = part.partition(":")
        match = _COUNT.fullmatch(text)
        if name not in {"min", "max"} or not match:
            raise InvalidInputError(f"num_parameters is like 'min:6B,max:128B'; got {wanted[:80]!r}.")
        count = float(match[1]) * _UNITS[match[2].upper()]
        least, most = (count, most) if name == "min" else (least, count)
    return profile.safetensors is not None and least <= profile.safetensors["total"] <= most


def _asked_for(call: Call) -> list[str]:
    return [name for name in ("cardData", "config") if call.flag(name)]


def _messages(texts: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"message": text} for text in texts]


def _scores(call: Call, profile: Profile) -> list[dict[str, Any]]:
    """What the result files say; nothing to who may not read the files of a gated repo."""
    try:
        repo = call.store.repos.find_to_read(profile.repo.id, call.who)
    except GatedError:
        return []
    return [score.describe() for score in read_scores(call.store, repo)]


def _bases(_: Call, profile: Profile) -> dict[str, Any] | None:
    relation, names = profile.bases
    return {"relation": relation, "models": [{"id": name} for name in names]} if names else None


def _count_children(call: Call, profile: Profile) -> int:
    state = call.request.state
    if not hasattr(state, "base_counts"):  # once for a whole list
        models = read_mains(call.store, call.store.repos.visible("model", call.who))
        state.base_counts = Counter(name for one in models for name in {*one.bases[1]})
    return int(state.base_counts[str(profile.repo.id)])


_FIELDS: dict[str, Callable[[Call, Profile], Any]] = {
    "author": lambda _, profile: profile.repo.id.owner,
    "baseModels": _bases,
    "cardData": lambda _, profile: profile.card.data or None,
    "childrenModelCount": _count_children,
    "config": lambda _, profile: profile.config or None,
    "createdAt": lambda _, profile: profile.repo.created_at,
    "disabled": lambda *_: False,
    "downloads": lambda _, profile: profile.repo.downloads,
    "downloadsAllTime": lambda _, profile: profile.repo.downloads,
    "evalResults": _scores,
    "gated": lambda _, profile: profile.repo.gated or False,
    "lastModified": lambda _, profile: format_date(profile.head),
    "library_name": lambda _, profile: profile.card.data.get("library_name"),
    "likes": lambda _, profile: profile.repo.likes,
    "model-index": lambda _, profile: profile.card.data.get("model-index"),
    "pipeline_tag": lambda _, profile: profile.card.data.get("pipeline_tag"),
    "private": lambda _, profile: profile.repo.private,
    "safetensors": lambda _, profile: profile.safetensors,
    "sdk": lambda _, profile: profile.repo.sdk or profile.card.data.get("sdk"),
    "sha": lambda _, profile: profile.head.oid,
    "siblings": lambda _, profile: [{"rfilename": file.path} for file in profile.files],
    "spaces": lambda *_: [],
    "tags": lambda _, profile: list(profile.tags),
    "trendingScore": lambda _, profile: profile.repo.likes,
    "usedStorage": lambda _, profile: sum(file.size_bytes for file in profile.files),
}

ROUTES = [
    route("/api/validate-yaml", validate_card, "POST"),
    route("/api/{kinds:kinds}", list_repos),
    route("/api/{kinds:kinds}-tags-by-type", list_tags),
    route("/api/{kinds:kinds}/{owner}/{name}", show_repo),
    route("/api/{kinds:kinds}/{owner}/{name}/revision/{rev}", show_repo),
]
