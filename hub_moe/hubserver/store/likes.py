"""Who likes which repo. How many do is part of a `Repo`."""

from .accounts import Identity
from .database import Database, now
from .errors import ForbiddenError
from .repos import Repo


class Likes:
    """The likes of all users."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def like(self, repo: Repo, who: Identity) -> None:
        """Like a repo; a second time changes nothing."""
        _require_write(who)
        with self._database.transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO likes VALUES (?, ?, ?)", (repo.uid, who.user, now()))

    def unlike(self, repo: Repo, who: Identity) -> None:
        """Take a like back."""
        _require_write(who)
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM likes WHERE repo = ? AND user = ?", (repo.uid, who.user))

    def likers(self, repo: Repo) -> list[tuple[str, str]]:
        """Name and full name of each user who likes a repo, the first one first."""
        query = (
            "SELECT name, fullname FROM likes JOIN users ON name = user WHERE repo = ? ORDER BY likes.created_at, name"
        )
        return [(row["name"], row["fullname"]) for row in self._database.rows(query, repo.uid)]

    def liked_by(self, user: str) -> dict[str, str]:
        """The uid of each repo that a user likes, and since when, the newest first."""
        query = "SELECT repo, created_at FROM likes WHERE user = ? ORDER BY created_at DESC, repo"
        return {row["repo"]: row["created_at"] for row in self._database.rows(query, user)}


def _require_write(who: Identity) -> None:
    if not who.can_write:
        raise ForbiddenError("You have read access but not the required permissions: this token cannot write.")
