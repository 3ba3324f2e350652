"""`hub backup` and `hub restore`: a whole Hub as one tar file or folder, taken while it serves.

First, at one moment in which no ref moves, the database is copied and the refs are read; then everything that these
two need is copied. All of it is there already and stays: objects, files and xorbs come before what refers to them, and
`hub gc` does not run meanwhile. The secret is left out: links of a restored Hub are signed anew.
"""

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import ConfigError
from . import DATABASE_NAME, Store
from .archives import FolderReader, FolderWriter, TarReader, TarWriter
from .blobs import sync_folder
from .check import find_faults
from .database import now
from .locks import take
from .repos import IN_USE

_MANIFEST = "backup.json"
_VERSION = 1
_WAIT_S = 60.0
_FOLDERS_OF_A_REPO = ("objects/pack", "objects/info", "refs/heads", "refs/tags")

OnProgress = Callable[[int, int], None]
Entry = tuple[str, Path | bytes]
"""A name in a backup, and the file or the bytes that stand there."""


@dataclass(frozen=True)
class BackupFacts:
    """What a backup holds."""

    version: int
    created_at: str
    repos: int
    files: int
    size_bytes: int


def back_up(store: Store, target: Path, *, on_progress: OnProgress | None = None) -> BackupFacts:
    """Write a backup: a tar file if `target` ends in `.tar`, else a folder. `on_progress` gets bytes done and in all.

    Raises:
        ConfigError: If `target` exists, or `hub gc` or another backup is running.
    """
    partial, snapshot = target.with_name(f"{target.name}.partial"), target.with_name(f"{target.name}.sqlite3.partial")
    _refuse_existing(target, partial, snapshot)
    with take(store.repos.cleaning_lock) as is_held:
        if not is_held:
            raise ConfigError(f"`hub gc` or another backup of {store.root} is running; try again when it is done.")
        try:
            entries = _choose(store, snapshot)
            facts = _describe(entries)
            entries.append((_MANIFEST, json.dumps(asdict(facts), indent=2).encode()))  # last: it says that all is there
            with TarWriter(partial) if target.suffix == ".tar" else FolderWriter(partial) as writer:
                done_bytes = 0
                for name, content in entries:
                    done_bytes += writer.add(name, content)
                    if on_progress:
                        on_progress(done_bytes, facts.size_bytes)
            os.rename(partial, target)
            sync_folder(target.parent)
        finally:
            _remove(snapshot)
            _remove(partial)
    return facts


def restore(source: Path, root: Path, *, on_progress: OnProgress | None = None) -> BackupFacts:
    """Make a Hub in `root` from a backup; it is there whole and checked, or not at all.

    Raises:
        ConfigError: If `root` holds something, or `source` is no whole backup.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(f"{root} is not empty; restore into a new folder.")
    partial = root.with_name(f"{root.name}.partial")
    _refuse_existing(partial)
    partial.mkdir(parents=True, mode=0o700)
    try:
        reader = TarReader(source) if source.is_file() else FolderReader(source)
        for done_bytes in reader.copy_to(partial):
            if on_progress:
                on_progress(done_bytes, reader.size_bytes)
        facts = _read_manifest(partial / _MANIFEST, source)
        _check(partial, source)
        os.sync()
        if root.exists():
            root.rmdir()
        os.rename(partial, root)
        sync_folder(root.parent)
    finally:
        _remove(partial)
    return facts


def _choose(store: Store, snapshot: Path) -> list[Entry]:
    """Everything that goes into a backup. Refs are read at once, because they may move as soon as we go on."""
    with take(store.repos.changing_lock, wait_s=_WAIT_S) as is_held:
        if not is_held:
            raise ConfigError(f"{store.root} is changed all the time; try again later.")
        store.database.copy(snapshot)
        with closing(sqlite3.connect(snapshot)) as connection:
            repos = [row[0] for row in connection.execute("SELECT id FROM repos ORDER BY id")]
        entries = [entry for uid in repos for entry in _read_refs(store, uid)]
    with closing(sqlite3.connect(snapshot)) as connection:
        entries += _list_contents(store, connection)
    entries += [entry for uid in repos for entry in _list_objects(store, uid)]
    entries += [(f"attachments/{path.name}", path) for path in sorted((store.root / "attachments").glob("*"))]
    return [*entries, (DATABASE_NAME, snapshot)]


def _read_refs(store: Store, uid: str) -> Iterator[Entry]:
    folder = store.root / "repos" / f"{uid}.git"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not name.startswith("objects/") and name != IN_USE and path.suffix != ".lock" and path.is_file():
            yield f"repos/{folder.name}/{name}", path.read_bytes()


def _list_objects(store: Store, uid: str) -> Iterator[Entry]:
    folder = store.root / "repos" / f"{uid}.git"
    loose = list((folder / "objects").glob("[0-9a-f][0-9a-f]/*"))
    packs = [pack for pack in (folder / "objects/pack").glob("*.pack") if pack.with_suffix(".idx").is_file()]
    for path in sorted([*loose, *packs, *(pack.with_suffix(".idx") for pack in packs)]):
        yield f"repos/{folder.name}/{path.relative_to(folder).as_posix()}", path


def _list_contents(store: Store, connection: sqlite3.Connection) -> Iterator[Entry]:
    blobs = "SELECT DISTINCT sha256 FROM repo_blobs WHERE sha256 NOT IN (SELECT sha256 FROM recipes) ORDER BY 1"
    for (sha256,) in connection.execute(blobs):
        path = store.contents.blobs.path(sha256)
        if path.is_file():
            yield path.relative_to(store.root).as_posix(), path
    for (xorb,) in connection.execute("SELECT DISTINCT xorb FROM recipe_terms ORDER BY 1"):
        path = store.xorbs.path(xorb)
        yield path.relative_to(store.root).as_posix(), path


def _describe(entries: list[Entry]) -> BackupFacts:
    sizes = [len(content) if isinstance(content, bytes) else content.stat().st_size for _, content in entries]
    repos = {name.split("/")[1] for name, _ in entries if name.startswith("repos/")}
    return BackupFacts(_VERSION, now(), repos=len(repos), files=len(entries), size_bytes=sum(sizes))


def _read_manifest(path: Path, source: Path) -> BackupFacts:
    try:
        facts = BackupFacts(**json.loads(path.read_text("utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        raise ConfigError(f"{source} is not a whole backup of a Hub.") from None
    if facts.version != _VERSION:
        raise ConfigError(f"{source} is a backup of version {facts.version}; this hub_moe knows version {_VERSION}.")
    path.unlink()
    return facts


def _check(root: Path, source: Path) -> None:
    for folder in (root / "repos").glob("*.git"):
        for name in _FOLDERS_OF_A_REPO:
            (folder / name).mkdir(parents=True, exist_ok=True)
    with Store(root) as store:
        faults = list(find_faults(store))
    if faults:
        raise ConfigError(f"{source} has {len(faults)} faults; the first: {faults[0]}")


def _refuse_existing(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path} exists already; delete it or choose another name.")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
