"""Everything the embedded Hub keeps, in one folder on disk. Knows nothing of HTTP.

hub.sqlite3     users, tokens (hashed), repo settings, discussions
secret          the key that signs upload links
repos/UID.git   bare git repositories; a repo's folder keeps its name when the repo is renamed
blobs/          large contents by sha256, those that are kept whole
xorbs/          what clients with hf_xet have sent; the database says which contents are made of it
attachments/    what people show in discussions
incoming/       uploads that are not finished
"""

import fcntl
import os
import secrets
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from ...errors import ConfigError
from .. import extra  # noqa: F401 (says so when the extra `server` is missing)
from .accounts import Accounts, Identity
from .attachments import Attachments
from .blobs import BlobStore, sync_folder
from .commits import Commits
from .contents import Contents
from .database import Database
from .discussions import Discussions
from .download_counts import DownloadCounts
from .files import Files
from .git import GitRepo
from .large_files import LargeFiles
from .likes import Likes
from .locks import take
from .merges import Merges
from .names import RepoId
from .parts import PartStore
from .pushes import Pushes
from .recipes import Recipes
from .repos import IN_USE, Repo, Repos
from .sessions import Sessions
from .sized_cache import SizedCache
from .xet import XetStore
from .xorbs import XorbStore

__all__ = ["GitRepo", "Identity", "Repo", "RepoId", "Store"]

DATABASE_NAME = "hub.sqlite3"
_SECRET_BYTES = 32
_OWN_NAMES = {"attachments", "blobs", "incoming", "repos", "secret", "serving.lock", "xorbs"}
_MAX_DERIVED_BYTES = 200_000_000


class Store:
    """The parts of a store.

    `serve=True` locks the folder for one server and clears what an earlier one left; `create=False` refuses a folder
    that holds no Hub yet.
    """

    def __init__(self, root: Path, *, serve: bool = False, create: bool = True) -> None:
        self.root = root
        if not create and not (root / DATABASE_NAME).is_file():
            raise ConfigError(f"There is no Hub in {root}; name its folder by --root, or start one there.")
        _require_own_folder(root)
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._stack = ExitStack()
        if serve:
            self._lock(root / "serving.lock")
        self.secret = _read_secret(root / "secret")
        self.database = Database(root / DATABASE_NAME)
        self._stack.callback(self.database.close)
        blobs = BlobStore(root / "blobs", root / "incoming")
        self.xorbs = XorbStore(root / "xorbs", blobs.incoming)
        self.contents = Contents(blobs, Recipes(self.database, self.xorbs))
        self.parts = PartStore(self.contents, blobs.incoming)
        self.accounts = Accounts(self.database)
        self.sessions = Sessions(self.database, self.accounts)
        self.repos = Repos(self.database, self.accounts, root / "repos")
        self.files = Files(self.database, self.contents)
        self.commits = Commits(self.database, self.repos, self.contents)
        self.discussions = Discussions(self.database, self.repos)
        self.merges = Merges(self.repos, self.commits, self.discussions)
        self.large_files = LargeFiles(self.database, self.contents, self.repos, self.files, self.commits)
        self.likes = Likes(self.database)
        self.downloads = DownloadCounts(self.database)
        self.attachments = Attachments(root / "attachments", blobs)
        self.pushes = Pushes(self.repos, self.commits, self.discussions)
        self.xet = XetStore(self.database, self.xorbs, self.contents, self.commits)
        self.derived: SizedCache[object] = SizedCache(_MAX_DERIVED_BYTES)
        if serve:
            self._clear_leftovers()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stack.close()

    def _lock(self, path: Path) -> None:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._stack.enter_context(file)
        except BlockingIOError:
            file.close()
            raise ConfigError(f"Another server already serves {self.root}; stop it or choose another folder.") from None

    def _clear_leftovers(self) -> None:
        """What a killed server left: half uploads, git's lock files (which would block a ref for ever)."""
        self.contents.blobs.clear_incoming()
        for leftover in [*self.root.glob("repos/*.git/refs/**/*.lock"), *self.root.glob("repos/*.git/*.lock")]:
            leftover.unlink()
        with take(self.repos.cleaning_lock, alone=False) as is_held:
            if is_held:  # else what looks left over may belong to a running `hub gc`; a later start deletes the rest
                for folder in self.root.glob("repos/*.git"):
                    _clear_objects(folder)


def _clear_objects(folder: Path) -> None:
    """Delete the half-written objects of a repository in which nobody works."""
    with take(folder / IN_USE) as is_held:
        if not is_held:
            return
        for leftover in folder.glob("objects/tmp_obj_*"):
            leftover.unlink()
        for pack in folder.glob("objects/pack/*.pack"):
            if not pack.with_suffix(".idx").exists():
                pack.unlink()


def _require_own_folder(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root} is not a folder.")
    if root.is_dir() and not (root / DATABASE_NAME).is_file():
        others = [path.name for path in root.iterdir() if path.name not in _OWN_NAMES and path.name[0] != "."]
        if others:
            raise ConfigError(f"{root} holds {others[0]!r} and no Hub; name a new or empty folder.")


def _read_secret(path: Path) -> bytes:
    """The key in a file, made when there is none; whole or not there, whatever happens meanwhile."""
    if not path.exists():
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".secret-")
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # another process was faster
            os.link(name, path)
        os.unlink(name)
        sync_folder(path.parent)
    secret = path.read_bytes()
    if len(secret) != _SECRET_BYTES:
        raise ConfigError(f"{path} is damaged; delete it, and links and log-ins that were given out end.")
    return secret
