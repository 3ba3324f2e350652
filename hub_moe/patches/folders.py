"""Where a patch lies and how it gets there: folders and repos to read from, folders that appear when complete."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .metadata import METADATA_FILE, WEIGHTS_FILE


@dataclass(frozen=True)
class Origin:
    """Where a patch came from: OWNER/NAME[/SUBFOLDER] at a commit of a Hub, or a folder, with commit None."""

    name: str
    commit: str | None = None


def find_origin(name_or_path: str | Path, subfolder: str | None, folder: Path) -> Origin:
    """The origin of the patch that `find_patch` found in `folder`."""
    if Path(name_or_path).expanduser().is_dir():
        return Origin(str(folder))
    commit = next((inner for inner, up in zip(folder.parts[1:], folder.parts, strict=False) if up == "snapshots"), None)
    return Origin("/".join(filter(None, (str(name_or_path), subfolder))), commit)


def find_patch(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    files: Sequence[str] = (METADATA_FILE, WEIGHTS_FILE),
    **hub_options: Any,
) -> Path:
    """The folder of a patch; a name that is no folder is a repo of the Hub, from which `files` are fetched.

    Raises:
        CheckpointError: If there is no patch, or a file of it is a link out of its folder.
    """
    if subfolder and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise CheckpointError(f"The subfolder {subfolder!r} leads out of {name_or_path}.")
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        folder = _fetch(str(name_or_path), revision, [f"{subfolder or '.'}/{name}" for name in files], **hub_options)
    folder = folder / (subfolder or "")
    for name in {METADATA_FILE, WEIGHTS_FILE, *files}:
        _refuse_foreign_link(folder, folder / name)
    return folder


def is_repo_id(name: str) -> bool:
    """Whether a name has the form OWNER/NAME."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def _fetch(name: str, revision: str | None, paths: Sequence[str], **hub_options: Any) -> Path:
    from huggingface_hub import snapshot_download

    if not is_repo_id(name):
        raise CheckpointError(f"{name!r} is neither a folder with an expert patch nor a repo id (OWNER/NAME).")
    wanted = [path.removeprefix("./") for path in paths]
    return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, **hub_options))


def _refuse_foreign_link(folder: Path, path: Path) -> None:
    """Links are only for the Hub's cache: snapshots/SHA/FILE lead to the repo's blobs/ or to those all repos share."""
    if not path.is_symlink():
        return
    target = path.resolve()
    snapshots = next((up for up in folder.resolve().parents if up.name == "snapshots"), None)
    places = [] if snapshots is None else [snapshots.parent / "blobs", snapshots.parent.parent / "blobs"]
    if not any(target.is_relative_to(place) for place in places):
        raise CheckpointError(f"{path} is a link to another place; a patch must hold its files itself.")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write to, on the same disk, that is renamed to `target` at the end, or removed after an error.

    Raises:
        CheckpointError: If `target` is there and not empty, or its place cannot be a folder.
    """
    if target.is_symlink() or target.is_file() or any(parent.is_file() for parent in target.parents):
        raise CheckpointError(f"{target} is, or lies in, a file or link; a new folder was expected.")
    if target.is_dir() and any(target.iterdir()):
        raise CheckpointError(f"{target} exists and is not empty; give a new folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".unfinished-{target.name}-"))
    try:
        yield work
        work.chmod(0o777 & ~_umask())
        for path in (*work.rglob("*"), work):
            _sync(path)
        os.replace(work, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
