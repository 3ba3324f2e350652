"""Discussions and pull requests: what was said, and what state they are in. Merging is in `merges`."""

import json
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from .accounts import Identity
from .database import Database, now
from .errors import ForbiddenError, InvalidInputError, NotFoundError
from .repos import Repo, Repos

MAX_COMMENT_CHARACTERS = 65_536
MAX_HISTORY = 20
OPEN = ("open", "draft")
CLOSED = ("closed", "merged")
_FIND = "SELECT * FROM discussions WHERE repo = ? AND num = ?"


@dataclass(frozen=True)
class Discussion:
    """A discussion or pull request. `target` is the ref that a pull request is for."""

    num: int
    title: str
    status: str
    is_pull_request: bool
    author: str
    created_at: str
    target: str
    merge_commit: str | None

    @property
    def ref(self) -> str:
        """Where a pull request's commits are."""
        return f"refs/pr/{self.num}"


@dataclass(frozen=True)
class Event:
    """Something that happened in a discussion; `data` is as the Hub's API shows it."""

    id: str
    type: str
    author: str
    created_at: str
    data: dict[str, Any]


class Discussions:
    """The discussions of all repos."""

    def __init__(self, database: Database, repos: Repos) -> None:
        self._database = database
        self._repos = repos

    def create(
        self,
        repo: Repo,
        who: Identity,
        *,
        num: int,
        title: str,
        description: str,
        status: str = "open",
        target: str | None = None,
    ) -> Discussion:
        """Open a discussion, or with `target` a pull request whose ref exists already."""
        row = (repo.uid, num, check_title(title), status, int(target is not None), who.user, now(), target or "")
        first = _comment_data(description, who, [])
        try:
            with self._database.transaction() as connection:
                connection.execute("INSERT INTO discussions VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL)", row)
                _add_event(connection, repo, num, _new_event(who, "comment", first))
        except sqlite3.IntegrityError:
            raise NotFoundError("repo", "Repository not found") from None  # it was deleted in the meantime
        return self.find(repo, num)

    def find(self, repo: Repo, num: int) -> Discussion:
        """A discussion by its number."""
        row = self._database.row(_FIND, repo.uid, num)
        if row is None:
            raise NotFoundError("discussion", f"{repo.id} has no discussion {num}.")
        return _discussion(row)

    def list_all(
        self, repo: Repo, *, author: str = "", is_pull_request: bool | None = None, statuses: tuple[str, ...] = ()
    ) -> list[Discussion]:
        """The discussions that pass the filters, newest first."""
        rows = self._database.rows("SELECT * FROM discussions WHERE repo = ? ORDER BY num DESC", repo.uid)
        found = [_discussion(row) for row in rows]
        return [
            one
            for one in found
            if (not author or one.author.lower() == author.lower())
            and is_pull_request in {None, one.is_pull_request}
            and (not statuses or one.status in statuses)
        ]

    def events(self, repo: Repo, discussion: Discussion) -> list[Event]:
        """What happened, in order."""
        query = "SELECT * FROM events WHERE repo = ? AND num = ? ORDER BY rowid"
        return [_event(row) for row in self._database.rows(query, repo.uid, discussion.num)]

    def add_event(self, repo: Repo, discussion: Discussion, who: Identity, kind: str, data: dict[str, Any]) -> Event:
        """Note that something happened."""
        event = _new_event(who, kind, data)
        with self._database.transaction() as connection:
            _add_event(connection, repo, discussion.num, event)
        return event

    def comment(self, repo: Repo, discussion: Discussion, who: Identity, text: str) -> Event:
        """Say something."""
        return self.add_event(repo, discussion, who, "comment", _comment_data(text, who, []))

    def edit_comment(self, repo: Repo, discussion: Discussion, who: Identity, event_id: str, text: str) -> Event:
        """Change one's own comment; what it said before stays in its history, the last 20 versions."""
        with self._database.transaction() as connection:
            event = _find_comment(connection, repo, discussion, event_id)
            if event.author.lower() != who.user.lower():
                raise ForbiddenError("Only its author may edit a comment.")
            if event.data["hidden"]:
                raise InvalidInputError("A hidden comment cannot be edited.")
            history = [*event.data["history"], event.data["latest"]][-MAX_HISTORY:]
            return _replace_data(connection, event, _comment_data(text, who, history) | {"edited": True})

    def hide_comment(self, repo: Repo, discussion: Discussion, who: Identity, event_id: str) -> Event:
        """Take a comment out of sight for good: its author may, and who may write to the repo."""
        may_write = self._repos.may_write(repo, who)
        data = _comment_data("This comment has been hidden", who, []) | {"hidden": True, "hiddenBy": who.user}
        with self._database.transaction() as connection:
            event = _find_comment(connection, repo, discussion, event_id)
            if event.author.lower() != who.user.lower() and not may_write:
                raise ForbiddenError("Only its author and the repo's owners may hide a comment.")
            return _replace_data(connection, event, data)

    def rename(self, repo: Repo, discussion: Discussion, who: Identity, title: str) -> Event:
        """Change the title."""
        return self.change(repo, discussion, who, title=title)[0]

    def change_status(
        self, repo: Repo, discussion: Discussion, who: Identity, status: str, *, comment: str | None = None
    ) -> Event:
        """Open or close; what is merged stays so, and only a pull request can be a draft. A comment may go along."""
        return self.change(repo, discussion, who, status=status, comment=comment)[-1]

    def change(
        self,
        repo: Repo,
        discussion: Discussion,
        who: Identity,
        *,
        title: str | None = None,
        comment: str | None = None,
        status: str | None = None,
    ) -> list[Event]:
        """Rename, comment and set the status, as far as each is given: all of it or nothing."""
        if title is not None or status is not None:
            self._require_control(repo, discussion, who)
        events = [] if comment is None else [_new_event(who, "comment", _comment_data(comment, who, []))]
        with self._database.transaction() as connection:
            current = _read(connection, repo, discussion)
            if title is not None:
                data = {"from": current.title, "to": check_title(title)}
                _update(connection, repo, current, title=check_title(title))
                events.insert(0, _new_event(who, "title-change", data))
            if status is not None:
                _check_change(current, status)
                _update(connection, repo, current, status=status)
                events.append(_new_event(who, "status-change", {"status": status}))
            for event in events:
                _add_event(connection, repo, current.num, event)
        return events

    @contextmanager
    def merging(self, repo: Repo, discussion: Discussion, who: Identity, commit: str) -> Iterator[None]:
        """Note that an open pull request is merged by a commit, if the block gets to its end.

        Nobody changes the discussion meanwhile, so that a branch never moves for a pull request that was closed.
        """
        with self._database.transaction() as connection:
            current = _read(connection, repo, discussion)
            require_open(current)
            _update(connection, repo, current, status="merged", merge_commit=commit)
            _add_event(connection, repo, current.num, _new_event(who, "status-change", {"status": "merged"}))
            yield

    def may_control(self, repo: Repo, discussion: Discussion, who: Identity) -> bool:
        """Whether `who` may close, open or rename a discussion: its author, and who may write to the repo."""
        is_author = who.can_write and discussion.author.lower() == who.user.lower()
        return is_author or self._repos.may_write(repo, who)

    def require_commit(self, repo: Repo, discussion: Discussion, who: Identity) -> None:
        """Refuse who may not add commits to a pull request: its author may while it is open, and the repo's owners."""
        self._require_control(repo, discussion, who)
        if not discussion.is_pull_request or discussion.status not in OPEN:
            raise InvalidInputError(f"The pull request {discussion.num} is {discussion.status}.")

    def _require_control(self, repo: Repo, discussion: Discussion, who: Identity) -> None:
        if not self.may_control(repo, discussion, who):
            raise ForbiddenError("Only its author and the repo's owners may do this.")


def require_open(discussion: Discussion) -> None:
    """Refuse to merge what is no open pull request."""
    if not discussion.is_pull_request or discussion.status != "open":
        raise InvalidInputError(f"Only an open pull request can be merged; this one is {discussion.status}.")


def check_comment(text: str) -> str:
    """`text` if it may be a comment: 1 to 65,536 characters, not all of them spaces."""
    if not text.strip() or len(text) > MAX_COMMENT_CHARACTERS:
        raise InvalidInputError(f"A comment has 1 to {MAX_COMMENT_CHARACTERS} characters.")
    return text


def check_title(title: str) -> str:
    """A title without spaces around it: 3 to 200 characters."""
    if not 3 <= len(title.strip()) <= 200:
        raise InvalidInputError("A title has 3 to 200 characters.")
    return title.strip()


def _comment_data(text: str, who: Identity, history: list[dict[str, Any]]) -> dict[str, Any]:
    latest = {"raw": check_comment(text), "html": "", "updatedAt": now(), "author": {"name": who.user}}
    return {"edited": False, "hidden": False, "latest": latest, "history": history}


def _check_change(discussion: Discussion, status: str) -> None:
    if status not in {"open", "closed", "draft"} or (status == "draft" and not discussion.is_pull_request):
        raise InvalidInputError(f"The status cannot become {status[:40]!r}; use open or closed.")
    if discussion.status == "merged":
        raise InvalidInputError("A merged pull request stays merged.")
    if discussion.status == status:
        raise InvalidInputError(f"The status is {status} already.")


def _new_event(who: Identity, kind: str, data: dict[str, Any]) -> Event:
    return Event(secrets.token_hex(12), kind, who.user, now(), data)


def _add_event(connection: sqlite3.Connection, repo: Repo, num: int, event: Event) -> None:
    values = (event.id, repo.uid, num, event.type, event.author, event.created_at, json.dumps(event.data))
    connection.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", values)


def _read(connection: sqlite3.Connection, repo: Repo, discussion: Discussion) -> Discussion:
    """The discussion as it is inside a transaction."""
    row = connection.execute(_FIND, (repo.uid, discussion.num)).fetchone()
    if row is None:
        raise NotFoundError("discussion", f"{repo.id} has no discussion {discussion.num}.")
    return _discussion(row)


def _update(connection: sqlite3.Connection, repo: Repo, discussion: Discussion, **values: str) -> None:
    columns = ", ".join(f"{column} = ?" for column in values)
    query = f"UPDATE discussions SET {columns} WHERE repo = ? AND num = ?"
    connection.execute(query, (*values.values(), repo.uid, discussion.num))


def _find_comment(connection: sqlite3.Connection, repo: Repo, discussion: Discussion, event_id: str) -> Event:
    query = "SELECT * FROM events WHERE repo = ? AND num = ? AND id = ? AND type = 'comment'"
    row = connection.execute(query, (repo.uid, discussion.num, event_id)).fetchone()
    if row is None:
        raise NotFoundError("comment", f"There is no comment {event_id}.")
    return _event(row)


def _replace_data(connection: sqlite3.Connection, event: Event, data: dict[str, Any]) -> Event:
    connection.execute("UPDATE events SET data = ? WHERE id = ?", (json.dumps(data), event.id))
    return replace(event, data=data)


def _discussion(row: sqlite3.Row) -> Discussion:
    return Discussion(
        num=row["num"],
        title=row["title"],
        status=row["status"],
        is_pull_request=bool(row["is_pull_request"]),
        author=row["author"],
        created_at=row["created_at"],
        target=row["target"],
        merge_commit=row["merge_commit"],
    )


def _event(row: sqlite3.Row) -> Event:
    return Event(row["id"], row["type"], row["author"], row["created_at"], json.loads(row["data"]))
