"""The SQLite file: users, tokens, repo settings, who may read which content."""

import logging
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS users (
    name TEXT PRIMARY KEY COLLATE NOCASE,
    kind TEXT NOT NULL CHECK (kind IN ('user', 'org')),
    fullname TEXT NOT NULL,
    email TEXT NOT NULL,
    created_at TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS members (
    org TEXT NOT NULL COLLATE NOCASE REFERENCES users (name) ON DELETE CASCADE,
    user TEXT NOT NULL COLLATE NOCASE REFERENCES users (name) ON DELETE CASCADE,
    role TEXT NOT NULL CHECK (role IN ('admin', 'write', 'read')),
    PRIMARY KEY (org, user)
) STRICT;
CREATE TABLE IF NOT EXISTS tokens (
    hash TEXT PRIMARY KEY,
    user TEXT NOT NULL COLLATE NOCASE REFERENCES users (name) ON DELETE CASCADE,
    name TEXT NOT NULL,
    role TEXT NOT NULL CHECK (role IN ('read', 'write')),
    created_at TEXT NOT NULL,
    UNIQUE (user, name)
) STRICT;
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY,
    token TEXT NOT NULL REFERENCES tokens (hash) ON DELETE CASCADE,
    expires_at REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS repos (
    id TEXT PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('model', 'dataset', 'space')),
    owner TEXT NOT NULL COLLATE NOCASE REFERENCES users (name),
    name TEXT NOT NULL COLLATE NOCASE,
    private INTEGER NOT NULL DEFAULT 0,
    gated TEXT NOT NULL DEFAULT '' CHECK (gated IN ('', 'auto', 'manual')),
    sdk TEXT,
    downloads INTEGER NOT NULL DEFAULT 0,
    created_at TEXT NOT NULL,
    modified_at TEXT NOT NULL,
    last_num INTEGER NOT NULL DEFAULT 0,
    UNIQUE (kind, owner, name)
) STRICT;
CREATE TABLE IF NOT EXISTS redirects (
    kind TEXT NOT NULL,
    owner TEXT NOT NULL COLLATE NOCASE,
    name TEXT NOT NULL COLLATE NOCASE,
    repo TEXT NOT NULL REFERENCES repos (id) ON DELETE CASCADE,
    PRIMARY KEY (kind, owner, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS likes (
    repo TEXT NOT NULL REFERENCES repos (id) ON DELETE CASCADE,
    user TEXT NOT NULL COLLATE NOCASE REFERENCES users (name) ON DELETE CASCADE,
    created_at TEXT NOT NULL,
    PRIMARY KEY (repo, user)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS deleted_blobs (
    repo TEXT NOT NULL REFERENCES repos (id) ON DELETE CASCADE,
    sha256 TEXT NOT NULL,
    PRIMARY KEY (repo, sha256)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS grants (
    repo TEXT NOT NULL REFERENCES repos (id) ON DELETE CASCADE,
    user TEXT NOT NULL COLLATE NOCASE REFERENCES users (name) ON DELETE CASCADE,
    status TEXT NOT NULL CHECK (status IN ('pending', 'accepted', 'rejected')),
    asked_at TEXT NOT NULL,
    PRIMARY KEY (repo, user)
) STRICT;
CREATE TABLE IF NOT EXISTS repo_blobs (
    repo TEXT NOT NULL REFERENCES repos (id) ON DELETE CASCADE,
    sha256 TEXT NOT NULL,
    noted_at_s INTEGER NOT NULL DEFAULT (CAST(strftime('%s', 'now') AS INTEGER)),
    PRIMARY KEY (repo, sha256)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS repo_blobs_by_sha256 ON repo_blobs (sha256);
CREATE TABLE IF NOT EXISTS discussions (
    repo TEXT NOT NULL REFERENCES repos (id) ON DELETE CASCADE,
    num INTEGER NOT NULL,
    title TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('draft', 'open', 'closed', 'merged')),
    is_pull_request INTEGER NOT NULL,
    author TEXT NOT NULL,
    created_at TEXT NOT NULL,
    target TEXT NOT NULL,
    merge_commit TEXT,
    PRIMARY KEY (repo, num)
) STRICT;
CREATE TABLE IF NOT EXISTS events (
    id TEXT PRIMARY KEY,
    repo TEXT NOT NULL,
    num INTEGER NOT NULL,
    type TEXT NOT NULL,
    author TEXT NOT NULL,
    created_at TEXT NOT NULL,
    data TEXT NOT NULL,
    FOREIGN KEY (repo, num) REFERENCES discussions (repo, num) ON DELETE CASCADE
) STRICT;
CREATE INDEX IF NOT EXISTS events_by_discussion ON events (repo, num);
CREATE TABLE IF NOT EXISTS counters (
    name TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS recipes (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    sha256 TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL UNIQUE,
    size_bytes INTEGER NOT NULL,
    added_at_s INTEGER NOT NULL DEFAULT (CAST(strftime('%s', 'now') AS INTEGER))
) STRICT;
CREATE TABLE IF NOT EXISTS recipe_terms (
    recipe INTEGER NOT NULL REFERENCES recipes (id) ON DELETE CASCADE,
    start INTEGER NOT NULL,
    xorb TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    first INTEGER NOT NULL,
    end INTEGER NOT NULL,
    PRIMARY KEY (recipe, start)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shared_chunks (
    chunk BLOB NOT NULL,
    recipe INTEGER NOT NULL REFERENCES recipes (id) ON DELETE CASCADE,
    PRIMARY KEY (chunk, recipe)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS shared_chunks_by_recipe ON shared_chunks (recipe);
CREATE INDEX IF NOT EXISTS recipe_terms_by_xorb ON recipe_terms (xorb);
CREATE TABLE IF NOT EXISTS file_facts (
    oid TEXT PRIMARY KEY,
    size_bytes INTEGER NOT NULL,
    sha256 TEXT
) STRICT, WITHOUT ROWID;
"""


class Database:
    """One SQLite connection shared by the threads of a process; other processes may open the same file."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        path.touch(mode=0o600)
        path.chmod(0o600)  # it holds the names of private repos; its log files get the same rights
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA foreign_keys = ON")
        self._connection.executescript(SCHEMA)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Everything inside is written together, or not at all when an error leaves the block."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def try_to_write(self, query: str, values: Iterable[tuple[Any, ...]], *, what: str) -> None:
        """Write what can be done without: where there is no room for it, that is logged."""
        try:
            with self.transaction() as connection:
                connection.executemany(query, values)
        except sqlite3.OperationalError as error:
            _log.warning("%s was not written: %s", what, error)

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """Every row that a SELECT finds."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def row(self, query: str, *values: Any) -> sqlite3.Row | None:
        """The first row that a SELECT finds."""
        found = self.rows(query, *values)
        return found[0] if found else None

    def copy(self, path: Path) -> None:
        """Write the database as it is at one moment into a new file."""
        with closing(sqlite3.connect(path)) as target:
            self._connection.backup(target)
            target.execute("PRAGMA journal_mode = DELETE")

    def close(self) -> None:
        """Close the connection; the object is of no use afterwards."""
        with self._lock:
            self._connection.close()


def now() -> str:
    """The time in the Hub's spelling: `2026-09-22T17:25:10.000Z`."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
