"""The git history of a repo between two Hubs, through a bare repository in a temporary folder."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MirrorError, MissingExtraError
from .mirror_address import RepoAddress, Side

try:
    from dulwich.client import HTTPUnauthorized, Urllib3HttpGitClient
    from dulwich.errors import GitProtocolError, NotGitRepository, SendPackError
    from dulwich.object_store import MissingObjectFinder
    from dulwich.objects import Blob, Commit, ObjectID, ShaFile, Tag, Tree
    from dulwich.refs import Ref
    from dulwich.repo import Repo
except ModuleNotFoundError as error:
    raise MissingExtraError("Mirroring needs dulwich: pip install 'hub_moe[server]'.") from error

ABSENT = "0" * 40
_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (0|[1-9][0-9]{0,18})\n"
)
_MAX_POINTER_BYTES = 200
_BRANCHES_AND_TAGS = ("refs/heads/", "refs/tags/")


@dataclass(frozen=True)
class LargeFile:
    """What a git-lfs pointer names."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Missing:
    """What a Hub lacks of some commits: how many commits, and the large files that they name, each with a name."""

    commits: int
    large_files: dict[LargeFile, str]


class History:
    """The commits, tags and small files of a repo at SRC, on this machine."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._repo = Repo.init_bare(str(folder))
        self._store = self._repo.object_store

    def close(self) -> None:
        """Close the files; the folder stays."""
        self._repo.close()

    def fetch(self, side: Side, address: RepoAddress, *, pull_requests: dict[str, str]) -> dict[str, str]:
        """Get the branches and tags of SRC and these refs of pull requests; each ref with what it points at."""
        found: dict[str, str] = {}

        def choose(refs: dict[Ref, ObjectID], depth: int | None = None) -> list[ObjectID]:
            now = _as_text(dict(refs))
            found.update({ref: oid for ref, oid in now.items() if ref.startswith(_BRANCHES_AND_TAGS)})
            found.update({ref: now.get(ref, oid) for ref, oid in pull_requests.items()})
            return _oids([oid for oid in dict.fromkeys(found.values()) if not self.has(oid)])

        with _Explained(address):
            _client(side).fetch(address.path + ".git", self._repo, determine_wants=choose)  # type: ignore[arg-type]
        return found

    def has(self, oid: str) -> bool:
        """Whether an object of this id came from SRC."""
        return ObjectID(oid.encode()) in self._store

    def descends(self, new: str, old: str) -> bool:
        """Whether the history of `new` holds `old`."""
        if not self.has(old):
            return False
        start, end = self._commit_of(new), self._commit_of(old)
        return any(entry.commit.id == end for entry in self._repo.get_walker(include=[start]))

    def missing(self, wants: list[str], haves: list[str]) -> Missing:
        """What a Hub that has `haves` needs for `wants`."""
        commits, files = 0, dict[LargeFile, str]()
        for oid, hint in self._find_missing(wants, haves):
            thing = self._read(oid)
            commits += isinstance(thing, Commit)
            if isinstance(thing, Blob) and (large := _parse_pointer(thing.as_raw_string())):
                name = hint[1].decode("utf-8", "replace") if hint and hint[1] else large.sha256[:12]
                files.setdefault(large, name)
        return Missing(commits, files)

    def push(self, side: Side, address: RepoAddress, changes: dict[str, tuple[str, str]], *, haves: list[str]) -> None:
        """Move refs at DST from old to new ids (ABSENT: none); MirrorError unless every one of them was moved."""

        def update(refs: dict[Ref, ObjectID]) -> dict[Ref, ObjectID]:
            now = _as_text(dict(refs))
            moved = [ref for ref, (old, _) in changes.items() if now.get(ref, ABSENT) != old]
            if moved:
                raise MirrorError(f"{address}: {moved[0]} was changed meanwhile; run the same command again.")
            return {Ref(ref.encode()): ObjectID(new.encode()) for ref, (_, new) in changes.items()}

        def generate(have: Any, want: Any, **options: Any) -> Any:
            wants = [new for _, new in changes.values() if new != ABSENT]
            return self._store.generate_pack_data(_oids(haves), _oids(wants), ofs_delta=options.get("ofs_delta", True))

        if not changes:
            return
        with _Explained(address):
            result = _client(side).send_pack(address.path + ".git", update, generate)
        for ref, refusal in (result.ref_status or {}).items():
            if refusal:
                raise MirrorError(f"{address} refuses {ref.decode()}: {refusal}")

    def files(self, oid: str) -> Iterator[tuple[str, str, LargeFile | None]]:
        """Each file of a commit: its path, its git id, and what it points at if it is a large file."""
        commit = self._read(self._commit_of(oid))
        assert isinstance(commit, Commit)
        yield from self._walk(commit.tree, "")

    def tree_of(self, oid: str) -> str:
        """The id of a commit's tree: commits with the same tree have the same files."""
        commit = self._read(self._commit_of(oid))
        assert isinstance(commit, Commit)
        return str(commit.tree.decode())

    def commit_of(self, oid: str) -> str:
        """The commit that a commit or annotated tag leads to."""
        return self._commit_of(oid).decode()

    def _walk(self, tree: ObjectID, prefix: str) -> Iterator[tuple[str, str, LargeFile | None]]:
        found = self._read(tree)
        assert isinstance(found, Tree)
        for name, mode, oid in found.iteritems():
            path = prefix + name.decode("utf-8", "replace")
            if mode == 0o040000:
                yield from self._walk(oid, f"{path}/")
            elif mode != 0o160000:
                yield path, oid.decode(), _parse_pointer(self._read(oid).as_raw_string())

    def _find_missing(self, wants: list[str], haves: list[str]) -> Iterator[tuple[ObjectID, Any]]:
        try:
            yield from MissingObjectFinder(self._store, haves=_oids(haves), wants=_oids(wants), shallow=set())
        except KeyError as error:
            raise MirrorError(f"SRC sent a history that is not whole: {error} is missing.") from None

    def _commit_of(self, oid: str) -> ObjectID:
        thing = self._read(ObjectID(oid.encode()))
        while isinstance(thing, Tag):
            thing = self._read(thing.object[1])
        return thing.id

    def _read(self, oid: ObjectID) -> ShaFile:
        try:
            return self._store[oid]
        except KeyError:
            raise MirrorError(f"SRC sent a history that lacks the object {oid.decode()}.") from None


class _Explained:
    """Turns what dulwich raises into one sentence."""

    def __init__(self, address: RepoAddress) -> None:
        self._address = address

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, NotGitRepository | HTTPUnauthorized):
            raise MirrorError(f"{self._address} does not exist, or needs another token.") from error
        if isinstance(error, SendPackError):
            raise MirrorError(f"{self._address} refuses the push: {_reason(error)}") from error
        if isinstance(error, GitProtocolError | OSError | AssertionError):
            raise MirrorError(f"{self._address} cannot be reached or broke off: {_reason(error)}") from error


def list_refs(side: Side, address: RepoAddress) -> dict[str, str]:
    """The branches, tags and pull requests of a repo, each with what it points at."""
    with _Explained(address):
        found = _client(side).get_refs(address.path.encode() + b".git").refs
    kept = (*_BRANCHES_AND_TAGS, "refs/pr/")
    return {ref: oid for ref, oid in _as_text(found).items() if ref.startswith(kept)}


def _client(side: Side) -> Urllib3HttpGitClient:
    name = "hub_moe" if side.token else None
    return Urllib3HttpGitClient(side.endpoint, username=name, password=side.token)


def _as_text(refs: dict[Any, Any]) -> dict[str, str]:
    return {ref.decode(): oid.decode() for ref, oid in refs.items() if oid and not ref.endswith(b"^{}")}


def _oids(texts: list[str]) -> list[ObjectID]:
    return [ObjectID(text.encode()) for text in texts]


def _parse_pointer(content: bytes) -> LargeFile | None:
    match = _POINTER.fullmatch(content) if len(content) < _MAX_POINTER_BYTES else None
    return LargeFile(match.group(1).decode(), int(match.group(2))) if match else None


def _reason(error: BaseException) -> str:
    text = error.args[0] if error.args else type(error).__name__
    return " ".join((text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)).split())
