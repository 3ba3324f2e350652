"""Large files from one Hub to another by git-lfs' batch protocol, each hashed on the way.

Both directions also work with repos of huggingface.co that are stored by xet: it serves and takes large files by the
LFS protocol as well (https://huggingface.co/docs/hub/xet/legacy-git-lfs). That could not be tried here.
"""

import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import httpx2
from huggingface_hub import CommitOperationAdd
from huggingface_hub.lfs import LFS_HEADERS, UploadInfo, lfs_upload, post_lfs_batch_info
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status, http_backoff, http_stream_backoff

from ..errors import MirrorError
from .mirror_address import RepoAddress, Side
from .mirror_history import LargeFile

_PER_BATCH = 100
_READ_BYTES = 1 << 20
_ATTEMPTS = 5

Advance = Callable[[str, int], None]
"""Told which file, and how many bytes more of it came or went."""


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
        """Copy each file; MirrorError if SRC has lost it or gives other bytes than its sha256 promises."""
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
            raise MirrorError(
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
        links = {one["oid"]: one.get("actions", {}).get("download") for one in answer.json()["objects"]}
        for file in files:
            if not links.get(file.sha256):
                raise MirrorError(f"{self._source} has lost the large file {file.sha256} ({names[file]}).")
        return links

    def _ask_target(self, files: list[LargeFile]) -> Iterator[tuple[LargeFile, dict[str, Any]]]:
        by_sha256 = {file.sha256: file for file in files}
        infos = [UploadInfo(file.size_bytes, b"", bytes.fromhex(file.sha256)) for file in files]
        kind, repo_id = self._target.kind, self._target.repo_id
        actions, errors, _ = post_lfs_batch_info(
            infos, self._target_token, kind, repo_id, endpoint=self._target.endpoint
        )
        if errors:
            raise MirrorError(f"{self._target} refuses a large file: {errors[0]['error']['message']}")
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
                    raise MirrorError("The connection broke, and the server cannot go on where it broke.")
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
