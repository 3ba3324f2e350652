"""What of a file to upload is here already: answers to hf_xet's question for one chunk (hub-docs, deduplication.md).

An answer lists the xorbs of files that hold the chunk and that the client may read. Chunks of these xorbs which no such
file holds are blanked, and the hashes of the others are keyed: nobody learns of chunks that they do not have.
"""

import secrets
import sqlite3
import struct
import time
from collections import defaultdict
from collections.abc import Iterable

from blake3 import blake3

from .database import Database
from .recipes import Recipe, Recipes
from .shards import BOOKEND_RECORD, HEADER, RECORD_BYTES, TAG, VERSION
from .xet_hashes import HASH_BYTES, Node, check_name, parse_hash
from .xorbs import XorbStore

_MAX_FILES = 4
_MAX_XORBS = 64
_EVERY = 1024
_LIFE_S = 7 * 24 * 3600
_FOOTER = struct.Struct("<9Q32sQQ72xQ")
_XORB = struct.Struct("<32sIIII")
_CHUNK = struct.Struct("<32sII8x")
_FIND = (
    "SELECT DISTINCT recipes.id, recipes.sha256, recipes.name, recipes.size_bytes FROM shared_chunks "
    "JOIN recipes ON recipes.id = recipe JOIN repo_blobs ON repo_blobs.sha256 = recipes.sha256 "
    "JOIN repos ON repos.id = repo_blobs.repo "
    "WHERE chunk = ? AND (repos.id = ? OR (repos.private = 0 AND repos.gated = '')) ORDER BY recipes.id DESC LIMIT ?"
)


class Similar:
    """Finds files by some of their chunks: their first, and one in 1024 of the others."""

    def __init__(self, database: Database, xorbs: XorbStore, recipes: Recipes) -> None:
        self._database = database
        self._xorbs = xorbs
        self._recipes = recipes

    def add(self, connection: sqlite3.Connection, sha256: str, chunks: Iterable[Node]) -> None:
        """Let a file with a recipe be found, inside a transaction."""
        found = {raw for number, (raw, _) in enumerate(chunks) if number == 0 or _is_eligible(raw)}
        query = "INSERT OR IGNORE INTO shared_chunks SELECT ?, id FROM recipes WHERE sha256 = ?"
        connection.executemany(query, [(raw, sha256) for raw in sorted(found)])

    def find(self, repo_uid: str, chunk: str) -> bytes | None:
        """A shard of the xorbs of files that hold a chunk, in this repo or in open ones; None if there is none."""
        rows = self._database.rows(_FIND, parse_hash(check_name(chunk)), repo_uid, _MAX_FILES)
        runs: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for row in rows:
            recipe = Recipe(*row)
            for _, term in self._recipes.terms(recipe, 0, recipe.size_bytes):
                if term.xorb in runs or len(runs) < _MAX_XORBS:
                    runs[term.xorb].append((term.first, term.end))
        known = {xorb: some for xorb, some in runs.items() if self._xorbs.has(xorb)}
        return self._pack(known) if known else None

    def _pack(self, runs: dict[str, list[tuple[int, int]]]) -> bytes:
        key = secrets.token_bytes(HASH_BYTES)
        body = [HEADER.pack(TAG, VERSION, _FOOTER.size), BOOKEND_RECORD]
        body += [self._pack_xorb(xorb, some, key) for xorb, some in runs.items()]
        body.append(BOOKEND_RECORD)
        end, now_s = sum(map(len, body)), int(time.time())
        no_tables = (end, 0) * 3  # the specification says reserved; hf_xet takes zeros for the place of long tables
        footer = _FOOTER.pack(1, RECORD_BYTES, 2 * RECORD_BYTES, *no_tables, key, now_s, now_s + _LIFE_S, end)
        return b"".join([*body, footer])

    def _pack_xorb(self, xorb: str, runs: list[tuple[int, int]], key: bytes) -> bytes:
        index = self._xorbs.index(xorb)
        shown = {number for first, end in runs for number in range(first, end)}
        records = [_XORB.pack(parse_hash(xorb), 0, len(index), index.unpacked_ends[-1], index.ends[-1])]
        for number, (raw, size) in enumerate(index.nodes()):
            keyed = blake3(raw, key=key).digest() if number in shown else secrets.token_bytes(HASH_BYTES)
            records.append(_CHUNK.pack(keyed, index.unpacked_ends[number], size))
        return b"".join(records)


def _is_eligible(raw: bytes) -> bool:
    return int.from_bytes(raw[24:], "little") % _EVERY == 0
