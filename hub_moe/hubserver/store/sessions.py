"""People who are logged in by a browser. A session ends with its token, and is kept only as the sha256 of its id."""

import hashlib
import secrets
import time

from .accounts import SELECT_IDENTITY, Accounts, Identity
from .database import Database

LIFE_S = 14 * 24 * 3600


class Sessions:
    """The sessions in a database."""

    def __init__(self, database: Database, accounts: Accounts) -> None:
        self._database = database
        self._accounts = accounts

    def start(self, token: str) -> str:
        """The id of a new session for who holds a token; UnauthenticatedError if nobody does."""
        self._accounts.identify(token)
        session = secrets.token_urlsafe(24)
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM sessions WHERE expires_at < ?", (time.time(),))
            values = (_hash(session), _hash(token), time.time() + LIFE_S)
            connection.execute("INSERT INTO sessions VALUES (?, ?, ?)", values)
        return session

    def identify(self, session: str) -> Identity | None:
        """Who a session belongs to; None if it has ended."""
        row = self._database.row(
            f"{SELECT_IDENTITY} JOIN sessions s ON s.token = t.hash WHERE s.id = ? AND s.expires_at > ?",
            _hash(session),
            time.time(),
        )
        return Identity(*row) if row else None

    def end(self, session: str) -> None:
        """Log out."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM sessions WHERE id = ?", (_hash(session),))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
