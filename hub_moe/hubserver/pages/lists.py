"""The start page, lists of repos with search and filters, and what one owner has."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from ..calls import Call, route
from ..cards import words_of
from ..profiles import Profile, read_mains
from ..sessions import identify_person
from .rendering import show_page
from .urls import list_url

_KINDS = ("model", "dataset", "space")
_NEWEST = 8
_PER_PAGE = 30
_MOST_VALUES = 8
_SORTS: dict[str, tuple[str, Callable[[Profile], Any], bool]] = {
    "": ("recently changed", lambda one: one.repo.modified_at, True),
    "created": ("newest", lambda one: one.repo.created_at, True),
    "likes": ("most likes", lambda one: one.repo.likes, True),
    "downloads": ("most downloads", lambda one: one.repo.downloads, True),
    "size": ("most parameters", lambda one: (one.safetensors or {}).get("total", 0), True),
    "name": ("name", lambda one: str(one.repo.id).lower(), False),
}
_FACETS: dict[str, tuple[str, Callable[[Profile], list[str]]]] = {
    "author": ("Owner", lambda one: [one.repo.id.owner]),
    "task": ("Task", lambda one: words_of(one.card.data, "pipeline_tag") + _tagged(one, "task_categories:")),
    "library": ("Library", lambda one: words_of(one.card.data, "library_name")),
    "license": ("Licence", lambda one: _tagged(one, "license:")),
    "base_model": ("Base model", lambda one: one.bases[1] if one.repo.id.kind == "model" else []),
    "dataset": ("Trained on", lambda one: _tagged(one, "dataset:")),
    "language": ("Language", lambda one: words_of(one.card.data, "language")),
    "tag": ("Tag", lambda one: words_of(one.card.data, "tags")),
}


@dataclass(frozen=True)
class Facet:
    """One way to filter: the value that is chosen, and values to choose with how many repos have each."""

    name: str
    title: str
    chosen: str
    values: list[tuple[str, int]]


def show_start(call: Call) -> Response:
    """`GET /`: what changed last, or with `?search=` what has such a name."""
    search = call.request.query_params.get("search", "")[:200]
    most = _PER_PAGE if search else _NEWEST
    groups = []
    for kind in _KINDS:
        repos = [repo for repo in call.store.repos.visible(kind, call.who) if search.lower() in str(repo.id).lower()]
        groups.append((kind, list(read_mains(call.store, repos[:most])), len(repos)))
    return show_page(call.request, "start.html", call.who, groups=groups, search=search, base_url=call.base_url)


def show_list(call: Call) -> Response:
    """`GET /models`, `/datasets`, `/spaces`."""
    kind, query = call.request.path_params["kinds"], call.request.query_params
    search = query.get("search", "")[:200]
    chosen = {name: query.get(name, "")[:200] for name in _FACETS}
    repos = [repo for repo in call.store.repos.visible(kind, call.who) if search.lower() in str(repo.id).lower()]
    found = list(read_mains(call.store, repos))
    for name, value in chosen.items():
        found = [one for one in found if not value or value in _values(name, one)]
    sort = query.get("sort", "") if query.get("sort", "") in _SORTS else ""
    _, key, is_reversed = _SORTS[sort]
    found.sort(key=key, reverse=is_reversed)
    page = max(1, call.number("p", 1, most=10**6))
    return show_page(
        call.request,
        "list.html",
        call.who,
        kind=kind,
        search=search,
        profiles=found[(page - 1) * _PER_PAGE : page * _PER_PAGE],
        count=len(found),
        facets=[_count(name, found, chosen[name]) for name in _FACETS],
        query={**chosen, "search": search, "sort": sort},
        sorts={name: title for name, (title, *_) in _SORTS.items()},
        page=page,
        pages=-(-len(found) // _PER_PAGE),
        here_without_page=list_url(kind, **chosen, search=search, sort=sort),
    )


def show_owner(call: Call) -> Response:
    """`GET /{owner}`: a person or organisation, and their repos."""
    owner = call.store.accounts.find(call.param("owner"))
    groups = []
    for kind in _KINDS:
        repos = [repo for repo in call.store.repos.visible(kind, call.who) if repo.id.owner == owner["name"]]
        groups.append((kind, list(read_mains(call.store, repos[:_PER_PAGE])), len(repos)))
    is_org = owner["kind"] == "org"
    others = call.store.accounts.members(owner["name"]) if is_org else call.store.accounts.orgs(owner["name"])
    names = [name for name, _ in others]
    return show_page(call.request, "owner.html", call.who, owner=owner, groups=groups, names=names, is_org=is_org)


def _count(name: str, profiles: list[Profile], chosen: str) -> Facet:
    counts = Counter(value for one in profiles for value in set(_values(name, one)))
    return Facet(name, _FACETS[name][0], chosen, counts.most_common(_MOST_VALUES))


def _values(name: str, profile: Profile) -> list[str]:
    return _FACETS[name][1](profile)


def _tagged(profile: Profile, prefix: str) -> list[str]:
    return [tag.removeprefix(prefix) for tag in profile.tags if tag.startswith(prefix)]


ROUTES = [
    route("/", show_start, identify=identify_person),
    route("/{kinds:kinds}", show_list, identify=identify_person),
    route("/{owner:owner}", show_owner, identify=identify_person),
]
