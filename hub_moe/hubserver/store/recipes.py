"""Recipes: large contents that are kept as runs of chunks of xorbs, so that what two files share is stored once."""

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .ahead import map_ahead
from .blobs import SEND_BYTES
from .database import Database
from .errors import NotFoundError
from .shards import ShardFile, Term
from .xorbs import XorbStore

_ROWS_PER_QUERY = 500
_Piece = tuple[tuple[str, int, int], int, int]  # a run of chunks of a xorb, and which of its bytes
_FIND = "SELECT id, sha256, name, size_bytes FROM recipes WHERE "


@dataclass(frozen=True)
class Recipe:
    """A content that is made of xorbs; `name` is the hash by which Xet knows it."""

    id: int
    sha256: str
    name: str
    size_bytes: int


class Recipes:
    """The recipes in the database, and the way from one to its bytes."""

    def __init__(self, database: Database, xorbs: XorbStore) -> None:
        self._database = database
        self._xorbs = xorbs

    def find(self, sha256: str) -> Recipe | None:
        """The recipe of a content, None if there is none."""
        row = self._database.row(f"{_FIND} sha256 = ?", sha256)
        return Recipe(*row) if row else None

    def find_by_name(self, name: str) -> Recipe | None:
        """The recipe of the file that Xet calls `name`, None if there is none."""
        row = self._database.row(f"{_FIND} name = ?", name)
        return Recipe(*row) if row else None

    def names(self, sha256s: Iterable[str]) -> dict[str, str]:
        """By sha256, the Xet names of those contents that have a recipe."""
        wanted, found = list(set(sha256s)), {}
        for start in range(0, len(wanted), _ROWS_PER_QUERY):
            some = wanted[start : start + _ROWS_PER_QUERY]
            marks = ",".join("?" * len(some))
            rows = self._database.rows(f"SELECT sha256, name FROM recipes WHERE sha256 IN ({marks})", *some)
            found.update({row["sha256"]: row["name"] for row in rows})
        return found

    def all(self) -> Iterator[str]:
        """The sha256 of every content that has a recipe."""
        last = ""
        while rows := self._database.rows(
            "SELECT sha256 FROM recipes WHERE sha256 > ? ORDER BY sha256 LIMIT ?", last, _ROWS_PER_QUERY
        ):
            last = rows[-1]["sha256"]
            yield from (row["sha256"] for row in rows)

    def add(self, connection: sqlite3.Connection, file: ShardFile) -> None:
        """Write a verified recipe inside a transaction, unless the content has one.

        Raises:
            NotFoundError: If a xorb has been deleted since the file was verified.
        """
        row = connection.execute(
            "INSERT INTO recipes (sha256, name, size_bytes) VALUES (?, ?, ?) ON CONFLICT DO NOTHING RETURNING id",
            (file.sha256, file.name, file.size_bytes),
        ).fetchone()
        if row is None:
            return
        missing = next((xorb for xorb in {term.xorb for term in file.terms} if not self._xorbs.has(xorb)), None)
        if missing:
            raise NotFoundError("upload", f"The xorb {missing} was deleted meanwhile; upload again.")
        connection.executemany("INSERT INTO recipe_terms VALUES (?, ?, ?, ?, ?, ?)", _place(row["id"], file.terms))

    def terms(self, recipe: Recipe, start: int, end: int) -> Iterator[tuple[int, Term]]:
        """The terms that hold the bytes `start` to `end`, each with the place in the file where it begins."""
        query = "SELECT max(start) FROM recipe_terms WHERE recipe = ? AND start <= ?"
        position = self._database.rows(query, recipe.id, start)[0][0] or 0
        while position < end:
            rows = self._database.rows(
                "SELECT start, xorb, size_bytes, first, end FROM recipe_terms "
                "WHERE recipe = ? AND start >= ? AND start < ? ORDER BY start LIMIT ?",
                *(recipe.id, position, end, _ROWS_PER_QUERY),
            )
            if not rows:
                raise NotFoundError("upload", f"The content {recipe.sha256} was deleted while it was read.")
            yield from ((row["start"], Term(*row[1:])) for row in rows)
            position = rows[-1]["start"] + rows[-1]["size_bytes"]

    def read(self, recipe: Recipe, start: int, end: int) -> Iterator[memoryview]:
        """The bytes `start` to `end` of a content, in pieces of about 256 KiB."""
        return map_ahead(self._read_piece, self._plan(recipe, start, end), ahead=1)

    def _plan(self, recipe: Recipe, start: int, end: int) -> Iterator[_Piece]:
        for place, term in self.terms(recipe, start, end):
            index = self._xorbs.index(term.xorb)
            number = index.find(term.first, max(0, start - place))
            for name, first, last in self._xorbs.split(term.xorb, number, term.end, size_bytes=SEND_BYTES):
                skipped = place + index.size_bytes(term.first, first)
                if skipped >= end:
                    return
                yield (name, first, last), max(0, start - skipped), end - skipped

    def _read_piece(self, piece: _Piece) -> memoryview:
        run, start, end = piece
        return self._xorbs.read(*run)[start:end]

    def delete(self, connection: sqlite3.Connection, sha256: str) -> None:
        """Forget a recipe inside a transaction; its xorbs stay."""
        connection.execute("DELETE FROM recipes WHERE sha256 = ?", (sha256,))

    def xorbs(self) -> list[str]:
        """The name of every xorb that a recipe needs."""
        return [row["xorb"] for row in self._database.rows("SELECT DISTINCT xorb FROM recipe_terms")]

    def users(self, xorb: str) -> list[str]:
        """The sha256 of every content that a xorb is part of."""
        query = "SELECT DISTINCT sha256 FROM recipe_terms JOIN recipes ON id = recipe WHERE xorb = ?"
        return [row["sha256"] for row in self._database.rows(query, xorb)]


def _place(recipe: int, terms: Iterable[Term]) -> Iterator[tuple[int, int, str, int, int, int]]:
    start = 0
    for term in terms:
        yield recipe, start, term.xorb, term.size_bytes, term.first, term.end
        start += term.size_bytes
