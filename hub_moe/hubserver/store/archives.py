"""The two forms of a backup: a tar file and a folder. Only files, by safe names, readable by their owner alone."""

import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from ...errors import ConfigError
from .blobs import COPY_BYTES


class TarWriter:
    """A new tar file."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(descriptor, "wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, name: str, content: Path | bytes) -> int:
        """Append a file; its size."""
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
            info = tarfile.TarInfo(name)
            info.size, info.mode = file.seek(0, os.SEEK_END), 0o600
            file.seek(0)
            self._tar.addfile(info, file)
        return info.size

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._file:
            if error is None:
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())


class FolderWriter:
    """A new folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(mode=0o700)

    def add(self, name: str, content: Path | bytes) -> int:
        """Write a file; its size."""
        target = self._path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            return target.write_bytes(content)
        shutil.copyfile(content, target)
        return target.stat().st_size

    def __enter__(self) -> "FolderWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            os.sync()


class TarReader:
    """A tar file that may come from anywhere."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.size_bytes = path.stat().st_size

    def copy_to(self, folder: Path) -> Iterator[int]:
        """Extract every file, yielding how many bytes were read; ConfigError for what no backup holds."""
        try:
            with tarfile.open(self._path, "r:") as tar:
                for member in tar:
                    content = tar.extractfile(member) if member.isreg() else None
                    if content is None:
                        raise ConfigError(f"{self._path} holds {member.name!r}, which is not a file.")
                    with content:
                        _write_inside(folder, member.name, content)
                    yield tar.fileobj.tell() if tar.fileobj else 0
        except (tarfile.TarError, EOFError, FileExistsError, NotADirectoryError, IsADirectoryError):
            raise ConfigError(f"{self._path} is not a whole tar file.") from None


class FolderReader:
    """A folder that `FolderWriter` wrote."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ConfigError(f"{path} does not exist.")
        self._path = path
        self._files = sorted(one for one in path.rglob("*") if one.is_file() and not one.is_symlink())
        self.size_bytes = sum(one.stat().st_size for one in self._files)

    def copy_to(self, folder: Path) -> Iterator[int]:
        """Copy every file, yielding how many bytes were copied."""
        done_bytes = 0
        for path in self._files:
            with path.open("rb") as content:
                _write_inside(folder, path.relative_to(self._path).as_posix(), content)
            done_bytes += path.stat().st_size
            yield done_bytes


def _write_inside(folder: Path, name: str, content: IO[bytes]) -> None:
    parts = name.split("/")
    if any(part in {"", ".", ".."} or "\0" in part for part in parts):
        raise ConfigError(f"A backup holds no file named {name!r}.")
    target = folder.joinpath(*parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        shutil.copyfileobj(content, file, COPY_BYTES)
