"""Where a model comes from and what was made of it, as the cards say."""

from dataclasses import dataclass

from ..cards import words_of
from ..profiles import Profile, read_main, read_mains
from ..store import Identity, Repo, Store
from ..store.errors import NotFoundError
from .urls import parse_repo_id

_MAX_DEPTH = 4
_MAX_SHOWN = 12
_RELATIONS = ("finetune", "adapter", "merge", "quantized")


@dataclass(frozen=True)
class Ancestor:
    """A base of a model: its name, the relation to it, its repo if it is here, and its own bases."""

    name: str
    relation: str
    repo: Repo | None
    bases: tuple["Ancestor", ...]


@dataclass(frozen=True)
class Children:
    """The models of one relation that name a model as their base: the first few, and how many."""

    relation: str
    profiles: tuple[Profile, ...]
    count: int


@dataclass(frozen=True)
class Lineage:
    """A model between its bases and its children; for a dataset the models trained on it."""

    bases: tuple[Ancestor, ...]
    children: tuple[Children, ...]
    datasets: tuple[tuple[str, Repo | None], ...]

    def __bool__(self) -> bool:
        return bool(self.bases or self.children or self.datasets)


def read_lineage(store: Store, profile: Profile, who: Identity | None) -> Lineage:
    """The lineage of a model or dataset, as far as `who` may see it."""
    name = str(profile.repo.id)
    models = list(read_mains(store, store.repos.visible("model", who)))
    if profile.repo.id.kind == "dataset":
        users = [one for one in models if _holds(words_of(one.card.data, "datasets"), name)]
        return Lineage((), _group({"trained on it": users}), ())
    relations: dict[str, list[Profile]] = {}
    for one in models:
        relation, bases = one.bases
        if relation and _holds(bases, name):
            relations.setdefault(relation, []).append(one)
    datasets = tuple((word, _find(store, "dataset", word, who)) for word in words_of(profile.card.data, "datasets"))
    return Lineage(_read_bases(store, profile, who, (name.lower(),)), _group(relations), datasets)


def _read_bases(store: Store, profile: Profile, who: Identity | None, seen: tuple[str, ...]) -> tuple[Ancestor, ...]:
    relation, names = profile.bases
    found = []
    for name in names[:_MAX_SHOWN]:
        repo = _find(store, "model", name, who)
        is_new = name.lower() not in seen and len(seen) < _MAX_DEPTH
        base = read_main(store, repo) if repo and is_new else None
        bases = _read_bases(store, base, who, (*seen, name.lower())) if base else ()
        found.append(Ancestor(name, relation or "", repo, bases))
    return tuple(found)


def _find(store: Store, kind: str, name: str, who: Identity | None) -> Repo | None:
    repo_id = parse_repo_id(kind, name)
    try:
        return store.repos.find(repo_id, who) if repo_id else None
    except NotFoundError:
        return None


def _group(relations: dict[str, list[Profile]]) -> tuple[Children, ...]:
    return tuple(
        Children(relation, tuple(profiles[:_MAX_SHOWN]), len(profiles))
        for relation, profiles in sorted(relations.items(), key=_order)
        if profiles
    )


def _order(group: tuple[str, list[Profile]]) -> tuple[int, str]:
    """Fine-tunes before what else was made of a model."""
    relation, _ = group
    return _RELATIONS.index(relation) if relation in _RELATIONS else len(_RELATIONS), relation


def _holds(names: list[str], name: str) -> bool:
    return name.lower() in {one.lower() for one in names}
