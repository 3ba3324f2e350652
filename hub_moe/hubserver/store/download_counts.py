"""How often repos are downloaded."""

import threading
import time

from .database import Database

_PAUSE_S = 300.0
_MAX_REMEMBERED = 10_000


class DownloadCounts:
    """Counts one download for all that a client takes of a repo without a long pause: a snapshot has many files."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._last_s: dict[tuple[str, str], float] = {}

    def count(self, repo_uid: str, client: str) -> None:
        """Note that a client takes a file. A count that cannot be written, on a full disk, is logged and lost."""
        if not self._is_new(repo_uid, client):
            return
        query = "UPDATE repos SET downloads = downloads + 1 WHERE id = ?"
        self._database.try_to_write(query, [(repo_uid,)], what="A download")

    def _is_new(self, repo_uid: str, client: str) -> bool:
        now_s = time.monotonic()
        with self._lock:
            last_s = self._last_s.get((repo_uid, client))
            if len(self._last_s) >= _MAX_REMEMBERED:
                self._last_s.clear()
            self._last_s[repo_uid, client] = now_s
        return last_s is None or now_s - last_s > _PAUSE_S
