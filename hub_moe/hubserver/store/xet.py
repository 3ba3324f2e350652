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
_MIN_CHUNK_BYTES = 8 << 10  # of hf_xet; only the last chunk of a file or before another term may have less
_SMALL_CHUNKS_PER_TERM = 8
_REPEATS = 4
_REPEATED_BYTES = 4 << 30


class XetStore:
    """Registers what clients say in shards, and finds files by their Xet names."""

    def __init__(self, database: Database, xorbs: XorbStore, contents: Contents, commits: Commits) -> None:
        self._database = database
        self._commits = commits
        self._contents = contents
        self.xorbs = xorbs
        self.similar = Similar(database, xorbs, contents.recipes)

    def add_files(self, repo_uid: str, files: list[ShardFile]) -> Iterator[int]:
        """`add_file` for each file of a shard, unless that is too much work for what was sent."""
        self._check_work(repo_uid, files)
        for file in files:
            yield from self.add_file(repo_uid, file)

    def _check_work(self, repo_uid: str, files: list[ShardFile]) -> None:
        """Refuse a shard whose verification would be out of all proportion to what was sent for it.

        Zeros may stand in a file again and again, but they are read and hashed each time.
        """
        terms = [term for file in files for term in file.terms]
        for term in terms:  # what is added up must be true
            self._refuse(repo_uid, term, self._find_misfit(term))
        chunks, size_bytes = sum(term.end - term.first for term in terms), sum(term.size_bytes for term in terms)
        if chunks > size_bytes // _MIN_CHUNK_BYTES + _SMALL_CHUNKS_PER_TERM * len(terms):
            raise TooLargeError(f"The files of this shard have too many chunks of less than {_MIN_CHUNK_BYTES} bytes.")
        if size_bytes > _REPEATS * _count_distinct_bytes(terms) + _REPEATED_BYTES:
            raise TooLargeError(
                "The files of this shard repeat the same chunks too often; send them with HF_HUB_DISABLE_XET=1."
            )

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
            self._refuse(repo_uid, term, self._find_misfit(term) or self._find_false_proof(term, proof))
        name = format_hash(hash_file(self._nodes(file)))
        if name != file.name:
            raise InvalidInputError(f"The file has the Xet hash {name}, not {file.name}.")

    def _nodes(self, file: ShardFile) -> Iterator[Node]:
        return (node for term in file.terms for node in self.xorbs.index(term.xorb).nodes(term.first, term.end))

    def _refuse(self, repo_uid: str, term: Term, fault: str | None) -> None:
        """Say what is wrong with a term, if anything is, but to nobody that somebody else has the xorb."""
        if fault:
            raise InvalidInputError((fault if self.has_xorb(repo_uid, term.xorb) else _UNPROVEN).format(term.xorb))

    def _find_misfit(self, term: Term) -> str | None:
        """Where a term does not fit its xorb, with a place for the xorb's name."""
        if not self.xorbs.has(term.xorb):  # its index may still be remembered
            return _UNPROVEN
        index = self.xorbs.index(term.xorb)
        if not term.first < term.end <= len(index):
            return f"The xorb {{}} has no chunks {term.first} to {term.end}."
        size_bytes = index.size_bytes(term.first, term.end)
        if size_bytes != term.size_bytes:
            return f"A term of the xorb {{}} has {size_bytes} bytes, not {term.size_bytes}."
        return None

    def _find_false_proof(self, term: Term, proof: bytes) -> str | None:
        is_proven = hash_term(self.xorbs.index(term.xorb).hashes_of(term.first, term.end)) == proof
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


def _count_distinct_bytes(terms: list[Term]) -> int:
    """How many bytes the terms have at least, those that several terms have counted once."""
    total, xorb, end = 0, "", 0
    for term in sorted(terms, key=lambda term: (term.xorb, term.first, -term.end)):
        if term.xorb != xorb or term.first >= end:
            total, xorb, end = total + term.size_bytes, term.xorb, term.end
    return total


_UNPROVEN = (
    "The xorb {} is not here, or a verification entry for it is wrong: it was never uploaded, or `hub-moe hub gc` has "
    "deleted it. Upload again; if that does not help, delete the client's cache folder (HF_XET_CACHE)."
)
