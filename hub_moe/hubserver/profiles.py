"""Everything that lists and pages show of a repo at one commit, computed once for each commit."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from .cards import MAX_CARD_BYTES, Card, count_parameters, find_bases, find_tags, parse_object, read_card, weigh
from .evaluations import parse_benchmark
from .store import GitRepo, Repo, Store
from .store.errors import NotFoundError
from .store.files import FileFacts
from .store.git import LogEntry

_BYTES_PER_FILE = 600
_MAX_HEADER_BYTES = 25_000_000
_MAX_HEADERS_BYTES = 100_000_000
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
    benchmark_tasks: tuple[str, ...] = ()

    @cached_property
    def tags(self) -> tuple[str, ...]:
        """By what the repo is found."""
        tags = find_tags(self.repo.id.kind, self.card, [file.path for file in self.files], self.config)
        return (*tags, "benchmark:official") if self.benchmark_tasks else tuple(tags)

    @property
    def weight_bytes(self) -> int:
        """About how much memory it takes."""
        files = _BYTES_PER_FILE * len(self.files) + sum(len(file.path) for file in self.files)
        read = [self.card.data, self.card.text, list(self.card.errors), self.config, self.safetensors]
        return files + weigh([*read, self.head.message, list(self.benchmark_tasks)])

    @property
    def bases(self) -> tuple[str | None, list[str]]:
        """The relation to the base models, and their names."""
        return find_bases(self.card)


def read_profile(store: Store, repo: Repo, git: GitRepo, commit: str) -> Profile:
    """The profile of a repo at a commit, from the store's cache when it was read before."""
    key = (repo.uid, commit)
    profile = store.derived.get(key)
    if not isinstance(profile, Profile):
        profile = _compute(store, repo, git, commit)
        store.derived.put(key, profile, size=profile.weight_bytes)
    return replace(profile, repo=repo)  # settings may have changed since


def read_main(store: Store, repo: Repo) -> Profile:
    """The profile of a repo's `main`."""
    with store.repos.open(repo) as git:
        return read_profile(store, repo, git, git.resolve("main"))


def read_mains(store: Store, repos: Iterable[Repo]) -> Iterator[Profile]:
    """The profiles of the `main` of repos, without those that were deleted in the meantime."""
    for repo in repos:
        with suppress(NotFoundError):
            yield read_main(store, repo)


def _compute(store: Store, repo: Repo, git: GitRepo, commit: str) -> Profile:
    entries = [entry for entry in store.files.list_entries(git, commit) if not entry.is_folder]
    facts = store.files.facts(git, [entry.oid for entry in entries])
    files = tuple(RepoFile(entry.path, facts[entry.oid]) for entry in entries)
    by_path = {file.path: file.facts for file in files}

    def read(path: str) -> bytes:
        with suppress(KeyError, NotFoundError):
            return store.files.read(git, by_path[path], limit_bytes=MAX_CARD_BYTES)
        return b""

    is_model, is_dataset = repo.id.kind == "model", repo.id.kind == "dataset"
    return Profile(
        repo=repo,
        head=next(iter(git.log(commit))),
        files=files,
        card=read_card(read("README.md").decode("utf-8", "replace")),
        config=_read_config(read("config.json")) if is_model else {},
        safetensors=_read_safetensors(store, git, files) if is_model else None,
        benchmark_tasks=tuple(parse_benchmark(read("eval.yaml").decode("utf-8", "replace")) or ())
        if is_dataset
        else (),
    )


def _read_config(content: bytes) -> dict[str, Any]:
    found = parse_object(content)
    return {key: found[key] for key in _SHOWN_CONFIG if key in found}


def _read_safetensors(store: Store, git: GitRepo, files: tuple[RepoFile, ...]) -> dict[str, Any] | None:
    """Parameters by dtype over the weights at the top of the repo; an adapter's own files count like a model's."""
    weights = [file.facts for file in files if file.path.endswith(".safetensors") and "/" not in file.path]
    return count_parameters(_read_headers(store, git, {facts.oid: facts for facts in weights}.values()))


def _read_headers(store: Store, git: GitRepo, weights: Iterable[FileFacts]) -> Iterator[bytes]:
    """The header of each file; an empty one, which cannot be counted, for no header and after too many bytes."""
    left_bytes = _MAX_HEADERS_BYTES
    for facts in weights:
        header = read_weights_header(store, git, facts) or b""
        left_bytes -= len(header)
        yield header if left_bytes >= 0 else b""


def read_weights_header(store: Store, git: GitRepo, facts: FileFacts) -> bytes | None:
    """The JSON at the start of a safetensors file, None if there is none."""
    try:
        length = int.from_bytes(store.files.read(git, facts, limit_bytes=8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, facts.size_bytes):
            return None
        return store.files.read(git, facts, limit_bytes=8 + length)[8:]
    except NotFoundError:
        return None
