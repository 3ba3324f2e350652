"""Where a model on a Hub comes from and what was made of it, as far as its Hub tells and the caller may see.

Upwards by the cards' `base_model`, downwards by the cards that name it, inside by `patches/`, by the trailers of merges
on main and by the marks of open pull requests.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC
from itertools import islice
from typing import Any, Literal

from huggingface_hub import GitCommitInfo, HfApi, ModelInfo
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from ..cards.metadata import is_hub_id
from ..errors import ConfigError, HubError
from ..patches.metadata import METADATA_FILE
from .contributions import (
    OPEN,
    FoundPatch,
    Maintainers,
    ProposedPatch,
    list_patches,
    list_pull_requests,
    one_line,
    read_metadata,
    read_patch,
    read_proposed_patch,
)
from .pull_requests import describing

DEFAULT_DEPTH = 3
DEFAULT_LIMIT = 100
RELATIONS = ("finetune", "adapter", "merge", "quantized")
MERGE_METHODS = ("exact", "mean", "ties", "dare", "slerp", "side-by-side")

State = Literal["found", "gated", "missing", "repeated", "unread"]

_MAX_BASES = 12
_TRAILER = re.compile(r"(Merged-Patch|Pull-Request|Contributor|Base-Commit|Merge-Method): (\S.{0,300})")
_MERGED_PATCH = re.compile(r"([\w][\w.-]{0,95}) weights_sha256=([0-9a-f]{64})")
_FORMS = {
    "Pull-Request": re.compile(r"#([1-9]\d{0,8})"),
    "Contributor": re.compile(r"(\w[\w.-]{0,95})"),
    "Base-Commit": re.compile(r"([0-9a-f]{40})"),
    "Merge-Method": re.compile(f"({'|'.join(MERGE_METHODS)})"),
}


@dataclass(frozen=True)
class Relative:
    """A model above or below.

    Attributes:
        relation: What the lower of the two is to the upper, in the Hub's words.
        state: "repeated" where it stands elsewhere in the tree, or above itself; "unread" beyond depth or number.
        commit: Of its main now; None where it could not be read.
        used_commit: Of a base, the commit that the model below says it was made from.
        relatives: Its own bases, if it is above; the models made of it, if it is below.
    """

    name: str
    relation: str
    state: State = "found"
    commit: str | None = None
    used_commit: str | None = None
    is_expert_patch: bool = False
    relatives: tuple["Relative", ...] = ()


@dataclass(frozen=True)
class MergedPatch:
    """A patch that a merge took in, and whose it was, where the merge says so."""

    name: str
    weights_sha256: str
    pull_request: int | None = None
    contributor: str | None = None


@dataclass(frozen=True)
class Merge:
    """A commit on main that says in its trailers what it merged."""

    commit: str
    created: str
    authors: tuple[str, ...]
    patches: tuple[MergedPatch, ...]
    base_commit: str | None = None
    method: str | None = None


@dataclass(frozen=True)
class Lineage:
    """The tree around a model. `notes` say what was left out and why."""

    name: str
    commit: str
    bases: tuple[Relative, ...] = ()
    children: tuple[Relative, ...] = ()
    patches: tuple[FoundPatch, ...] = ()
    merges: tuple[Merge, ...] = ()
    proposed: tuple[ProposedPatch, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; of pull requests without what people said in them."""
        shown = asdict(self)
        for each in shown["proposed"]:
            del each["pull_request"]["comments"]
        return shown


def read_lineage(api: HfApi, repo: str, *, depth: int = DEFAULT_DEPTH, limit: int = DEFAULT_LIMIT) -> Lineage:
    """The lineage of OWNER/NAME.

    Args:
        depth: How many generations up and down.
        limit: How many models, patches, merges and pull requests, each.

    Raises:
        ConfigError: If `repo` is no id of a repo.
        HubError: If there is no such model, or it cannot be read.
    """
    return _Reader(api, fetch_info(api, repo), depth, limit).read()


def parse_merge(commit: GitCommitInfo) -> Merge | None:
    """What a commit says it merged, by the trailers at the end of its message; None if it says nothing of the kind."""
    found: dict[str, list[str]] = {}
    for line in reversed(f"{commit.title}\n{commit.message}".strip()[-20_000:].splitlines()):
        trailer = _TRAILER.fullmatch(line.strip())
        if trailer is None:
            break
        found.setdefault(trailer[1], []).insert(0, trailer[2].strip())
    merged = [match for text in found.get("Merged-Patch", []) if (match := _MERGED_PATCH.fullmatch(text))]
    if not merged:
        return None
    numbers = _values_for(len(merged), found, "Pull-Request")
    people = _values_for(len(merged), found, "Contributor")
    return Merge(
        commit=commit.commit_id,
        created=commit.created_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        authors=tuple(one_line(name) for name in commit.authors),
        patches=tuple(
            MergedPatch(match[1], match[2], int(number) if number else None, person)
            for match, number, person in zip(merged, numbers, people, strict=True)
        ),
        base_commit=_common_value(found, "Base-Commit"),
        method=_common_value(found, "Merge-Method"),
    )


def read_merges(api: HfApi, repo: str, maintainers: Maintainers) -> tuple[list[Merge], int]:
    """The merges on main by those who maintain the repo, newest first, and how many others say that they are merges.

    Raises:
        HubError: If the Hub refuses.
    """
    with describing(api, repo):
        commits = api.list_repo_commits(repo)
    merges = [merge for commit in commits if (merge := parse_merge(commit))]
    trusted = [merge for merge in merges if any(author in maintainers for author in merge.authors)]
    return trusted, len(merges) - len(trusted)


def list_children(api: HfApi, base: str, *, limit: int) -> Iterator[tuple[ModelInfo, str]]:
    """At most `limit` models whose card names the base, most downloaded first, each with its relation to it.

    Raises:
        HfHubHTTPError: If the Hub refuses; use it inside of `describing`.
    """
    found = api.list_models(filter=f"base_model:{base}", sort="downloads", expand=["sha", "tags"], limit=limit)
    for info in found:
        relations = {name.lower(): relation for name, relation in _read_relations(info).items()}
        yield info, relations.get(base.lower(), "finetune")


def _common_value(found: Mapping[str, Sequence[str]], name: str) -> str | None:
    """What all trailers of a name say, one for each patch; None where they differ, as the commits of some bases do."""
    values = set(_values_for(len(found.get(name, [])), found, name))
    return values.pop() if len(values) == 1 else None


def fetch_info(api: HfApi, repo: str) -> ModelInfo:
    """What the Hub says of a model, without its card, which may have keys that the client cannot read, such as `self`.

    Raises:
        ConfigError: If `repo` is no id of a repo.
        HubError: If there is no such model, or it cannot be read.
    """
    if not is_hub_id(repo):
        raise ConfigError(f"{repo!r} is no id of a model; expected OWNER/NAME.")
    with describing(api, repo):
        return api.model_info(repo, expand=["sha", "tags", "gated", "private"])


def is_expert_patch(info: ModelInfo) -> bool:
    """Whether a model says that it is an expert patch in a repo of its own."""
    return "expert-patch" in (info.tags or [])


def _values_for(count: int, found: Mapping[str, Sequence[str]], name: str) -> list[str | None]:
    """One value for each of `count` patches; none at all where they do not pair up, rather than wrong ones."""
    matches = [_FORMS[name].fullmatch(text) for text in found.get(name, [])]
    if len(matches) != count:
        return [None] * count
    return [match[1] if match else None for match in matches]


def _read_relations(info: ModelInfo) -> dict[str, str]:
    """By name of each base that the card names, the relation to it; the Hub writes both into tags."""
    found: dict[str, str] = {}
    for tag in info.tags or []:
        kind, _, rest = tag.partition(":")
        relation, colon, name = rest.partition(":")
        if kind == "base_model" and colon and relation in RELATIONS and is_hub_id(name):
            found.setdefault(name, relation)
    return dict(islice(found.items(), _MAX_BASES))


class _Reader:
    """Walks the tree with a count of what may still be shown."""

    def __init__(self, api: HfApi, info: ModelInfo, depth: int, limit: int) -> None:
        self._api, self._info, self._depth, self._limit = api, info, depth, limit
        self._left = limit
        self._seen = {info.id.lower()}
        self._notes: list[str] = []

    def read(self) -> Lineage:
        name, commit = self._info.id, str(self._info.sha)
        maintainers = Maintainers(self._api, name)
        return Lineage(
            name=name,
            commit=commit,
            bases=self._read_bases(self._info, self._depth),
            children=self._or_note(lambda: self._read_children(name, self._depth)),
            patches=self._or_note(lambda: tuple(self._read_patches(name, commit))),
            merges=self._or_note(lambda: tuple(self._read_merges(name, maintainers))),
            proposed=self._or_note(lambda: tuple(self._read_proposed(name, maintainers))),
            notes=tuple(dict.fromkeys(self._notes)),
        )

    def _or_note(self, read: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        try:
            return read()
        except HubError as error:
            self._notes.append(str(error))
            return ()

    def _read_bases(self, info: ModelInfo, depth: int) -> tuple[Relative, ...]:
        relations = _read_relations(info)
        used = self._read_used_commits(info) if relations else {}
        return tuple(
            self._read_base(Relative(name, relation, used_commit=used.get(name.lower())), depth)
            for name, relation in relations.items()
        )

    def _read_base(self, base: Relative, depth: int) -> Relative:
        state, info = self._look_up(base.name, depth)
        facts = {**base.__dict__, "state": state}
        if info is None:
            return Relative(**facts)
        return Relative(**{**facts, "commit": info.sha, "relatives": self._read_bases(info, depth - 1)})

    def _look_up(self, name: str, depth: int) -> tuple[State, ModelInfo | None]:
        if name.lower() in self._seen:
            return "repeated", None
        if not self._may_take(depth):
            return "unread", None
        self._seen.add(name.lower())
        try:
            info = fetch_info(self._api, name)
        except HubError as error:
            if isinstance(error.__cause__, RepositoryNotFoundError):
                return "gated" if isinstance(error.__cause__, GatedRepoError) else "missing", None
            self._notes.append(one_line(str(error)))
            return "unread", None
        self._seen.add(info.id.lower())  # another name where it was renamed
        return "found", info

    def _may_take(self, depth: int) -> bool:
        if depth < 1:
            self._notes.append(f"Cut at {self._depth} generations; --depth shows more.")
        elif self._left < 1:
            self._notes.append(f"Cut at {self._limit} models; --limit shows more.")
        else:
            self._left -= 1
            return True
        return False

    def _read_used_commits(self, info: ModelInfo) -> dict[str, str]:
        """By name of the base, the commit that a patch in a repo of its own was made for."""
        if not is_expert_patch(info):
            return {}
        try:
            base = read_metadata(self._api, info.id, METADATA_FILE, revision=str(info.sha)).base
        except OSError as error:  # HubError and CheckpointError
            self._notes.append(f"What {info.id} was made from is its card's word: {one_line(str(error))}")
            return {}
        return {base.repo.lower(): base.commit} if base.commit else {}

    def _read_children(self, name: str, depth: int) -> tuple[Relative, ...]:
        most = self._left + 1 if depth > 0 else 1
        with describing(self._api, name):
            found = self._take(list_children(self._api, name, limit=most), depth)
        return tuple(self._read_child(info, relation, depth) for info, relation in found)

    def _take(self, found: Iterable[tuple[ModelInfo, str]], depth: int) -> list[tuple[ModelInfo, str]]:
        taken = []
        for info, relation in found:
            if info.id.lower() not in self._seen and not self._may_take(depth):
                break
            taken.append((info, relation))
        return taken

    def _read_child(self, info: ModelInfo, relation: str, depth: int) -> Relative:
        is_patch = is_expert_patch(info)
        if info.id.lower() in self._seen:
            return Relative(info.id, relation, "repeated", info.sha, is_expert_patch=is_patch)
        self._seen.add(info.id.lower())
        children = self._read_children(info.id, depth - 1)
        return Relative(info.id, relation, "found", info.sha, is_expert_patch=is_patch, relatives=children)

    def _read_patches(self, name: str, commit: str) -> Iterator[FoundPatch]:
        names = list_patches(self._api, name, commit)
        for each in self._cut(names, "patches"):
            yield read_patch(self._api, name, each, revision=commit)

    def _read_merges(self, name: str, maintainers: Maintainers) -> Iterator[Merge]:
        trusted, num_others = read_merges(self._api, name, maintainers)
        if num_others:
            self._notes.append(
                f"{num_others} commits on main say that they are merges and are by nobody who maintains {name}; they "
                "were left out."
            )
        yield from self._cut(trusted, "merges")

    def _read_proposed(self, name: str, maintainers: Maintainers) -> Iterator[ProposedPatch]:
        for number in self._cut(list_pull_requests(self._api, name, OPEN), "pull requests"):
            try:
                found = read_proposed_patch(self._api, name, number, maintainers)
            except HubError as error:
                self._notes.append(str(error))
                continue
            if found is not None:
                yield found

    def _cut(self, found: Sequence[Any], what: str) -> Sequence[Any]:
        if len(found) > self._limit:
            self._notes.append(f"Cut at {self._limit} of {len(found)} {what}; --limit shows more.")
        return found[: self._limit]
