"""Users, organisations and tokens. A token is kept only as its sha256."""

import hashlib
import itertools
import secrets
import sqlite3
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .database import Database, now
from .errors import ConflictError, InvalidInputError, NotFoundError, UnauthenticatedError
from .names import RESERVED_OWNERS, check_name

SELECT_IDENTITY = (
    "SELECT u.name, u.fullname, u.email, t.name AS token_name, t.role, t.created_at, substr(t.hash, 1, 16) "
    "FROM tokens t JOIN users u ON u.name = t.user"
)
"""The rows of `Identity`, by the table `t` of tokens."""
_MAX_NAMED = 10
_TOKEN_LETTERS = 34  # as the public Hub has


@dataclass(frozen=True)
class Identity:
    """Who asks: a user by one of their tokens. `token_id`, the start of its hash, may stand in links."""

    user: str
    fullname: str
    email: str
    token_name: str
    token_role: str
    token_created_at: str
    token_id: str

    @property
    def can_write(self) -> bool:
        """Whether the token may change anything at all."""
        return self.token_role == "write"


class Accounts:
    """The users, organisations and tokens in a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add_user(
        self, name: str, *, fullname: str = "", email: str = "", kind: str = "user", members: Sequence[str] = ()
    ) -> None:
        """Create a user, or with `kind="org"` an organisation of `members`, who may write.

        Raises:
            ConflictError: If the name is taken, in upper or lower case.
        """
        if check_name(name).lower() in RESERVED_OWNERS:
            raise InvalidInputError(f"The name {name!r} is reserved.")
        if members and kind != "org":
            raise InvalidInputError("Only an organisation has members.")
        for member in members:
            self._require(member, "user")
        try:
            with self._database.transaction() as connection:
                connection.execute(
                    "INSERT INTO users VALUES (?, ?, ?, ?, ?)", (name, kind, fullname or name, email, now())
                )
                rows = [(name, member) for member in members]
                connection.executemany("INSERT OR REPLACE INTO members VALUES (?, ?, 'write')", rows)
        except sqlite3.IntegrityError:
            raise ConflictError(f"There is already a user or organisation named {name!r}.") from None

    def add_member(self, org: str, user: str, *, role: str = "write") -> None:
        """Make a user a member of an organisation: `admin`, `write` or `read`."""
        self._require(org, "org")
        self._require(user, "user")
        if role not in {"admin", "write", "read"}:
            raise InvalidInputError(f"A member's role is admin, write or read; got {role!r}.")
        with self._database.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO members VALUES (?, ?, ?)", (org, user, role))

    def remove_member(self, org: str, user: str) -> None:
        """Take a user out of an organisation."""
        self._require(org, "org")
        with self._database.transaction() as connection:
            done = connection.execute("DELETE FROM members WHERE org = ? AND user = ?", (org, user))
            if not done.rowcount:
                raise NotFoundError("user", f"{user} is not a member of {org}.")

    def remove(self, name: str) -> None:
        """Remove a user with tokens, memberships and likes, or an organisation. Commits and comments keep the name.

        Raises:
            ConflictError: If there are repos of theirs, or organisations of which they are the only admin.
        """
        with self._database.transaction() as connection:
            name = self.find(name)["name"]
            left = [f"still has {_enumerate(repos)}"] if (repos := self._repos_of(name)) else []
            left += [f"is the only admin of {_enumerate(orgs)}"] if (orgs := self._orgs_led_by(name)) else []
            if left:
                raise ConflictError(f"{name} {' and '.join(left)}; give them to somebody else or delete them first.")
            connection.execute("DELETE FROM users WHERE name = ?", (name,))

    def _repos_of(self, owner: str) -> list[str]:
        rows = self._database.rows("SELECT kind, owner, name FROM repos WHERE owner = ? ORDER BY kind, name", owner)
        return [f"the {row['kind']} {row['owner']}/{row['name']}" for row in rows]

    def _orgs_led_by(self, user: str) -> list[str]:
        query = "SELECT org FROM members WHERE role = 'admin' GROUP BY org HAVING count(*) = 1 AND max(user) = ?"
        return [row["org"] for row in self._database.rows(f"{query} ORDER BY org", user)]

    def create_token(self, user: str, *, name: str | None = None, role: str = "write", replace: bool = False) -> str:
        """A new token, shown only here. Without a name it gets one that is free.

        Raises:
            ConflictError: If there is one of this name, unless it shall be replaced.
        """
        self._require(user, "user")
        if role not in {"read", "write"}:
            raise InvalidInputError(f"A token's role is read or write; got {role!r}.")
        if name is not None and not name.strip():
            raise InvalidInputError("The name of a token cannot be empty.")
        token = f"hf_{''.join(secrets.choice(string.ascii_letters) for _ in range(_TOKEN_LETTERS))}"
        with self._database.transaction() as connection:
            rows = connection.execute("SELECT name FROM tokens WHERE user = ?", (user,)).fetchall()
            taken = {row["name"] for row in rows}
            name = name or next(one for one in _token_names() if one not in taken)
            if name in taken and not replace:
                raise ConflictError(f"{user} has a token named {name!r} already; choose another name.")
            connection.execute("DELETE FROM tokens WHERE user = ? AND name = ?", (user, name))
            connection.execute("INSERT INTO tokens VALUES (?, ?, ?, ?, ?)", (_hash(token), user, name, role, now()))
        return token

    def revoke_token(self, user: str, name: str) -> None:
        """Make a token worthless at once."""
        with self._database.transaction() as connection:
            done = connection.execute("DELETE FROM tokens WHERE user = ? AND name = ?", (user, name))
            if not done.rowcount:
                raise NotFoundError("token", f"{user} has no token named {name!r}.")

    def identify(self, token: str) -> Identity:
        """Who holds this token; UnauthenticatedError if nobody does."""
        row = self._database.row(f"{SELECT_IDENTITY} WHERE t.hash = ?", _hash(token))
        if row is None:
            raise UnauthenticatedError("Invalid credentials in Authorization header")
        return Identity(*row)

    def identify_by_id(self, token_id: str) -> Identity:
        """Who holds the token that a signed link names; UnauthenticatedError if it was revoked."""
        row = self._database.row(f"{SELECT_IDENTITY} WHERE t.hash BETWEEN ? AND ? || 'g'", token_id, token_id)
        if row is None:
            raise UnauthenticatedError("The token for which this link was made has been revoked.")
        return Identity(*row)

    def orgs(self, user: str) -> list[tuple[str, str]]:
        """The organisations of a user, each with the user's role in it."""
        rows = self._database.rows("SELECT org, role FROM members WHERE user = ? ORDER BY org", user)
        return [(row["org"], row["role"]) for row in rows]

    def members(self, org: str) -> list[tuple[str, str]]:
        """Name and full name of each member of an organisation."""
        query = "SELECT name, fullname FROM members JOIN users ON name = user WHERE org = ? ORDER BY name"
        return [(row["name"], row["fullname"]) for row in self._database.rows(query, org)]

    def role_in(self, owner: str, user: str) -> str | None:
        """`admin` in one's own namespace, the member's role in an organisation's, None elsewhere."""
        if owner.lower() == user.lower():
            return "admin"
        row = self._database.row("SELECT role FROM members WHERE org = ? AND user = ?", owner, user)
        return row["role"] if row else None

    def list_all(self) -> list[dict[str, str]]:
        """Every user and organisation: `name`, `kind` (`user`, `org`) and `created_at`."""
        rows = self._database.rows("SELECT name, kind, created_at FROM users ORDER BY name")
        return [dict(row) for row in rows]

    def tokens(self, user: str) -> list[dict[str, str]]:
        """A user's tokens: `name`, `role` (`read`, `write`) and `created_at`; nobody can read a token itself again."""
        self._require(user, "user")
        query = "SELECT name, role, created_at FROM tokens WHERE user = ? ORDER BY created_at"
        return [dict(row) for row in self._database.rows(query, user)]

    def count(self) -> int:
        """How many users and organisations there are."""
        return len(self._database.rows("SELECT 1 FROM users"))

    def find(self, name: str) -> sqlite3.Row:
        """The row of a user or organisation."""
        row = self._database.row("SELECT * FROM users WHERE name = ?", name)
        if row is None:
            raise NotFoundError("user", f"There is no user or organisation named {name!r}.")
        return row

    def _require(self, name: str, kind: str) -> None:
        if self.find(name)["kind"] != kind:
            raise InvalidInputError(f"{name!r} is not {'a user' if kind == 'user' else 'an organisation'}.")


def _enumerate(names: list[str]) -> str:
    shown = names if len(names) <= _MAX_NAMED else [*names[: _MAX_NAMED - 1], f"{len(names) - _MAX_NAMED + 1} more"]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def _token_names() -> Iterator[str]:
    yield "default"
    yield from (f"default-{number}" for number in itertools.count(2))


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
