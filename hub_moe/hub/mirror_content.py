"""What a repo holds, between two Hubs: its git history, through a bare repository on this machine, and its large files.

Large files go by git-lfs' batch protocol, each hashed on the way. That works in both directions also with repos of
huggingface.co that are stored by xet, which it serves and takes by LFS as well
(https://huggingface.co/docs/hub/xet/legacy-git-lfs); it could not be tried here.
"""

import hashlib
import io
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import httpx2
from huggingface_hub import CommitOperationAdd
from huggingface_hub.lfs import LFS_HEADERS, UploadInfo, lfs_upload, post_lfs_batch_info
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status, http_backoff, http_stream_backoff

from ..errors import HubError, MissingExtraError
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
_PER_BATCH = 100
_READ_BYTES = 1 << 20
_ATTEMPTS = 5
_TIMEOUT_S = 900  # a Hub may be silent for long while it counts or checks the objects of a large history

Advance = Callable[[str, int], None]
"""Told which file, and how many bytes more of it came or went."""


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

        with _explained(address):
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
        """Move refs at DST from old to new ids (ABSENT: none); HubError unless every one of them was moved."""

        def update(refs: dict[Ref, ObjectID]) -> dict[Ref, ObjectID]:
            now = _as_text(dict(refs))
            moved = [ref for ref, (old, _) in changes.items() if now.get(ref, ABSENT) != old]
            if moved:
                raise HubError(f"{address}: {moved[0]} was changed meanwhile; run the same command again.")
            return {Ref(ref.encode()): ObjectID(new.encode()) for ref, (_, new) in changes.items()}

        def generate(have: Any, want: Any, **options: Any) -> Any:
            wants = [new for _, new in changes.values() if new != ABSENT]
            return self._store.generate_pack_data(_oids(haves), _oids(wants), ofs_delta=options.get("ofs_delta", True))

        if not changes:
            return
        with _explained(address):
            result = _client(side).send_pack(address.path + ".git", update, generate)
        for ref, refusal in (result.ref_status or {}).items():
            if refusal:
                raise HubError(f"{address} refuses {ref.decode()}: {refusal}")

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
            raise HubError(f"SRC sent a history that is not whole: {error} is missing.") from None

    def _commit_of(self, oid: str) -> ObjectID:
        thing = self._read(ObjectID(oid.encode()))
        while isinstance(thing, Tag):
            thing = self._read(thing.object[1])
        return thing.id

    def _read(self, oid: ObjectID) -> ShaFile:
        try:
            return self._store[oid]
        except KeyError:
            raise HubError(f"SRC sent a history that lacks the object {oid.decode()}.") from None


@contextmanager
def _explained(address: RepoAddress) -> Iterator[None]:
    """What dulwich raises, as a HubError of one sentence."""
    try:
        yield
    except HubError:
        raise
    except (NotGitRepository, HTTPUnauthorized) as error:
        raise HubError(f"{address} does not exist, or needs another token.") from error
    except SendPackError as error:
        raise HubError(f"{address} refuses the push: {_reason(error)}") from error
    except (GitProtocolError, OSError, AssertionError) as error:
        raise HubError(f"{address} cannot be reached or broke off: {_reason(error)}") from error


def list_refs(side: Side, address: RepoAddress) -> dict[str, str]:
    """The branches, tags and pull requests of a repo, each with what it points at."""
    with _explained(address):
        found = _client(side).get_refs(address.path.encode() + b".git").refs
    kept = (*_BRANCHES_AND_TAGS, "refs/pr/")
    return {ref: oid for ref, oid in _as_text(found).items() if ref.startswith(kept)}


def _client(side: Side) -> Urllib3HttpGitClient:
    name = "hub_moe" if side.token else None
    return Urllib3HttpGitClient(side.endpoint, username=name, password=side.token, timeout=_TIMEOUT_S)


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


class FileCopier:
    """Copies large files of one repo; what DST has already is left alone."""

    def __init__(self, source: tuple[Side, RepoAddress], target: tuple[Side, RepoAddress], advance: Advance) -> None:
        self._source_side, self._source = source
        target_side, self._target = target
        self._target_token: Any = target_side.token or False  # None would mean: this machine's token
        self._advance = advance

    def find_absent(self, files: list[LargeFile]) -> list[LargeFile]:
        """Those that DST has not."""
        return [file for batch in _batches(files) for file, action in self._ask_target(batch) if action.get("actions")]

    def copy(self, files: dict[LargeFile, str]) -> None:
        """Copy each file; HubError if SRC has lost it or gives other bytes than its sha256 promises."""
        for batch in _batches(list(files)):
            links = self._ask_source(batch, files)
            for file, action in self._ask_target(batch):
                if action.get("actions"):
                    self._copy_one(file, files[file], links[file.sha256], action)

    def _copy_one(self, file: LargeFile, name: str, link: dict[str, Any], action: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory(prefix="hub-moe-mirror-") as folder:
            path = Path(folder) / "content"
            self._download(file, name, link, path)
            operation = _CountedAdd(name, str(path), on_read=lambda count: self._advance(name, count))
            operation.upload_info = UploadInfo(file.size_bytes, b"", bytes.fromhex(file.sha256))
            lfs_upload(operation, action, self._target_token, endpoint=self._target.endpoint)

    def _download(self, file: LargeFile, name: str, link: dict[str, Any], path: Path) -> None:
        digest = hashlib.sha256()
        with path.open("wb") as target:
            for chunk in _read(link, size_bytes=file.size_bytes):
                digest.update(chunk)
                target.write(chunk)
                self._advance(name, len(chunk))
            size_bytes = target.tell()
        if size_bytes != file.size_bytes or digest.hexdigest() != file.sha256:
            raise HubError(
                f"{self._source} gives other bytes for {name} than its sha256 {file.sha256} promises; "
                "nothing that needs this file was pushed."
            )

    def _ask_source(self, files: list[LargeFile], names: dict[LargeFile, str]) -> dict[str, dict[str, Any]]:
        body = {
            "operation": "download",
            "transfers": ["basic"],
            "objects": [{"oid": file.sha256, "size": file.size_bytes} for file in files],
            "hash_algo": "sha256",
        }
        headers = build_hf_headers(token=self._source_side.token or False) | LFS_HEADERS
        answer = http_backoff("POST", f"{self._source}.git/info/lfs/objects/batch", headers=headers, json=body)
        hf_raise_for_status(answer)
        try:
            links = {one["oid"]: one.get("actions", {}).get("download") for one in answer.json()["objects"]}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise HubError(f"{self._source} gives no sensible answer to git-lfs' batch protocol.") from None
        for file in files:
            if not links.get(file.sha256):
                raise HubError(f"{self._source} has lost the large file {file.sha256} ({names[file]}).")
        return links

    def _ask_target(self, files: list[LargeFile]) -> Iterator[tuple[LargeFile, dict[str, Any]]]:
        by_sha256 = {file.sha256: file for file in files}
        infos = [UploadInfo(file.size_bytes, b"", bytes.fromhex(file.sha256)) for file in files]
        kind, repo_id = self._target.kind, self._target.repo_id
        actions, errors, _ = post_lfs_batch_info(
            infos, self._target_token, kind, repo_id, endpoint=self._target.endpoint
        )
        if errors:
            raise HubError(f"{self._target} refuses a large file: {errors[0]['error']['message']}")
        for action in actions:
            yield by_sha256[action["oid"]], action


def _read(link: dict[str, Any], *, size_bytes: int) -> Iterator[bytes]:
    """The bytes behind a link, at most one chunk more than announced; goes on where a connection broke."""
    position = 0
    for attempt in range(_ATTEMPTS):
        headers = dict(link.get("header") or {}) | ({"Range": f"bytes={position}-"} if position else {})
        try:
            with http_stream_backoff("GET", link["href"], headers=headers) as answer:
                hf_raise_for_status(answer)
                if position and answer.status_code != 206:
                    raise HubError("The connection broke, and the server cannot go on where it broke.")
                for chunk in answer.iter_bytes(_READ_BYTES):
                    position += len(chunk)
                    yield chunk
                    if position > size_bytes:
                        return
            return
        except httpx2.TransportError:
            if attempt == _ATTEMPTS - 1 or position >= size_bytes:
                raise


class _CountedAdd(CommitOperationAdd):
    """The client's way to send a file, with its bytes counted as they go."""

    def __init__(self, path_in_repo: str, path: str, *, on_read: Callable[[int], None]) -> None:
        self._on_read = on_read
        super().__init__(path_in_repo, path)

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        with _CountedFile(str(self.path_or_fileobj), self._on_read) as file:
            yield file


class _CountedFile(io.BufferedReader):
    def __init__(self, path: str, on_read: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path), _READ_BYTES)
        self._on_read = on_read

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self._on_read(len(content))
        return content


def _batches(files: list[LargeFile]) -> Iterator[list[LargeFile]]:
    for start in range(0, len(files), _PER_BATCH):
        yield files[start : start + _PER_BATCH]
