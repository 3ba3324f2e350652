"""Everything that lists and pages show of a repo at one commit, computed once for each commit."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from .cards import MAX_CARD_BYTES, Card, count_parameters, find_bases, find_tags, parse_object, read_card
from .store import GitRepo, Repo, Store
from .store.files import FileFacts
from .store.git import LogEntry

_MAX_CACHED = 5000
_MAX_HEADER_BYTES = 25_000_000
_SHOWN_CONFIG = ("architectures", "model_type", "auto_map", "quantization_config")


@dataclass(frozen=True)
class RepoFile:
    """A file of a commit with its facts."""

    path: str
    facts: FileFacts

    @property
    def size_bytes(self) -> int:
        """The real size, not the pointer's."""
        return self.facts.size_bytes

    def describe(self) -> dict[str, Any]:
        """One of `siblings` when `blobs=true`."""
        shown: dict[str, Any] = {"rfilename": self.path, "size": self.size_bytes, "blobId": self.facts.oid}
        if self.facts.sha256:
            shown["lfs"] = {"sha256": self.facts.sha256, "size": self.size_bytes}
            shown["lfs"]["pointerSize"] = self.facts.pointer_size_bytes
        return shown


@dataclass(frozen=True)
class Profile:
    """A repo at a commit."""

    repo: Repo
    head: LogEntry
    files: tuple[RepoFile, ...]
    card: Card
    config: dict[str, Any]
    safetensors: dict[str, Any] | None

    @cached_property
    def tags(self) -> tuple[str, ...]:
        """By what the repo is found."""
        return tuple(find_tags(self.repo.id.kind, self.card, [file.path for file in self.files], self.config))

    @property
    def bases(self) -> tuple[str | None, list[str]]:
        """The relation to the base models, and their names."""
        return find_bases(self.card)

    @property
    def shown_config(self) -> dict[str, Any] | None:
        """The part of config.json that the Hub shows."""
        return {key: self.config[key] for key in _SHOWN_CONFIG if key in self.config} or None


def read_profile(store: Store, repo: Repo, git: GitRepo, commit: str) -> Profile:
    """The profile of a repo at a commit, from the store's cache when it was read before."""
    key = (repo.uid, commit)
    profile = store.profiles.get(key)
    if not isinstance(profile, Profile):
        profile = _compute(store, repo, git, commit)
        if len(store.profiles) >= _MAX_CACHED:
            store.profiles.clear()
        store.profiles[key] = profile
    return replace(profile, repo=repo)  # settings may have changed since


def _compute(store: Store, repo: Repo, git: GitRepo, commit: str) -> Profile:
    entries = [entry for entry in store.files.list_entries(git, commit) if not entry.is_folder]
    facts = store.files.facts(git, [entry.oid for entry in entries])
    files = tuple(RepoFile(entry.path, facts[entry.oid]) for entry in entries)
    by_path = {file.path: file.facts for file in files}

    def read(path: str) -> bytes:
        return store.files.read(git, by_path[path], limit_bytes=MAX_CARD_BYTES) if path in by_path else b""

    is_model = repo.id.kind == "model"
    return Profile(
        repo=repo,
        head=next(iter(git.log(commit))),
        files=files,
        card=read_card(read("README.md").decode("utf-8", "replace")),
        config=parse_object(read("config.json")) if is_model else {},
        safetensors=_read_safetensors(store, git, files) if is_model else None,
    )


def _read_safetensors(store: Store, git: GitRepo, files: tuple[RepoFile, ...]) -> dict[str, Any] | None:
    """Parameters by dtype over the weights at the top of the repo; an adapter's own files count like a model's."""
    headers = []
    for file in files:
        if file.path.endswith(".safetensors") and "/" not in file.path:
            length = int.from_bytes(store.files.read(git, file.facts, limit_bytes=8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, file.size_bytes):
                return None
            headers.append(store.files.read(git, file.facts, limit_bytes=8 + length)[8:])
    return count_parameters(headers)
