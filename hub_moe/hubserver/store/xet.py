"""The Xet side of large contents: a shard's files are verified once, then kept as recipes over the xorbs."""

import hashlib
import os
from collections.abc import Iterator

from .ahead import map_ahead
from .commits import Commits
from .contents import Contents
from .database import Database
from .errors import InvalidInputError, NotFoundError, TooLargeError
from .recipes import Recipe
from .shards import ShardFile, Term
from .similar import Similar
from .xet_hashes import Node, check_name, format_hash, hash_file, hash_term
from .xorbs import XorbStore

_MAX_FILE_BYTES = 1 << 40


class XetStore:
    """Registers what clients say in shards, and finds files by their Xet names."""

    def __init__(self, database: Database, xorbs: XorbStore, contents: Contents, commits: Commits) -> None:
        self._database = database
        self._commits = commits
        self._contents = contents
        self.xorbs = xorbs
        self.similar = Similar(database, xorbs, contents.recipes)

    def add_file(self, repo_uid: str, file: ShardFile) -> Iterator[int]:
        """Verify a file of a shard and register it with a repo, yielding how many more bytes were verified.

        Raises:
            InvalidInputError: If a term, the name or the sha256 is false; then nothing has changed.
        """
        if file.size_bytes > _MAX_FILE_BYTES:
            raise TooLargeError(f"A file has at most {_MAX_FILE_BYTES} bytes.")
        self._check_terms(repo_uid, file)
        known = self._contents.recipes.find_by_name(file.name)
        if known is None:
            yield from self._check_content(file)
        elif known.sha256 != file.sha256:
            raise InvalidInputError(f"The content's sha256 is {known.sha256}, not {file.sha256}.")
        self._keep(repo_uid, file)

    def has_xorb(self, repo_uid: str, name: str) -> bool:
        """Whether a content of this repo is made of a xorb, so that its name tells the repo's writers nothing new."""
        query = (
            "SELECT 1 FROM recipe_terms JOIN recipes ON recipes.id = recipe "
            "JOIN repo_blobs ON repo_blobs.sha256 = recipes.sha256 WHERE xorb = ? AND repo = ? LIMIT 1"
        )
        return self._database.row(query, check_name(name), repo_uid) is not None and self.xorbs.has(name)

    def renew_xorb(self, name: str) -> None:
        """If a xorb is here, `hub gc` takes it for a new one from now on."""
        with self._database.transaction():  # `hub gc` deletes xorbs in one
            if self.xorbs.has(name):
                os.utime(self.xorbs.path(name))

    def find_file(self, repo_uid: str, name: str) -> Recipe:
        """A file of a repo by its Xet name."""
        recipe = self._contents.recipes.find_by_name(check_name(name))
        if recipe is None or not self._commits.has_uploaded(repo_uid, recipe.sha256):
            raise NotFoundError("upload", f"This repo has no file with the Xet name {name}.")
        return recipe

    def generation(self) -> int:
        """A number that changes when xorbs are deleted."""
        row = self._database.row("SELECT value FROM counters WHERE name = 'xet generation'")
        return int(row["value"]) if row else 0

    def start_generation(self) -> None:
        """Xorbs will be deleted: clients that fetch a token from now on shall not count on xorbs they know."""
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO counters VALUES ('xet generation', 1) ON CONFLICT (name) DO UPDATE SET value = value + 1"
            )

    def locate(self, xorb: str, first: int, end: int) -> tuple[int, int]:
        """The first and last byte of a run of chunks inside a xorb."""
        ends = self.xorbs.index(xorb).ends
        return ends[first], ends[end] - 1

    def _check_terms(self, repo_uid: str, file: ShardFile) -> None:
        """That each term exists and the client knows its chunks, and that the file's name is true."""
        for term, proof in zip(file.terms, file.proofs, strict=True):
            fault = self._find_fault(term, proof)
            if fault and not self.has_xorb(repo_uid, term.xorb):  # it may be a secret that somebody else has it
                fault = _UNPROVEN
            if fault:
                raise InvalidInputError(fault.format(term.xorb))
        name = format_hash(hash_file(self._nodes(file)))
        if name != file.name:
            raise InvalidInputError(f"The file has the Xet hash {name}, not {file.name}.")

    def _nodes(self, file: ShardFile) -> Iterator[Node]:
        return (node for term in file.terms for node in self.xorbs.index(term.xorb).nodes(term.first, term.end))

    def _find_fault(self, term: Term, proof: bytes) -> str | None:
        """What is wrong with a term, with a place for the name of its xorb."""
        if not self.xorbs.has(term.xorb):  # its index may still be remembered
            return _UNPROVEN
        index = self.xorbs.index(term.xorb)
        if not term.first < term.end <= len(index):
            return f"The xorb {{}} has no chunks {term.first} to {term.end}."
        size_bytes = index.size_bytes(term.first, term.end)
        if size_bytes != term.size_bytes:
            return f"A term of the xorb {{}} has {size_bytes} bytes, not {term.size_bytes}."
        is_proven = hash_term(index.hashes_of(term.first, term.end)) == proof
        return None if is_proven else "A verification entry for the xorb {} is wrong."

    def _read(self, run: tuple[str, int, int]) -> memoryview:
        return self.xorbs.read(*run)

    def _check_content(self, file: ShardFile) -> Iterator[int]:
        digest = hashlib.sha256()
        for term in file.terms:
            for piece in map_ahead(self._read, self.xorbs.split(term.xorb, term.first, term.end)):
                digest.update(piece)
            yield term.size_bytes
        if digest.hexdigest() != file.sha256:
            raise InvalidInputError(f"The content's sha256 is {digest.hexdigest()}, not {file.sha256}.")

    def _keep(self, repo_uid: str, file: ShardFile) -> None:
        with self._database.transaction() as connection:
            self._contents.recipes.add(connection, file)
            self.similar.add(connection, file.sha256, self._nodes(file))
            self._commits.note(connection, repo_uid, file.sha256)


_UNPROVEN = (
    "The xorb {} is not here, or a verification entry for it is wrong: it was never uploaded, or `hub-moe hub gc` has "
    "deleted it. Upload again; if that does not help, delete the client's cache folder (HF_XET_CACHE)."
)
